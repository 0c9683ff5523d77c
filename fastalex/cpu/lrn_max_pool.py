"""LRN and 3x3 max-pooling with stride 2, one image at a time: the normalised tensor exists for a moment, in cache.

What is pooled are the normalised values rounded to x's dtype, so the result equals pooling the output of
`lrn_fwd`, bit for bit.  Backward scatters the gradient of one block of images into a buffer, and normalises it
backwards from there.  With `after_relu` the codes carry the ReLU's mask: the maximum of a window is zero only where
all of x in it is zero, such a window receives no gradient, and the other term of the gradient has the factor x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalex import cpu
from fastalex.cpu.lrn import Normalisation
from fastalex.cpu.max_pool import (
    Windows,
    channels_last_scratch,
    empty_in_layout_of,
    images_per_block,
)
from fastalex.cpu.pieces import channel_blocks, pieces
from fastalex.kernels.geometry import dense, in_layout_of, is_channels_last

KERNEL_SIZE = (3, 3)
STRIDE = (2, 2)


def unsupported(
    x: Tensor, size: int, groups: int, kernel_size: tuple[int, int] = KERNEL_SIZE, stride: tuple[int, int] = STRIDE
) -> str | None:
    """Why `lrn_max_pool_fwd` cannot take these windows, or None if it can."""
    if kernel_size != KERNEL_SIZE or stride != STRIDE:
        return f"kernel_size must be {KERNEL_SIZE} and stride {STRIDE}, got {kernel_size} and {stride}"
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
    """max_pool(lrn(x)): (N, C, H, W) -> (N, C, OH, OW) and, with `codes`, the int8 window codes; x's memory format."""
    x = dense(x)
    images, channels, height, width = x.shape
    windows = Windows((height, width), KERNEL_SIZE, STRIDE)
    y = empty_in_layout_of(x, images, channels, *windows.output_size)
    found = torch.empty_like(y, dtype=torch.int8) if codes else None
    if x.numel() == 0:
        return y, found
    compiled = cpu.compiled_for(x)
    if compiled and beta == compiled.BETA:
        compiled.lrn_max_pool_fwd(x, y, found, size, alpha, k, groups, KERNEL_SIZE, STRIDE, after_relu)
        return y, found
    channels_last = is_channels_last(x)
    norm = Normalisation(channels // groups, 1, size, alpha, beta, k, x.dtype)
    step = images_per_block(channels * height * width)
    for first in range(0, images, step):
        block = slice(first, first + step)
        part = (
            x[block] if channels_last else channels_last_scratch("lrn pool x", x[block].shape, x.dtype).copy_(x[block])
        )
        normalised = channels_last_scratch("lrn pool y", part.shape, x.dtype)
        source, target = channel_blocks(part, groups), channel_blocks(normalised, groups)
        for start, stop, _ in pieces(source.shape[0], norm.rows_within):
            norm.forward(source[start:stop], target[start:stop])
        windows.pool(normalised, y[block], None if found is None else found[block], after_relu)
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
    bias_partials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The gradient of x, in its dtype and memory format; with `bias_partials` also its sums (N, C) over the pixels.

    `after_relu` as in the forward pass: where x is 0 the gradient is 0, and not NaN where a neighbour's is.
    """
    x = dense(x)
    dx = torch.empty_like(x)
    images, channels, height, width = x.shape
    channels_last = is_channels_last(x)
    norm = Normalisation(channels // groups, 1, size, alpha, beta, k, x.dtype)
    partials = torch.zeros(images, channels, dtype=norm.dtype)
    if x.numel() == 0:
        return (dx, partials) if bias_partials else dx
    grad, codes = in_layout_of(x, grad), in_layout_of(x, codes)
    compiled = cpu.compiled_for(x, grad)
    if compiled and beta == compiled.BETA:
        compiled.lrn_max_pool_bwd(grad, codes, x, dx, size, alpha, k, groups, KERNEL_SIZE, STRIDE, after_relu)
        if bias_partials:
            torch.sum(dx, (2, 3), dtype=norm.dtype, out=partials)
        return (dx, partials) if bias_partials else dx
    windows = Windows((height, width), KERNEL_SIZE, STRIDE)
    step = images_per_block(channels * height * width)
    for first in range(0, images, step):
        block = slice(first, first + step)
        part, part_grad, part_codes, target = x[block], grad[block], codes[block], dx[block]
        if not channels_last:
            part = channels_last_scratch("lrn pool x", part.shape, x.dtype).copy_(part)
            part_grad = channels_last_scratch("lrn pool grad", part_grad.shape, grad.dtype).copy_(part_grad)
            part_codes = channels_last_scratch("lrn pool codes", part_codes.shape, codes.dtype).copy_(part_codes)
            target = channels_last_scratch("lrn pool dx", part.shape, x.dtype)
        scattered = channels_last_scratch("lrn pool y", part.shape, norm.dtype)
        windows.scatter(part_grad, part_codes, scattered)
        above, source, below = (channel_blocks(t, groups) for t in (scattered, part, target))
        for start, stop, _ in pieces(source.shape[0], norm.rows_within):
            norm.backward(above[start:stop], source[start:stop], below[start:stop])
        if after_relu:
            torch.ops.aten.threshold_backward.grad_input(target, part, 0, grad_input=target)
        if not channels_last:
            dx[block].copy_(target)
        if bias_partials:
            torch.sum(target, (2, 3), dtype=norm.dtype, out=partials[block])
    return (dx, partials) if bias_partials else dx
