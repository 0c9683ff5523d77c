"""Max-pooling with the window codes of `fastalex.kernels.geometry`, one byte each."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalex import cpu
from fastalex.cpu import formulas
from fastalex.cpu.formulas import max_pool_indices
from fastalex.kernels.geometry import (
    Pair,
    dense,
    in_layout_of,
    is_channels_last,
    memory_format,
    no_cell,
    output_size,
)

__all__ = ["max_pool_bwd", "max_pool_fwd", "max_pool_indices"]


@torch.no_grad()
def max_pool_fwd(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    *,
    codes: bool = True,
    after_relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(N, C, H, W) -> the maxima (N, C, OH, OW) and, with `codes`, the int8 code of each window's maximum.

    Both in x's memory format.  Ties and NaN as in torch.nn.functional.max_pool2d.  `after_relu` promises that x is
    not negative: windows with maximum 0 then get the code that matches no cell.
    """
    x = dense(x)
    # without codes PyTorch's loop takes 0.85 of ours' time
    if x.numel() == 0 or (not codes and is_channels_last(x)):
        y = torch.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
        return y, torch.empty_like(y, dtype=torch.int8) if codes else None
    loops = cpu.compiled_loops()
    if x.dtype == torch.float16 and loops is not None:
        options = {"codes": codes, "after_relu": after_relu}
        y, found = max_pool_fwd(x.float(), kernel_size, stride, padding, dilation, ceil_mode, **options)
        return y.half(), found
    window = kernel_size, stride, padding, dilation
    output = output_size(x.shape[2:], *window, ceil_mode)
    y = torch.empty((*x.shape[:2], *output), dtype=x.dtype, memory_format=memory_format(x))
    found = torch.empty_like(y, dtype=torch.int8) if codes else None
    if loops is None:
        maxima, cells = formulas.max_pool(x, window, ceil_mode)
        if found is not None:
            found.copy_(cells.masked_fill(maxima == 0, no_cell(*kernel_size)) if after_relu else cells)
        return y.copy_(maxima), found
    tensors = x, y, y.new_empty((0, 0, 0, 0), dtype=torch.int8) if found is None else found
    arguments = window, code_table(kernel_size), no_cell(*kernel_size) if after_relu else 0
    if is_channels_last(x) and is_channels_last(y):  # memory of one pixel per image is in both layouts
        geometry = plane_of(x), plane_of(y), x.shape[1]
        rows, arrays = y.shape[0] * y.shape[2], [loops.array(t) for t in tensors]
        loops.share(loops.max_pool_kernel, rows, x.numel(), *arrays, *geometry, *arguments)
    else:
        _over_planes(loops.max_pool_planes_kernel, tensors, *arguments)
    return y, found


@torch.no_grad()
def max_pool_bwd(
    grad: Tensor, codes: Tensor, input_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The gradient (N, C, *input_size) of `max_pool_fwd`'s input, in grad's dtype and the codes' memory format.

    Overlapping windows are summed in fp32 (fp64 for fp64).
    """
    window = kernel_size, stride, padding, dilation
    loops = cpu.compiled_loops()
    if grad.dtype == torch.float16 and loops is not None:
        return max_pool_bwd(grad.float(), codes, input_size, *window).half()
    codes = dense(codes)
    grad = in_layout_of(codes, grad)
    shape = (*codes.shape[:2], *input_size)
    dx = torch.empty(shape, dtype=grad.dtype, memory_format=memory_format(codes))
    if dx.numel() == 0 or codes.numel() == 0:
        return dx.zero_()
    if loops is None:
        return dx.copy_(formulas.max_pool_backward(grad, codes, input_size, window))
    tensors, arguments = (grad, codes, dx), (window, code_table(kernel_size))
    if is_channels_last(codes) and is_channels_last(dx):
        geometry = plane_of(dx), plane_of(codes), dx.shape[1]
        rows, arrays = dx.shape[0] * dx.shape[2], [loops.array(t) for t in tensors]
        loops.share(loops.max_pool_backward_kernel, rows, dx.numel(), *arrays, *geometry, *arguments)
    else:
        _over_planes(loops.max_pool_planes_backward_kernel, tensors, *arguments)
    return dx


def _over_planes(kernel: Any, tensors: tuple[Tensor, ...], *arguments: Any) -> None:
    loops = cpu.compiled_loops()
    assert loops is not None
    planes = [loops.array(t).reshape(t.shape[0] * t.shape[1], *t.shape[2:]) for t in tensors]
    loops.share(kernel, len(planes[0]), max(t.numel() for t in tensors), *planes, *arguments)


def plane_of(x: Tensor) -> Pair:
    """Height and width."""
    return x.shape[2], x.shape[3]


@lru_cache(maxsize=64)
def code_table(kernel_size: Pair) -> np.ndarray:
    return np.array(formulas.codes_of_cells(kernel_size), np.int8).reshape(kernel_size)
