"""LRN and pooling in plain PyTorch, for a CPU without numba: right, and slow.

The same results through the same operators: window codes, their ties and NaN, and gradients from codes.  LRN computes
in float64 what is float64 and everything else in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import reference
from fastalex.kernels.geometry import MAX_CELLS, Pair, cell_code

Window = tuple[Pair, Pair, Pair, Pair]  # kernel size, stride, padding, dilation


def wide(x: Tensor) -> Tensor:
    return x.to(reference.sum_dtype(x.dtype))


def lrn(x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    return reference.local_response_norm(wide(x), size, alpha, beta, k, groups=groups)


def lrn_backward(grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    """The formula of `fastalex.cpu.lrn`."""
    grad, x = (wide(t).unflatten(1, (groups, -1)) for t in (grad, x))
    below, above = size // 2, (size - 1) // 2

    def sums(terms: Tensor, below: int, above: int) -> Tensor:
        return F.pad(terms.movedim(2, -1), (below, above)).unfold(-1, size, 1).sum(-1).movedim(-1, 2)

    s = k + alpha / size * sums(x * x, below, above)
    direct = grad / s**beta
    return (direct - 2 * alpha * beta / size * x * sums(x / s * direct, above, below)).flatten(1, 2)


def max_pool(x: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """The maxima and their codes."""
    output, cells, _ = reference.pooled_cells(x, *window, ceil_mode)
    return output, torch.tensor(codes_of_cells(window[0]), dtype=torch.int8)[cells]


def max_pool_backward(grad: Tensor, codes: Tensor, input_size: Pair, window: Window) -> Tensor:
    height, width = input_size
    rows, columns = named_pixels(codes, *window)
    nowhere = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
    places = (rows * width + columns).masked_fill(nowhere, 0)
    dx = wide(grad).new_zeros((*codes.shape[:2], height * width))
    return dx.scatter_add_(2, places.flatten(2), wide(grad).masked_fill(nowhere, 0).flatten(2)).unflatten(2, input_size)


def max_pool_indices(
    codes: Tensor, input_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """torch's indices h * W + w of the input plane, int64, in the codes' memory format; -1 for the code of no cell."""
    rows, columns = named_pixels(codes, kernel_size, stride, padding, dilation)
    return (rows * input_size[1] + columns).clamp_min(-1)


def named_pixels(
    codes: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Row and column of the input that each code names; far above it for the code of no cell."""
    row_of, column_of = torch.full((MAX_CELLS + 1,), -(2**40)), torch.zeros(MAX_CELLS + 1, dtype=torch.int64)
    for cell, code in enumerate(codes_of_cells(kernel_size)):
        row_of[code], column_of[code] = cell // kernel_size[1] * dilation[0], cell % kernel_size[1] * dilation[1]
    tops = torch.arange(codes.shape[2])[:, None] * stride[0] - padding[0]
    lefts = torch.arange(codes.shape[3]) * stride[1] - padding[1]
    return tops + row_of[codes.int()], lefts + column_of[codes.int()]


def codes_of_cells(kernel_size: Pair) -> list[int]:
    """In row-major order."""
    return [cell_code(r, s, *kernel_size) for r in range(kernel_size[0]) for s in range(kernel_size[1])]
