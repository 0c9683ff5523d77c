"""The two gradients of a convolution, batch-tiled: a tile's rows are images at one pixel.

    dx[n, c, h, w]  = sum over taps (r, s) and k of grad[n, k, oh, ow] * weight[k, c, r, s]
    dw[k, c, r, s]  = sum over images n and outputs (oh, ow) of grad[n, k, oh, ow] * x[n, c, h, w]
    with h = oh * stride - top + r * dilation, and w likewise

All images of a tile share the pixel, so which taps fall on an output (dx), and which outputs see the image (dw), is a
range of integers per program: nothing is masked in the loops and no product with padding is computed (13x13, 3x3,
padding 1: 10 % fewer).  Everything is read as it lies in channels_last memory; sums are fp32, in a fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .geometry import output_size
from .implicit_gemm import (
    NARROWEST,
    capability,
    descriptor,
    multiply_add,
    next_step,
    split_tile,
    tap_range,
)
from .registers import DTYPES, interpreting, warps
from .relu_bias_grad import masked


@dataclass(frozen=True)
class Tile:
    """rows x (columns[0] + columns[1]) results per program, `depth` terms of the sum per step."""

    rows: int
    columns: tuple[int, int]
    depth: int
    num_warps: int
    num_stages: int = 3
    warp_specialize: bool = False


# Programs of the weight gradient, two waves on 132 multiprocessors; the sum over outputs and images is split for it.
PROGRAMS = 264
# Steps of a part: 16 of 64 images for 128x128 results take longer than writing and reading the results in fp32.
MIN_STEPS = 16
# Columns that the epilogue handles at once behind descriptors.  With 256 rows and 8 warps that is 32 sums per thread;
# 64 spill on sm_100 when warps are specialised, which leaves 168 registers.
SLICE = 32
THREADS = 128
SUM_BLOCK = 1024


@triton.constexpr_function
def gcd(a, b):
    while b:
        a, b = b, a % b
    return a


@triton.jit
def taps_on_outputs(
    pixel, outputs, TAPS: tl.constexpr, BEFORE: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr
):
    """(first, count) of the taps r, STRIDE // gcd(STRIDE, DILATION) apart, for which (pixel + BEFORE - r * DILATION)
    is STRIDE times an output's number."""
    STEP: tl.constexpr = STRIDE // gcd(STRIDE, DILATION)
    reach = pixel + BEFORE
    first = max(0, (reach - (outputs - 1) * STRIDE + DILATION - 1) // DILATION)
    for _ in tl.static_range(STEP - 1):
        first = tl.where((reach - first * DILATION) % STRIDE == 0, first, first + 1)
    count = (min(TAPS, reach // DILATION + 1) - first + STEP - 1) // STEP
    if STRIDE > 1:
        count = tl.where((reach - first * DILATION) % STRIDE == 0, count, 0)
    return first, max(count, 0)


@triton.jit
def finish_input_grad(
    total, dx, y, partials, first, images, plane, position, channel,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Mask a tile of dx with y, store it, and its sums over the images to `partials`, the group's row of them.

    In slices of SLICE columns: the whole of a large tile, its mask and its sums do not fit into registers.
    """
    if COLUMNS > SLICE:
        left, right = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
        finish_input_grad(
            left, dx, y, partials, first, images, plane, position, channel, C, ROWS, COLUMNS // 2, SLICE, DESCRIPTORS
        )
        finish_input_grad(
            right, dx, y, partials, first, images, plane, position, channel + COLUMNS // 2,
            C, ROWS, COLUMNS // 2, SLICE, DESCRIPTORS,
        )  # fmt: skip
    else:
        image = first + tl.arange(0, ROWS)
        c = channel + tl.arange(0, COLUMNS)
        inside = (image < images)[:, None] & (c < C)[None, :]
        offset = image.to(tl.int64)[:, None] * plane + (position + c)[None, :]
        if y is not None:
            if DESCRIPTORS:
                below = y.load([first, position + channel])
            else:
                below = tl.load(y + offset, mask=inside, other=0.0)
            # also rows behind the last image, where y reads as 0
            total = masked(total, below, 1.0)
        if partials is not None:
            if y is None:
                total = tl.where((image < images)[:, None], total, 0.0)
            tl.store(partials + c, tl.sum(total, 0), mask=c < C)
        if DESCRIPTORS:
            dx.store([first, position + channel], total.to(dx.dtype))
        else:
            tl.store(dx + offset, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def conv_input_grad_kernel(
    grad,  # (N, OH, OW, GROUPS * K): pointer, or descriptor of (N, OH * OW * GROUPS * K)
    weight,  # (GROUPS * K, R, S, C), or (GROUPS * C, R, S, K) if TRANSPOSED: pointer, or descriptor of its rows
    weight_tail,  # the descriptor for TAIL columns
    dx,  # (N, H, W, GROUPS * C): pointer, or descriptor of (N, H * W * GROUPS * C), SLICE columns
    y,  # as dx, or None
    partials,  # image blocks * H * W rows of GROUPS * C, fp32, or None
    images,
    height,
    width,
    out_height,
    out_width,
    C: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SLICE: tl.constexpr,  # columns at a time behind the loop
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program makes ROWS images x (COLUMNS + TAIL) channels of one pixel.

    Neighbours share the images and the pixel, then the pixel, then the weight.  One loop runs over taps and blocks of
    DEPTH output channels, so that the pipeline never drains between taps.
    """
    WIDTH: tl.constexpr = COLUMNS + TAIL
    tiles: tl.constexpr = (C + WIDTH - 1) // WIDTH
    row = tl.program_id(0) // (tiles * GROUPS)
    column = tl.program_id(0) % (tiles * GROUPS)
    group = column // tiles
    channel = column % tiles * WIDTH  # within the group
    blocks = tl.cdiv(images, ROWS)
    pixel = row // blocks
    first = (row - pixel * blocks) * ROWS
    h = pixel // width
    w = pixel - h * width
    r0, rows = taps_on_outputs(h, out_height, R, TOP, STRIDE_H, DILATION_H)
    s0, columns = taps_on_outputs(w, out_width, S, LEFT, STRIDE_W, DILATION_W)
    R_STEP: tl.constexpr = STRIDE_H // gcd(STRIDE_H, DILATION_H)
    S_STEP: tl.constexpr = STRIDE_W // gcd(STRIDE_W, DILATION_W)
    s_stop = s0 + columns * S_STEP
    BLOCKS: tl.constexpr = (K + DEPTH - 1) // DEPTH
    # strides of the weight
    K_STRIDE: tl.constexpr = 1 if TRANSPOSED else R * S * C
    C_STRIDE: tl.constexpr = R * S * K if TRANSPOSED else 1
    TAP: tl.constexpr = K if TRANSPOSED else C
    ORIGIN: tl.constexpr = C if TRANSPOSED else K  # rows of the weight per group

    k = tl.arange(0, DEPTH)
    if not DESCRIPTORS:
        # rows behind the last image read it again: cheaper than a mask
        image = tl.minimum(first + tl.arange(0, ROWS), images - 1)
        grad_at = grad + image.to(tl.int64)[:, None] * (out_height * out_width * K * GROUPS)
        grad_at += (group * K + k)[None, :]
        c = channel + tl.arange(0, COLUMNS)
        weight += group * ORIGIN * R * S * TAP
        weight_at = weight + k[:, None] * K_STRIDE + c[None, :] * C_STRIDE
        if TAIL > 0:
            c_tail = channel + COLUMNS + tl.arange(0, TAIL)
            tail_at = weight + k[:, None] * K_STRIDE + c_tail[None, :] * C_STRIDE
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if TAIL > 0:
        total_tail = tl.zeros([ROWS, TAIL], tl.float32)
    r = r0
    s = s0
    k0 = 0
    for _ in tl.range(0, rows * columns * BLOCKS, warp_specialize=WARP_SPECIALIZE):
        oh = (h + TOP - r * DILATION_H) // STRIDE_H
        ow = (w + LEFT - s * DILATION_W) // STRIDE_W
        grad_offset = (oh * out_width + ow) * (K * GROUPS) + k0
        tap = (r * S + s) * TAP
        if DESCRIPTORS:
            a = grad.load([first, grad_offset + group * K])
            if TRANSPOSED:
                b = weight.load([group * C + channel, tap + k0]).T
            else:
                b = weight.load([group * K + k0, tap + channel])
        else:
            a = tl.load(
                grad_at + grad_offset,
                mask=(k < K - k0)[None, :] if K % DEPTH != 0 else None,
                other=0.0 if K % DEPTH != 0 else None,
            )
            b = tl.load(
                weight_at + (tap + k0 * K_STRIDE),
                mask=(k < K - k0)[:, None] & (c < C)[None, :] if K % DEPTH != 0 or C % WIDTH != 0 else None,
                other=0.0 if K % DEPTH != 0 or C % WIDTH != 0 else None,
            )
        total = multiply_add(a, b, total, PRECISION, WIDEN)
        if TAIL > 0:
            if DESCRIPTORS:
                if TRANSPOSED:
                    b_tail = weight_tail.load([group * C + channel + COLUMNS, tap + k0]).T
                else:
                    b_tail = weight_tail.load([group * K + k0, tap + channel + COLUMNS])
            else:
                b_tail = tl.load(
                    tail_at + (tap + k0 * K_STRIDE),
                    mask=(k < K - k0)[:, None] & (c_tail < C)[None, :] if K % DEPTH != 0 or C % WIDTH != 0 else None,
                    other=0.0 if K % DEPTH != 0 or C % WIDTH != 0 else None,
                )
            total_tail = multiply_add(a, b_tail, total_tail, PRECISION, WIDEN)
        r, s, k0 = next_step(r, s, k0, s0, s_stop, K, DEPTH, R_STEP, S_STEP)

    plane = height * width * (C * GROUPS)
    position = pixel * (C * GROUPS) + group * C
    if partials is not None:
        partials += row.to(tl.int64) * (C * GROUPS) + group * C
    finish_input_grad(
        total, dx, y, partials, first, images, plane, position, channel, C, ROWS, COLUMNS, SLICE, DESCRIPTORS
    )
    if TAIL > 0:
        finish_input_grad(
            total_tail, dx, y, partials, first, images, plane, position, channel + COLUMNS,
            C, ROWS, TAIL, SLICE, DESCRIPTORS,
        )  # fmt: skip


@triton.jit
def conv_weight_grad_kernel(
    grad,  # (N, OH, OW, GROUPS * K): pointer, or descriptor of (N, OH * OW * GROUPS * K)
    x,  # (N, H, W, GROUPS * C): pointer, or descriptor of (N, H * W * GROUPS * C)
    x_tail,  # the descriptor for TAIL columns
    out_ptr,  # (SPLITS, GROUPS * K, R, S, C): fp32 partial sums, or the gradient itself if SPLITS is 1
    images,
    height,
    width,
    out_height,
    out_width,
    C: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,  # whether DEPTH divides the images
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program makes ROWS output channels x (COLUMNS + TAIL) input channels of one tap, over one of SPLITS parts of
    the outputs that see the image under this tap, times the blocks of DEPTH images."""
    WIDTH: tl.constexpr = COLUMNS + TAIL
    row_tiles: tl.constexpr = (K + ROWS - 1) // ROWS
    tiles: tl.constexpr = (C + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    row = program % row_tiles * ROWS
    program = program // row_tiles
    column = program % tiles * WIDTH
    program = program // tiles
    tap = program % (R * S)
    program = program // (R * S)
    group = program % GROUPS
    split = program // GROUPS

    r = tap // S
    s = tap % S
    # the outputs whose pixel under this tap lies in the image
    oh0, oh_stop = tap_range(r * DILATION_H - TOP, height, out_height, STRIDE_H)
    ow0, ow_stop = tap_range(s * DILATION_W - LEFT, width, out_width, STRIDE_W)
    blocks = tl.cdiv(images, DEPTH)
    steps = (oh_stop - oh0) * (ow_stop - ow0) * blocks
    share = tl.cdiv(steps, SPLITS)
    start = tl.minimum(split * share, steps)
    stop = tl.minimum(start + share, steps)
    output = start // blocks
    block = start - output * blocks
    columns = tl.maximum(ow_stop - ow0, 1)
    oh = oh0 + output // columns
    ow = ow0 + output % columns

    image = tl.arange(0, DEPTH)
    k = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    c_tail = column + COLUMNS + tl.arange(0, TAIL if TAIL > 0 else 1)
    grad_plane = out_height * out_width * (K * GROUPS)
    x_plane = height * width * (C * GROUPS)
    if not DESCRIPTORS:
        grad_at = grad + image.to(tl.int64)[None, :] * grad_plane + (group * K + k)[:, None]
        x_at = x + image.to(tl.int64)[:, None] * x_plane + (group * C + c)[None, :]
        if TAIL > 0:
            tail_at = x + image.to(tl.int64)[:, None] * x_plane + (group * C + c_tail)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if TAIL > 0:
        total_tail = tl.zeros([ROWS, TAIL], tl.float32)
    for _ in tl.range(start, stop, warp_specialize=WARP_SPECIALIZE):
        h = oh * STRIDE_H - TOP + r * DILATION_H
        w = ow * STRIDE_W - LEFT + s * DILATION_W
        grad_offset = (oh * out_width + ow) * (K * GROUPS)
        x_offset = (h * width + w) * (C * GROUPS)
        if DESCRIPTORS:
            a = grad.load([block * DEPTH, grad_offset + group * K + row]).T
            b = x.load([block * DEPTH, x_offset + group * C + column])
        else:
            a_at = grad_at + (block.to(tl.int64) * DEPTH * grad_plane + grad_offset)
            b_at = x_at + (block.to(tl.int64) * DEPTH * x_plane + x_offset)
            here = image < images - block * DEPTH
            if not EVEN:
                a = tl.load(a_at, mask=here[None, :] & (k < K)[:, None], other=0.0)
                b = tl.load(b_at, mask=here[:, None] & (c < C)[None, :], other=0.0)
            else:
                # rows and columns behind the last channel are not stored, whatever they hold
                a = tl.load(a_at, mask=(k < K)[:, None] if K % ROWS != 0 else None)
                b = tl.load(b_at, mask=(c < C)[None, :] if C % WIDTH != 0 else None)
        total = multiply_add(a, b, total, PRECISION, WIDEN)
        if TAIL > 0:
            if DESCRIPTORS:
                b_tail = x_tail.load([block * DEPTH, x_offset + group * C + column + COLUMNS])
            else:
                b_tail_at = tail_at + (block.to(tl.int64) * DEPTH * x_plane + x_offset)
                if not EVEN:
                    b_tail = tl.load(b_tail_at, mask=here[:, None] & (c_tail < C)[None, :], other=0.0)
                else:
                    b_tail = tl.load(b_tail_at, mask=(c_tail < C)[None, :] if C % WIDTH != 0 else None)
            total_tail = multiply_add(a, b_tail, total_tail, PRECISION, WIDEN)
        oh, ow, block = next_step(oh, ow, block, ow0, ow_stop, blocks, 1)

    to_row = out_ptr + ((split.to(tl.int64) * GROUPS + group) * K + k)[:, None] * (R * S * C) + tap * C
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(to_row + c[None, :], out, mask=(k < K)[:, None] & (c < C)[None, :])
    if TAIL > 0:
        out_tail = total_tail.to(out_ptr.dtype.element_ty)
        tl.store(to_row + c_tail[None, :], out_tail, mask=(k < K)[:, None] & (c_tail < C)[None, :])


@triton.jit
def sum_splits_kernel(
    partials_ptr,  # SPLITS x count, fp32
    out_ptr,  # count
    count,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over the splits, from the first to the last."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    at = partials_ptr + index
    for _ in range(SPLITS):
        total += tl.load(at, mask=index < count, other=0.0)
        at += count
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=index < count)


def power_of_2(value, highest):
    """The power of 2 at or above value, between the narrowest tile and `highest`."""
    return min(max(triton.next_power_of_2(value), NARROWEST), highest)


def dividing_power_of_2(value, highest):
    """The largest power of 2 that divides value, between the narrowest tile and `highest`."""
    return min(max(value & -value, NARROWEST), highest)


def depth_limit(dtype, precision):
    """128 bytes, the widest row of shared memory that a tensor core reads; 64 for fp32 units, which need fewer."""
    if dtype == torch.float32 and precision == "ieee":
        return 16
    return 128 // dtype.itemsize


def tile_warps(rows, columns, depth, dtype):
    """8 warps for large tiles, unless that leaves a thread less than 16 bytes of the narrower operand to copy."""
    narrow = depth * (columns[1] or columns[0]) * dtype.itemsize
    return 8 if rows * sum(columns) >= 128 * 96 and narrow >= 8 * 32 * 16 else 4


def make_tile(rows, columns, depth, dtype, descriptors):
    """The tile, and what the target makes of it."""
    target = capability()
    # 192 columns fill the registers of a warp and the 64 KB of an AMD workgroup: shorter steps, more in flight
    crowded = sum(columns) > 128 and target < 90 and dtype.itemsize == 2
    if crowded:
        depth = min(depth, 32)
    return Tile(
        rows,
        columns,
        depth,
        tile_warps(rows, columns, depth, dtype),
        4 if crowded else 3,
        # copies and products in warps of their own: 62 instead of 115 instructions a step.  The compiler crashes over
        # it on sm_90 with 4 warps, and on sm_100 for products too small for tensor memory (Triton 3.8)
        descriptors and target == 100 and rows >= 64,
    )


def input_grad_tile(images, channels, outputs, dtype, descriptors, precision):
    """The tile of conv_input_grad for `channels` input and `outputs` output channels per group."""
    large = descriptors and dtype.itemsize == 2 and capability() in (90, 100)
    # by powers of two: what is compiled does not depend on the exact batch
    rows = power_of_2(images, 256 if large else 128)
    depth = dividing_power_of_2(outputs, depth_limit(dtype, precision))
    return make_tile(rows, split_tile(channels, 128), depth, dtype, descriptors)


def weight_grad_tile(images, channels, outputs, dtype, descriptors, precision):
    """The tile of conv_weight_grad for `channels` input and `outputs` output channels per group."""
    rows = dividing_power_of_2(outputs, 128) if outputs % NARROWEST == 0 else power_of_2(outputs, 64)
    if outputs > 32 and capability() in (90, 100):
        # less goes to the matrix instructions of sm_80, at half the speed or less: padding 96 to 128 costs a quarter
        rows = max(rows, 64)
    depth = power_of_2(images, depth_limit(dtype, precision))
    return make_tile(rows, split_tile(channels, 128), depth, dtype, descriptors)


def packed(t):
    """t in (N, H, W, C) order, copied unless it lies like that."""
    return t.movedim(1, -1).contiguous()


def constants(tile, c, k, groups, kernel_size, stride, padding, dilation, descriptors, precision, dtype):
    """The constants that both kernels have."""
    return {
        "C": c,
        "K": k,
        "GROUPS": groups,
        "R": kernel_size[0],
        "S": kernel_size[1],
        "TOP": padding[0][0],
        "LEFT": padding[1][0],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "ROWS": tile.rows,
        "COLUMNS": tile.columns[0],
        "TAIL": tile.columns[1],
        "DEPTH": tile.depth,
        "DESCRIPTORS": descriptors,
        "WARP_SPECIALIZE": tile.warp_specialize,
        "PRECISION": precision,
        "WIDEN": interpreting() and dtype == torch.bfloat16,
        "num_warps": warps(tile.num_warps * 32),
        "num_stages": tile.num_stages,
    }


def unsupported(grad, other, name, channels, kernel_size, stride, padding, dilation, groups, descriptors, precision):
    """What both kernels refuse, or None.  `channels` are the input channels per group."""
    for t, of in ((grad, "grad"), (other, name)):
        if t.dim() != 4:
            return f"{of} must have 4 dimensions, got shape {tuple(t.shape)}"
        if t.dtype not in DTYPES:
            return f"{of} must be fp16, bf16 or fp32, got {t.dtype}"
    if grad.dtype != other.dtype:
        return f"grad must have the dtype of {name}, {other.dtype}, got {grad.dtype}"
    if groups < 1 or min(*stride, *dilation, *kernel_size) < 1:
        return (
            f"kernel_size, stride, dilation and groups must be at least 1, got {tuple(kernel_size)}, {tuple(stride)}, "
            f"{tuple(dilation)} and {groups}"
        )
    if min(min(side) for side in padding) < 0:
        return f"padding must not be negative, got {padding}"
    if grad.shape[1] % groups:
        return f"grad must have a multiple of {groups} groups as channels, got {grad.shape[1]}"
    # offsets within an image and within the weight are 32-bit
    if max(grad[:1].numel(), grad.shape[1] * channels * kernel_size[0] * kernel_size[1]) >= 2**31:
        return f"an image of grad and the weight must have less than 2^31 elements, got {tuple(grad.shape)} of grad"
    if descriptors:
        if capability() == 0:
            return "descriptors need an NVIDIA GPU"
        if grad.dtype == torch.float32 and precision == "ieee":
            return "descriptors need fp16, bf16 or tf32; fp32 products spill registers with them"
        for count in (channels, grad.shape[1] // groups):
            if count % NARROWEST:
                return f"descriptors need channels per group in multiples of {NARROWEST}, got {count}"
        for t, of in ((grad, "grad"), (other, name)):
            if t.storage_offset() * t.element_size() % 16:
                return f"descriptors need {of} to start at a multiple of 16 bytes, got offset {t.storage_offset()}"
    return None


def unsupported_input_grad(grad, weight, stride, padding, dilation, groups, *, descriptors=False, precision="ieee"):
    """Why conv_input_grad does not take these arguments, or None if it does."""
    channels, *kernel_size = weight.shape[1:] if weight.dim() == 4 else (0, 1, 1)
    reason = unsupported(
        grad, weight, "weight", channels, kernel_size, stride, padding, dilation, groups, descriptors, precision
    )
    if reason:
        return reason
    if grad.shape[1] != weight.shape[0]:
        return f"grad must have a channel per filter of weight, {weight.shape[0]}, got {grad.shape[1]}"
    return None


def unsupported_weight_grad(
    grad, x, kernel_size, stride, padding, dilation, groups, *, descriptors=False, precision="ieee"
):
    """Why conv_weight_grad does not take these arguments, or None if it does."""
    channels = x.shape[1] // max(groups, 1) if x.dim() == 4 else 0
    reason = unsupported(grad, x, "x", channels, kernel_size, stride, padding, dilation, groups, descriptors, precision)
    if reason:
        return reason
    if x.shape[1] % groups:
        return f"x must have a multiple of {groups} groups as channels, got {x.shape[1]}"
    if x[:1].numel() >= 2**31:
        return f"an image of x must have less than 2^31 elements, got shape {tuple(x.shape)}"
    return None


def check_sizes(grad, images, input_size, kernel_size, stride, padding, dilation):
    expected = output_size(input_size, kernel_size, stride, padding, dilation)
    if (grad.shape[0], *grad.shape[2:]) != (images, *expected):
        raise ValueError(
            f"grad must have shape {(images, grad.shape[1], *expected)} for an input of {tuple(input_size)} and a "
            f"kernel of {tuple(kernel_size)}, got {tuple(grad.shape)}"
        )


def check_precision(precision):
    if precision not in ("ieee", "tf32"):
        raise ValueError(f'precision must be "ieee" or "tf32", got {precision!r}')


def conv_input_grad(
    grad,
    weight,
    input_size,
    stride=(1, 1),
    padding=((0, 0), (0, 0)),
    dilation=(1, 1),
    groups=1,
    *,
    relu_output=None,
    bias_partials=False,
    descriptors=False,
    precision="ieee",
):
    """The gradient of a convolution with respect to its input, and the backward of a ReLU below it.

    grad: (N, K, OH, OW), fp16, bf16 or fp32; weight: (K, C / groups, R, S), same dtype; input_size: (H, W);
    padding: ((top, bottom), (left, right)).  channels_last memory is read in place, anything else is copied to it.

    relu_output: the input of this convolution, (N, C, H, W), if it is a ReLU's output: dx is 0 where it is <= 0
    (torch's threshold_backward: a NaN passes).  bias_partials: also return fp32 (P, C), whose `sum_partials` is the
    sum of dx over images and pixels, taken before dx is rounded: the bias gradient of the layer below.

    descriptors: copy tiles by the tensor memory accelerator, for sm_90 and later (below, they become loads of single
    elements).  precision: of fp32 products, "ieee" or "tf32", factors of 10 bits; sums are fp32 always.

    Returns dx (N, C, H, W) in channels_last, or (dx, partials).  Two runs give equal bits.  Raises ValueError for
    wrong shapes and for what `unsupported_input_grad` names.
    """
    check_precision(precision)
    reason = unsupported_input_grad(
        grad, weight, stride, padding, dilation, groups, descriptors=descriptors, precision=precision
    )
    if reason:
        raise ValueError(reason)
    height, width = input_size
    images, outputs, out_height, out_width = grad.shape
    _, c, r, s = weight.shape
    k = outputs // groups
    check_sizes(grad, images, input_size, (r, s), stride, padding, dilation)
    if height * width * groups * c >= 2**31:
        raise ValueError(f"an image of dx must have less than 2^31 elements, got input_size {tuple(input_size)}")
    shape = (images, groups * c, height, width)
    if relu_output is not None and (relu_output.shape != shape or relu_output.dtype != grad.dtype):
        raise ValueError(
            f"relu_output must be {grad.dtype} of shape {shape}, got {relu_output.dtype} {tuple(relu_output.shape)}"
        )
    if descriptors and relu_output is not None and relu_output.storage_offset() * relu_output.element_size() % 16:
        raise ValueError(
            "descriptors need relu_output to start at a multiple of 16 bytes, "
            f"got offset {relu_output.storage_offset()}"
        )

    tile = input_grad_tile(images, c, k, grad.dtype, descriptors, precision)
    # tensor cores read 4-byte operands along the sum only: 1 to 4 MB are transposed for them
    transposed = precision == "tf32" and grad.dtype == torch.float32
    matrix = packed(weight).flatten(1)
    if transposed:
        matrix = packed(weight).unflatten(0, (groups, k)).permute(0, 4, 2, 3, 1).reshape(groups * c, -1)
    grad = packed(grad).flatten(1)
    y = None if relu_output is None else packed(relu_output).flatten(1)
    dx = torch.empty(images, height * width * groups * c, dtype=grad.dtype, device=grad.device)
    rows = triton.cdiv(images, tile.rows) * height * width
    partials = torch.empty(rows, groups * c, dtype=torch.float32, device=grad.device) if bias_partials else None
    programs = rows * groups * triton.cdiv(c, sum(tile.columns))
    if programs:
        tensors = [grad, matrix, None, dx, y]
        # what divides both parts of the tile
        piece = min(SLICE, tile.columns[1] or tile.columns[0]) if descriptors else max(tile.columns)
        if descriptors:
            tensors = [
                descriptor(grad, tile.rows, tile.depth),
                *(
                    descriptor(matrix, columns, tile.depth) if transposed else descriptor(matrix, tile.depth, columns)
                    for columns in tile.columns
                ),
                descriptor(dx, tile.rows, piece),
                descriptor(y, tile.rows, piece),
            ]
        conv_input_grad_kernel[(programs,)](
            *tensors,
            partials,
            images,
            height,
            width,
            out_height,
            out_width,
            TRANSPOSED=transposed,
            SLICE=piece,
            **constants(tile, c, k, groups, (r, s), stride, padding, dilation, descriptors, precision, grad.dtype),
        )
    dx = dx.view(images, height, width, groups * c).movedim(-1, 1)
    return (dx, partials) if bias_partials else dx


def conv_weight_grad(
    grad,
    x,
    kernel_size,
    stride=(1, 1),
    padding=((0, 0), (0, 0)),
    dilation=(1, 1),
    groups=1,
    *,
    descriptors=False,
    precision="ieee",
):
    """The gradient of a convolution with respect to its weight.

    grad: (N, K, OH, OW), fp16, bf16 or fp32; x: (N, C, H, W), same dtype; kernel_size: (R, S); padding: ((top,
    bottom), (left, right)).  channels_last memory is read in place, anything else is copied to it.  descriptors and
    precision: as in `conv_input_grad`.

    The sum over images and outputs is split between programs where tiles are few, into fp32 parts that a second
    kernel adds in order: how often depends on the shapes, not on the GPU, so two runs give equal bits.

    Returns dw (K, C / groups, R, S) in channels_last and grad's dtype.  Raises ValueError for wrong shapes and for
    what `unsupported_weight_grad` names.
    """
    check_precision(precision)
    reason = unsupported_weight_grad(
        grad, x, kernel_size, stride, padding, dilation, groups, descriptors=descriptors, precision=precision
    )
    if reason:
        raise ValueError(reason)
    images, channels, height, width = x.shape
    outputs, out_height, out_width = grad.shape[1:]
    check_sizes(grad, images, (height, width), kernel_size, stride, padding, dilation)
    r, s = kernel_size
    c = channels // groups
    k = outputs // groups

    tile = weight_grad_tile(images, c, k, grad.dtype, descriptors, precision)
    dw = torch.empty(outputs, r, s, c, dtype=x.dtype, device=x.device)
    steps = out_height * out_width * triton.cdiv(images, tile.depth)
    if not dw.numel() or not steps:
        return dw.zero_().movedim(-1, 1)
    tiles = triton.cdiv(k, tile.rows) * triton.cdiv(c, sum(tile.columns)) * r * s * groups
    splits = max(1, min(triton.cdiv(PROGRAMS, tiles), steps // MIN_STEPS))
    out = dw if splits == 1 else torch.empty(splits, *dw.shape, dtype=torch.float32, device=x.device)
    grad = packed(grad).flatten(1)
    x = packed(x).flatten(1)
    tensors = [grad, x, None]
    if descriptors:
        tensors = [
            descriptor(grad, tile.depth, tile.rows),
            *(descriptor(x, tile.depth, columns) for columns in tile.columns),
        ]
    conv_weight_grad_kernel[(tiles * splits,)](
        *tensors,
        out,
        images,
        height,
        width,
        out_height,
        out_width,
        SPLITS=splits,
        EVEN=images % tile.depth == 0,
        **constants(tile, c, k, groups, kernel_size, stride, padding, dilation, descriptors, precision, grad.dtype),
    )
    if splits > 1:
        sum_splits_kernel[(triton.cdiv(dw.numel(), SUM_BLOCK),)](
            out, dw, dw.numel(), SPLITS=splits, BLOCK=SUM_BLOCK, num_warps=warps(THREADS)
        )
    return dw.movedim(-1, 1)
