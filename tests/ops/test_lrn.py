"""The operator behind local_response_norm."""

import pytest
import torch
import torch.nn.functional as torch_functional
from operator_checks import LAYOUTS, MODES, check_against_reference, check_citizenship, tensor

from fastalex import backend, ops
from fastalex import functional as F

PARAMETERS = {"size": 5, "alpha": 0.5, "beta": 0.75, "k": 2.0}


def lrn(x):
    return F.local_response_norm(x, **PARAMETERS)


def magnitude_of_gradient(x, bound):
    """The terms of dx = g s^-beta - 2 alpha beta / n x sum(g x s^(-beta-1)), each in absolute value."""
    x = x.detach().double()
    s = 2.0 + 0.1 * torch_functional.avg_pool3d(
        torch_functional.pad(x.square()[:, None], (0, 0, 0, 0, 2, 2)), (5, 1, 1), 1
    ).squeeze(1).mul(5)
    terms = bound * x.abs() * s**-1.75
    sums = (
        torch_functional.avg_pool3d(torch_functional.pad(terms[:, None], (0, 0, 0, 0, 2, 2)), (5, 1, 1), 1)
        .squeeze(1)
        .mul(5)
    )
    return bound * s**-0.75 + 0.15 * x.abs() * sums


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_against_reference(mode, layout, dtype):
    x = tensor(2, 24, 5, 7, dtype=dtype, layout=LAYOUTS[layout], scale=3.0)
    # the incoming gradient is normal: five standard deviations bound what is multiplied
    check_against_reference(lrn, [x], terms=10, magnitudes=[None, magnitude_of_gradient(x, 5.0)], mode=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_citizenship(layout):
    check_citizenship(lrn, [tensor(2, 8, 3, 4, layout=LAYOUTS[layout])])


def test_opcheck():
    for layout in LAYOUTS.values():
        x = tensor(2, 8, 3, 4, layout=layout)
        torch.library.opcheck(ops.local_response_norm, (x, [5, 0.5, 0.75, 2.0, 2]))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_gradcheck(size):
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: F.local_response_norm(t, size, 0.5, 0.75, 2.0, groups=2), x)


def test_double_backward_is_refused():
    x = tensor(1, 8, 2, 2)
    (grad,) = torch.autograd.grad(lrn(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="local_response_norm has no second derivative"):
        grad.sum().backward()


def test_expanded_sliced_and_empty():
    base = torch.randn(2, 16, 1, 9)
    for x in (base.expand(2, 16, 6, 9), base[:, ::2], base[..., ::3], base[:0], base.transpose(2, 3)):
        expected = torch_functional.local_response_norm(x, **PARAMETERS)
        torch.testing.assert_close(lrn(x), expected, rtol=1e-6, atol=1e-6)


def test_dtypes_are_kept_under_autocast():
    x = torch.randn(2, 8, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert lrn(x).dtype == torch.float32
        assert lrn(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((4, 4), {"size": 5}, r"at least 3 dimensions .* got shape \(4, 4\)"),
        ((2, 8, 3), {"size": 0}, "size, the number of channels in a window, must be at least 1, got 0"),
        ((2, 8, 3), {"size": 5, "groups": 3}, "groups must be positive and divide the 8 channels, got 3"),
    ],
)
def test_bad_arguments(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        F.local_response_norm(torch.randn(shape), **arguments)


def test_integers_are_refused():
    with pytest.raises(RuntimeError, match=r"must be a floating-point tensor, got torch\.int64"):
        F.local_response_norm(torch.ones(1, 8, 2, dtype=torch.int64), 5)


def test_reference_mode_bypasses_the_operator():
    x = tensor(1, 8, 2, 2)
    with backend.use("reference"):
        y = lrn(x)
    assert "local_response_norm" not in type(y.grad_fn).__name__.lower()
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    grad.sum().backward()  # any order
    assert x.grad is not None
