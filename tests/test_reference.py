"""The formulas, against torch.nn.functional where torch has them and against numbers worked out by hand."""

import pytest
import torch
import torch.nn.functional as F

from fastalex import reference

DOUBLE = torch.float64


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 15])
@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 7, 3, 4), (2, 7, 2, 3, 4)], ids=["3d", "4d", "5d"])
def test_lrn_is_torchs(size, shape):
    x = torch.randn(shape, dtype=DOUBLE)
    expected = F.local_response_norm(x, size, alpha=0.3, beta=0.6, k=1.5)
    torch.testing.assert_close(reference.local_response_norm(x, size, 0.3, 0.6, 1.5), expected, rtol=1e-14, atol=0)


def test_lrn_by_hand():
    """x = 1, 2, 3; size 3: sums 5, 14, 13; alpha / size = 1; k = 2; beta = 1."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE).view(1, 3, 1)
    y = reference.local_response_norm(x, 3, alpha=3.0, beta=1.0, k=2.0)
    torch.testing.assert_close(y.flatten(), torch.tensor([1 / 7, 2 / 16, 3 / 15], dtype=DOUBLE), rtol=1e-15, atol=0)


def test_even_window_reaches_further_to_lower_channels():
    """Size 2 adds channel c - 1 (size//2 = 1 below, (size-1)//2 = 0 above): sums 1, 5, 13."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE).view(1, 3, 1)
    y = reference.local_response_norm(x, 2, alpha=2.0, beta=1.0, k=0.0)
    torch.testing.assert_close(y.flatten(), torch.tensor([1 / 1, 2 / 5, 3 / 13], dtype=DOUBLE), rtol=1e-15, atol=0)


def test_the_papers_alpha_is_size_times_torchs():
    """Section 3.3 prints k + alpha * sum, with alpha = 1e-4, n = 5, k = 2, beta = 0.75."""
    x = torch.full((1, 5, 1), 100.0, dtype=DOUBLE)
    y = reference.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)
    assert y[0, 2, 0].item() == pytest.approx(100 / (2 + 1e-4 * 5 * 100**2) ** 0.75, rel=1e-14)


def test_lrn_groups_do_not_see_each_other():
    x = torch.randn(2, 12, 3, 3, dtype=DOUBLE)
    halves = [reference.local_response_norm(h, 5, 0.5, 0.75, 1.0) for h in x.chunk(2, 1)]
    assert torch.equal(reference.local_response_norm(x, 5, 0.5, 0.75, 1.0, groups=2), torch.cat(halves, 1))


WINDOWS = [
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1), "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": 5, "stride": 3, "padding": 2, "ceil_mode": True},
    {"kernel_size": 1, "stride": 3, "ceil_mode": True},
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_max_pool_is_torchs(window):
    """Quantised values with ties, NaN and -inf planes: maxima and indices, and gradients through the first maximum."""
    x = torch.randint(-3, 3, (2, 3, 11, 9)).to(DOUBLE)
    x[0, 0, 3, 3] = x[0, 0, 3, 4] = torch.nan
    x[1, 1] = -torch.inf
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = x.contiguous(memory_format=layout).requires_grad_()
        theirs = x.contiguous(memory_format=layout).requires_grad_()
        output, indices = reference.max_pool2d(ours, **window, return_indices=True)
        expected, expected_indices = F.max_pool2d(theirs, **window, return_indices=True)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices, expected_indices)
        weights = torch.randn_like(expected)
        (ours_grad,) = torch.autograd.grad((output * weights).nan_to_num(0, 0, 0).sum(), ours)
        (theirs_grad,) = torch.autograd.grad((expected * weights).nan_to_num(0, 0, 0).sum(), theirs)
        torch.testing.assert_close(ours_grad, theirs_grad)


def test_max_pool_of_one_image():
    x = torch.randn(3, 7, 7)
    output, indices = reference.max_pool2d(x, 3, 2, return_indices=True)
    expected, expected_indices = F.max_pool2d(x, 3, 2, return_indices=True)
    assert torch.equal(output, expected)
    assert torch.equal(indices, expected_indices)


def test_lrn_max_pool_is_the_composition():
    x = torch.randn(2, 6, 9, 9, dtype=DOUBLE)
    expected = F.max_pool2d(F.local_response_norm(x, 5, 0.1, 0.75, 2.0), 3, 2)
    torch.testing.assert_close(reference.lrn_max_pool2d(x, 5, 0.1, 0.75, 2.0), expected, rtol=1e-14, atol=0)


def test_conv_and_linear_are_torchs():
    x, w, b = (torch.randn(s, dtype=DOUBLE) for s in ((2, 4, 7, 6), (6, 2, 3, 2), (6,)))
    expected = F.relu(F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), 2))
    assert torch.equal(reference.conv2d_relu(x, w, b, (2, 1), (1, 0), (1, 2), 2), expected)
    x, w, b = (torch.randn(s, dtype=DOUBLE) for s in ((3, 5), (4, 5), (4,)))
    assert torch.equal(reference.linear_relu_dropout(x, w, b, 0.5, training=False), F.relu(F.linear(x, w, b)))


def test_dropout_keeps_the_expectation():
    x, w = torch.ones(1, 1, dtype=DOUBLE), torch.ones(20000, 1, dtype=DOUBLE)
    y = reference.linear_relu_dropout(x, w, None, 0.25)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    # a binomial fraction of 20,000: five standard deviations
    assert (y == 0).double().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 20000) ** 0.5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: reference.local_response_norm(x, 4, 0.5, 0.75, 1.0, groups=2),
        lambda x: reference.max_pool2d(x, 3, 2, 1),
        lambda x: reference.lrn_max_pool2d(x, 3, 0.5, 0.75, 1.0),
    ],
    ids=["lrn", "max_pool", "lrn_max_pool"],
)
def test_differentiable(function):
    x = torch.randperm(2 * 4 * 5 * 5).to(DOUBLE).div(20).view(2, 4, 5, 5).requires_grad_()  # no ties
    assert torch.autograd.gradcheck(function, x)
