"""LRN and 3x3 max-pooling with stride 2: the normalised tensor exists for some rows, in cache.

What is pooled are the normalised values rounded to x's dtype, so the result equals pooling the output of
`lrn_fwd`, bit for bit.  Backward gathers the gradient of a few pixels and normalises it backwards from there.
With `after_relu` the codes carry the ReLU's mask: the maximum of a window is zero only where all of x in it is zero,
such a window receives no gradient, and the other term of the gradient has the factor x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalex import cpu
from fastalex.cpu.lrn import lrn_bwd, lrn_fwd, norm_of, numbers_of
from fastalex.cpu.max_pool import code_table, max_pool_bwd, max_pool_fwd, plane_of
from fastalex.kernels.geometry import Pair, dense, in_layout_of, is_channels_last, no_cell, output_size
from fastalex.reference import sum_dtype

KERNEL_SIZE = (3, 3)
STRIDE = (2, 2)
WINDOW = KERNEL_SIZE, STRIDE, (0, 0), (1, 1)
# Other dtypes take the two operations one after the other: the loops compile for a second each.
FUSED = (torch.float32, torch.bfloat16)


def unsupported(
    x: Tensor, size: int, groups: int, kernel_size: Pair = KERNEL_SIZE, stride: Pair = STRIDE
) -> str | None:
    """Why `lrn_max_pool_fwd` cannot take this tensor and these windows, or None if it can."""
    if kernel_size != KERNEL_SIZE or stride != STRIDE:
        return f"kernel_size must be {KERNEL_SIZE} and stride {STRIDE}, got {kernel_size} and {stride}"
    if not is_channels_last(x):
        return "x is not channels_last"
    return None


@torch.no_grad()
def lrn_max_pool_fwd(
    x: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    *,
    groups: int = 1,
    after_relu: bool = False,
    codes: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """max_pool(lrn(x)): (N, C, H, W) -> (N, C, OH, OW) and, with `codes`, the int8 window codes; all channels_last.

    Raises ValueError where x is not channels_last.
    """
    x = _checked(x, size, groups)
    loops = cpu.compiled_loops()
    if loops is None or x.dtype not in FUSED:
        normalised = lrn_fwd(x, size, alpha, beta, k, groups)
        return max_pool_fwd(normalised, *WINDOW, False, codes=codes, after_relu=after_relu)
    output = output_size(x.shape[2:], KERNEL_SIZE, STRIDE)
    y = torch.empty((*x.shape[:2], *output), dtype=x.dtype, memory_format=torch.channels_last)
    found = torch.empty_like(y, dtype=torch.int8) if codes else None
    if x.numel():
        loops.share(
            loops.lrn_max_pool_kernel,
            y.shape[0] * y.shape[2],
            x.numel(),
            loops.array(x).reshape(-1, x.shape[1] // groups),
            loops.array(y),
            loops.array(y.new_empty(0, dtype=torch.int8) if found is None else found),
            *(plane_of(x), plane_of(y), x.shape[1], groups),
            *(norm_of(size, x.shape[1] // groups), numbers_of(x, size, alpha, beta, k)),
            *(KERNEL_SIZE, STRIDE, code_table(KERNEL_SIZE), no_cell(*KERNEL_SIZE) if after_relu else 0),
        )
    return y, found


@torch.no_grad()
def lrn_max_pool_bwd(
    grad: Tensor,
    codes: Tensor,
    x: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    *,
    groups: int = 1,
    after_relu: bool = False,
) -> Tensor:
    """The gradient of x, in its dtype and memory format.

    `after_relu` as in the forward pass: where x is 0 the gradient is 0, and not NaN where a neighbour's is.
    """
    x = _checked(x, size, groups)
    dx = torch.empty_like(x)
    compute = sum_dtype(x.dtype)
    loops = cpu.compiled_loops()
    if loops is None or x.dtype not in FUSED:
        between = max_pool_bwd(grad.to(compute), codes, plane_of(x), *WINDOW)
        dx.copy_(lrn_bwd(between, x.to(compute), size, alpha, beta, k, groups))
        dx = torch.ops.aten.threshold_backward(dx, x, 0) if after_relu else dx
    elif x.numel():
        inside = x.shape[1] // groups
        loops.share(
            loops.lrn_max_pool_backward_kernel,
            x.shape[0] * x.shape[2],
            x.numel(),
            *(loops.array(in_layout_of(x, grad)), loops.array(in_layout_of(x, codes))),
            *(loops.array(x).reshape(-1, inside), loops.array(dx).reshape(-1, inside)),
            *(plane_of(x), plane_of(grad), x.shape[1], groups),
            *(norm_of(size, inside), numbers_of(x, size, alpha, beta, k), WINDOW, code_table(KERNEL_SIZE), after_relu),
        )
    return dx


def _checked(x: Tensor, size: int, groups: int) -> Tensor:
    x = dense(x)
    reason = unsupported(x, size, groups)
    if reason is not None:
        raise ValueError(f"lrn_max_pool: {reason} (x has shape {tuple(x.shape)})")
    return x
