"""fastalex.cpu.lrn_max_pool against the two operations one after the other."""

import pytest
import torch

from fastalex.cpu.lrn import lrn_bwd, lrn_fwd
from fastalex.cpu.lrn_max_pool import lrn_max_pool_bwd, lrn_max_pool_fwd, unsupported
from fastalex.cpu.max_pool import max_pool_bwd, max_pool_fwd

GEOMETRY = (3, 3), (2, 2), (0, 0), (1, 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 96, 21, 19), (3, 12, 7, 3), (2, 7, 8, 8)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("after_relu", [True, False])
def test_equals_the_two_operations(after_relu, groups, shape, dtype, threads):
    if shape[1] % groups:
        groups = 7
    x = torch.randn(shape, dtype=torch.float64).to(dtype).to(memory_format=torch.channels_last)
    x = x.relu() if after_relu else x
    norm = 5, 0.5, 0.75, 2.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, codes = lrn_max_pool_fwd(x, *norm, groups=groups, after_relu=after_relu)
        wanted, wanted_codes = max_pool_fwd(lrn_fwd(x, *norm, groups), *GEOMETRY, False, after_relu=after_relu)
        assert torch.equal(y, wanted)
        assert torch.equal(codes, wanted_codes)
        assert y.stride() == wanted.stride()
        assert torch.equal(lrn_max_pool_fwd(x, *norm, groups=groups, codes=False)[0], wanted)
        grad = torch.randn(y.shape, dtype=torch.float64).to(dtype)
        dx = lrn_max_pool_bwd(grad, codes, x, *norm, groups=groups)
        # the gradient between the two is not rounded to the dtype here
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        between = max_pool_bwd(grad.to(compute), codes, shape[2:], *GEOMETRY)
        assert torch.equal(dx, lrn_bwd(between, x.to(compute), *norm, groups).to(dtype))
        assert dx.stride() == x.stride()
    finally:
        torch.set_num_threads(before)


def test_codes_carry_the_mask_of_the_relu():
    before_relu = torch.randn(2, 16, 13, 13).sub(1.5).to(memory_format=torch.channels_last).requires_grad_()
    x = before_relu.relu()
    y = torch.nn.functional.max_pool2d(torch.nn.functional.local_response_norm(x, 5, 0.5, 0.75, 2.0), 3, 2)
    grad = torch.randn_like(y)
    y.backward(grad)
    actual, codes = lrn_max_pool_fwd(x, 5, 0.5, 0.75, 2.0, after_relu=True)
    assert (actual == 0).any()
    dx = lrn_max_pool_bwd(grad, codes, x, 5, 0.5, 0.75, 2.0)
    torch.testing.assert_close(dx, before_relu.grad)
    assert (dx[x == 0] == 0).all()


def test_empty_batch_and_refusal():
    x = torch.empty(0, 4, 9, 9).to(memory_format=torch.channels_last)
    y, codes = lrn_max_pool_fwd(x, 5, 0.5, 0.75, 2.0)
    assert y.shape == codes.shape == (0, 4, 4, 4)
    assert lrn_max_pool_bwd(y, codes, x, 5, 0.5, 0.75, 2.0).shape == x.shape
    assert unsupported(x, 5, 1, (3, 3), (2, 2)) is None
    assert "kernel_size" in unsupported(x, 5, 1, (2, 2), (2, 2))
    contiguous = torch.randn(2, 4, 9, 9)
    assert unsupported(contiguous, 5, 1) == "x is not channels_last"
    with pytest.raises(ValueError, match=r"lrn_max_pool: x is not channels_last \(x has shape \(2, 4, 9, 9\)\)"):
        lrn_max_pool_fwd(contiguous, 5, 0.5, 0.75, 2.0)
