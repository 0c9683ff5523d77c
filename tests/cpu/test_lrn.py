"""fastalex.cpu.lrn against the float64 formula."""

import pytest
import torch
from tolerances import assert_matches

from fastalex import reference
from fastalex.cpu.lrn import lrn_bwd, lrn_fwd

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Every output starts as NaN; nothing may survive from it."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.device.type == "cpu" else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


def expected(x, grad, size, alpha, beta, k, groups=1):
    """y, dx and the sums of the absolute values behind dx, in float64."""
    wide = x.double().requires_grad_()
    y = reference.local_response_norm(wide, size, alpha, beta, k, groups=groups)
    y.backward(grad.double())
    assert wide.grad is not None
    # dx is a difference of two terms: with alpha, x and grad of one sign each, the second adds to the first
    channels = x.shape[1] // groups
    inside = x.double().unflatten(1, (groups, channels)).movedim(2, -1)
    gradient = grad.double().unflatten(1, (groups, channels)).movedim(2, -1)
    below, above = size // 2, (size - 1) // 2
    s = k + alpha / size * torch.nn.functional.pad(inside**2, (below, above)).unfold(-1, size, 1).sum(-1)
    terms = (gradient * inside / s ** (beta + 1)).abs()
    sums = torch.nn.functional.pad(terms, (above, below)).unfold(-1, size, 1).sum(-1)
    magnitude = (gradient / s**beta).abs() + 2 * abs(alpha * beta) / size * inside.abs() * sums
    return y.detach(), wide.grad, magnitude.movedim(-1, 2).flatten(1, 2)


def check(x, size, alpha, beta, k, groups=1):
    grad = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    y, dx, magnitude = expected(x, grad, size, alpha, beta, k, groups)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    actual_y = lrn_fwd(x, size, alpha, beta, k, groups)
    actual_dx = lrn_bwd(grad, x, size, alpha, beta, k, groups)
    assert actual_y.dtype == actual_dx.dtype == x.dtype
    assert_matches(actual_y, y, terms=size, compute_dtype=compute)
    assert_matches(actual_dx, dx, terms=2 * size, magnitude=magnitude, compute_dtype=compute)
    return actual_y, actual_dx


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 15, 40])
def test_sizes(size, dtype, channels_last):
    x = torch.randn(3, 17, 5, 7, dtype=torch.float64).mul(10).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y, dx = check(x, size, 0.5, 0.75, 2.0)
    assert y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6, 0.0, 1.3, -0.75])
@pytest.mark.parametrize("k", [2.0, 1.0, 1e-3, 0.0, -1e-3])
def test_powers(beta, k, dtype, channels_last):
    # away from zero, where k <= 0 leaves no positive base
    x = torch.rand(2, 12, 3, 5, dtype=dtype).add(0.5)
    check(x.to(memory_format=torch.channels_last) if channels_last else x, 5, 1.0, beta, k)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "shape", [(3, 96, 27, 29), (2, 256, 13, 13), (1, 2000, 9, 9), (40, 96, 1, 1), (2, 1, 300, 300)]
)
def test_runs_and_threads(shape, channels_last, threads):
    """Tensors of several strips, of rows longer than a strip, of several runs of pixels, and of one-pixel images."""
    x = torch.randn(shape).relu()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(x, 5, 5e-2, 0.75, 2.0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 12, 7), (2, 12, 5, 4), (2, 12, 3, 2, 4)])
def test_dimensions_and_groups(shape, groups):
    x = torch.randn(shape)
    check(x, 4, 1.0, 0.75, 1.0, groups)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    y, _ = check(last, 4, 1.0, 0.75, 1.0, groups)
    assert y.stride() == last.stride()


def test_views():
    x = torch.randn(2, 8, 9, 9)
    for view in (
        x[:, ::2],
        x[:, :, ::2, 1:],
        x.to(memory_format=torch.channels_last)[:, :5],
        x[:, :1].expand(2, 6, 9, 9),
    ):
        check(view, 5, 1.0, 0.75, 1.0)
    grad = torch.ones(()).expand(2, 8, 9, 9)
    assert torch.equal(lrn_bwd(grad, x, 5, 1.0, 0.75, 1.0), lrn_bwd(grad.contiguous(), x, 5, 1.0, 0.75, 1.0))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_empty(shape):
    assert lrn_fwd(torch.empty(shape), 5, 1.0, 0.75, 1.0).shape == shape
    assert lrn_bwd(torch.empty(shape), torch.empty(shape), 5, 1.0, 0.75, 1.0).shape == shape


@pytest.mark.parametrize("channels_last", [True, False])
def test_nan_and_infinity(channels_last):
    x = torch.randn(1, 9, 2, 2)
    x[0, 2, 0, 0], x[0, 4, 0, 1], x[0, 8, 1, 1] = torch.nan, torch.inf, -torch.inf
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    check(x, 3, 1.0, 0.75, 1.0)
    # k = 0 and a window of zeros is 0 / 0
    assert lrn_fwd(torch.zeros(1, 4, 2, 2), 3, 1.0, 0.75, 0.0).isnan().all()
    # a negative base has no real power
    assert lrn_fwd(torch.ones(1, 4, 2, 2), 3, 1.0, 0.75, -9.0).isnan().all()


@pytest.mark.parametrize("scale", [1, 30, 300])
def test_within_4e_7_of_the_maximum(scale):
    x = torch.randn(2, 96, 27, 27).mul(scale).relu().to(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    y, dx, _ = expected(x, grad, 5, 5e-4, 0.75, 2.0)
    assert (lrn_fwd(x, 5, 5e-4, 0.75, 2.0) - y).abs().max() <= 4e-7 * y.abs().max()
    assert (lrn_bwd(grad, x, 5, 5e-4, 0.75, 2.0) - dx).abs().max() <= 4e-7 * dx.abs().max()
