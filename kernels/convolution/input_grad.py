"""The gradient of a convolution with respect to its input, batch-tiled: a tile's rows are images at one pixel.

    dx[n, c, h, w]  = sum over taps (r, s) and k of grad[n, k, oh, ow] * weight[k, c, r, s]
    with h = oh * stride - top + r * dilation, and w likewise

All images of a tile share the pixel, so which taps fall on an output is a range of integers per program: nothing is
masked in the loop and no product with padding is computed (13x13, 3x3, padding 1: 10 % fewer).  Everything is read as
it lies in channels_last memory; sums are fp32, in a fixed order.
"""

import torch
import triton
import triton.language as tl

from ..geometry import output_size
from ..registers import DTYPES, warps
from ..relu_bias_grad import masked
from .config import input_grad_config
from .implicit_gemm import NARROWEST, capability, conv_of, descriptor, multiply_add, next_step, precision_of

# Columns that the epilogue handles at once behind descriptors.  With 256 rows and 8 warps that is 32 sums per thread;
# 64 spill on sm_100 when warps are specialised, which leaves 168 registers.
SLICE = 32


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
    acc, dx, y, partials, first, images, plane, position, channel,
    C_IN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Mask a tile of dx with y, store it, and its sums over the images to `partials`, the group's row of them.

    In slices of SLICE columns: the whole of a large tile, its mask and its sums do not fit into registers.
    """
    if BLOCK_N > SLICE:
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
        finish_input_grad(
            left, dx, y, partials, first, images, plane, position, channel,
            C_IN, BLOCK_M, BLOCK_N // 2, SLICE, DESCRIPTORS,
        )  # fmt: skip
        finish_input_grad(
            right, dx, y, partials, first, images, plane, position, channel + BLOCK_N // 2,
            C_IN, BLOCK_M, BLOCK_N // 2, SLICE, DESCRIPTORS,
        )  # fmt: skip
    else:
        image = first + tl.arange(0, BLOCK_M)
        c = channel + tl.arange(0, BLOCK_N)
        inside = (image < images)[:, None] & (c < C_IN)[None, :]
        offset = image.to(tl.int64)[:, None] * plane + (position + c)[None, :]
        if y is not None:
            if DESCRIPTORS:
                below = y.load([first, position + channel])
            else:
                below = tl.load(y + offset, mask=inside, other=0.0)
            # also rows behind the last image, where y reads as 0
            acc = masked(acc, below, 1.0)
        if partials is not None:
            if y is None:
                acc = tl.where((image < images)[:, None], acc, 0.0)
            tl.store(partials + c, tl.sum(acc, 0), mask=c < C_IN)
        if DESCRIPTORS:
            dx.store([first, position + channel], acc.to(dx.dtype))
        else:
            tl.store(dx + offset, acc.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def conv_input_grad_kernel(
    grad,  # (N, OH, OW, GROUPS * C_OUT): pointer, or descriptor of (N, OH * OW * GROUPS * C_OUT)
    weight,  # (GROUPS * C_OUT, R, S, C_IN), TRANSPOSED (GROUPS * C_IN, R, S, C_OUT): pointer, or descriptor of its rows
    weight_tail,  # the descriptor for BLOCK_N_TAIL columns
    dx,  # (N, H, W, GROUPS * C_IN): pointer, or descriptor of (N, H * W * GROUPS * C_IN), SLICE columns
    y,  # as dx, or None
    partials,  # image blocks * H * W rows of GROUPS * C_IN, fp32, or None
    images,
    height,
    width,
    out_height,
    out_width,
    CONV: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SLICE: tl.constexpr,  # columns at a time behind the loop
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program makes BLOCK_M images x (BLOCK_N + BLOCK_N_TAIL) channels of one pixel.

    Neighbours share the images and the pixel, then the pixel, then the weight.  One loop runs over taps and blocks of
    BLOCK_K output channels, so that the pipeline never drains between taps.
    """
    C_IN: tl.constexpr = CONV[0]
    C_OUT: tl.constexpr = CONV[1]
    GROUPS: tl.constexpr = CONV[2]
    R: tl.constexpr = CONV[3]
    S: tl.constexpr = CONV[4]
    STRIDE_H: tl.constexpr = CONV[5]
    STRIDE_W: tl.constexpr = CONV[6]
    TOP: tl.constexpr = CONV[7]
    LEFT: tl.constexpr = CONV[8]
    DILATION_H: tl.constexpr = CONV[9]
    DILATION_W: tl.constexpr = CONV[10]
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    BLOCK_N_TAIL: tl.constexpr = TILE[2]
    BLOCK_K: tl.constexpr = TILE[3]
    WIDTH: tl.constexpr = BLOCK_N + BLOCK_N_TAIL
    tiles: tl.constexpr = (C_IN + WIDTH - 1) // WIDTH
    row = tl.program_id(0) // (tiles * GROUPS)
    column = tl.program_id(0) % (tiles * GROUPS)
    group = column // tiles
    channel = column % tiles * WIDTH  # within the group
    blocks = tl.cdiv(images, BLOCK_M)
    pixel = row // blocks
    first = (row - pixel * blocks) * BLOCK_M
    h = pixel // width
    w = pixel - h * width
    r0, rows = taps_on_outputs(h, out_height, R, TOP, STRIDE_H, DILATION_H)
    s0, columns = taps_on_outputs(w, out_width, S, LEFT, STRIDE_W, DILATION_W)
    R_STEP: tl.constexpr = STRIDE_H // gcd(STRIDE_H, DILATION_H)
    S_STEP: tl.constexpr = STRIDE_W // gcd(STRIDE_W, DILATION_W)
    s_stop = s0 + columns * S_STEP
    BLOCKS: tl.constexpr = (C_OUT + BLOCK_K - 1) // BLOCK_K
    MASKED: tl.constexpr = C_OUT % BLOCK_K != 0 or C_IN % WIDTH != 0
    # strides of the weight
    K_STRIDE: tl.constexpr = 1 if TRANSPOSED else R * S * C_IN
    C_STRIDE: tl.constexpr = R * S * C_OUT if TRANSPOSED else 1
    TAP: tl.constexpr = C_OUT if TRANSPOSED else C_IN
    ORIGIN: tl.constexpr = C_IN if TRANSPOSED else C_OUT  # rows of the weight per group

    k = tl.arange(0, BLOCK_K)
    if not DESCRIPTORS:
        # rows behind the last image read it again: cheaper than a mask
        image = tl.minimum(first + tl.arange(0, BLOCK_M), images - 1)
        grad_at = grad + image.to(tl.int64)[:, None] * (out_height * out_width * C_OUT * GROUPS)
        grad_at += (group * C_OUT + k)[None, :]
        c = channel + tl.arange(0, BLOCK_N)
        weight += group * ORIGIN * R * S * TAP
        weight_at = weight + k[:, None] * K_STRIDE + c[None, :] * C_STRIDE
        if BLOCK_N_TAIL > 0:
            c_tail = channel + BLOCK_N + tl.arange(0, BLOCK_N_TAIL)
            tail_at = weight + k[:, None] * K_STRIDE + c_tail[None, :] * C_STRIDE
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N_TAIL > 0:
        acc_tail = tl.zeros([BLOCK_M, BLOCK_N_TAIL], tl.float32)
    r = r0
    s = s0
    k0 = 0
    for _ in tl.range(0, rows * columns * BLOCKS, warp_specialize=TILE[5]):
        oh = (h + TOP - r * DILATION_H) // STRIDE_H
        ow = (w + LEFT - s * DILATION_W) // STRIDE_W
        grad_offset = (oh * out_width + ow) * (C_OUT * GROUPS) + k0
        tap = (r * S + s) * TAP
        if DESCRIPTORS:
            a = grad.load([first, grad_offset + group * C_OUT])
            if TRANSPOSED:
                b = weight.load([group * C_IN + channel, tap + k0]).T
            else:
                b = weight.load([group * C_OUT + k0, tap + channel])
        else:
            a = tl.load(
                grad_at + grad_offset,
                mask=(k < C_OUT - k0)[None, :] if C_OUT % BLOCK_K != 0 else None,
                other=0.0 if C_OUT % BLOCK_K != 0 else None,
            )
            b = tl.load(
                weight_at + (tap + k0 * K_STRIDE),
                mask=(k < C_OUT - k0)[:, None] & (c < C_IN)[None, :] if MASKED else None,
                other=0.0 if MASKED else None,
            )
        acc = multiply_add(a, b, acc, PRECISION)
        if BLOCK_N_TAIL > 0:
            if DESCRIPTORS:
                if TRANSPOSED:
                    b_tail = weight_tail.load([group * C_IN + channel + BLOCK_N, tap + k0]).T
                else:
                    b_tail = weight_tail.load([group * C_OUT + k0, tap + channel + BLOCK_N])
            else:
                b_tail = tl.load(
                    tail_at + (tap + k0 * K_STRIDE),
                    mask=(k < C_OUT - k0)[:, None] & (c_tail < C_IN)[None, :] if MASKED else None,
                    other=0.0 if MASKED else None,
                )
            acc_tail = multiply_add(a, b_tail, acc_tail, PRECISION)
        r, s, k0 = next_step(r, s, k0, s0, s_stop, C_OUT, BLOCK_K, R_STEP, S_STEP)

    plane = height * width * (C_IN * GROUPS)
    position = pixel * (C_IN * GROUPS) + group * C_IN
    if partials is not None:
        partials += row.to(tl.int64) * (C_IN * GROUPS) + group * C_IN
    finish_input_grad(
        acc, dx, y, partials, first, images, plane, position, channel, C_IN, BLOCK_M, BLOCK_N, SLICE, DESCRIPTORS
    )
    if BLOCK_N_TAIL > 0:
        finish_input_grad(
            acc_tail, dx, y, partials, first, images, plane, position, channel + BLOCK_N,
            C_IN, BLOCK_M, BLOCK_N_TAIL, SLICE, DESCRIPTORS,
        )  # fmt: skip


def packed(t):
    """t in (N, H, W, C) order, copied unless it lies like that."""
    return t.movedim(1, -1).contiguous()


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
    config=None,
):
    """The gradient of a convolution with respect to its input, and the backward of a ReLU below it.

    grad: (N, K, OH, OW), fp16, bf16 or fp32; weight: (K, C / groups, R, S), same dtype; input_size: (H, W);
    padding: ((top, bottom), (left, right)).  channels_last memory is read in place, anything else is copied to it.

    relu_output: the input of this convolution, (N, C, H, W), if it is a ReLU's output: dx is 0 where it is <= 0
    (torch's threshold_backward: a NaN passes).  bias_partials: also return fp32 (P, C), whose `sum_partials` is the
    sum of dx over images and pixels, taken before dx is rounded: the bias gradient of the layer below.

    descriptors: copy tiles by the tensor memory accelerator, for sm_90 and later (below, they become loads of single
    elements).  precision: of fp32 products, "ieee" or "tf32", factors of 10 bits; sums are fp32 always.  config: a
    Config instead of the heuristic's.

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

    if config is None:
        config = input_grad_config(images, c, k, grad.dtype, descriptors, precision)
    block_k = config.block_k[0]
    # tensor cores read 4-byte operands along the sum only: 1 to 4 MB are transposed for them
    transposed = precision == "tf32" and grad.dtype == torch.float32
    matrix = packed(weight).flatten(1)
    if transposed:
        matrix = packed(weight).unflatten(0, (groups, k)).permute(0, 4, 2, 3, 1).reshape(groups * c, -1).contiguous()
    grad = packed(grad).flatten(1)
    y = None if relu_output is None else packed(relu_output).flatten(1)
    dx = torch.empty(images, height * width * groups * c, dtype=grad.dtype, device=grad.device)
    rows = triton.cdiv(images, config.block_m) * height * width
    partials = torch.empty(rows, groups * c, dtype=torch.float32, device=grad.device) if bias_partials else None
    programs = rows * groups * triton.cdiv(c, sum(config.block_n))
    if programs:
        tensors = [grad, matrix, None, dx, y]
        # what divides both parts of the tile
        piece = min(SLICE, config.block_n[1] or config.block_n[0]) if descriptors else max(config.block_n)
        if descriptors:
            tensors = [
                descriptor(grad, config.block_m, block_k),
                *(
                    descriptor(matrix, columns, block_k) if transposed else descriptor(matrix, block_k, columns)
                    for columns in config.block_n
                ),
                descriptor(dx, config.block_m, piece),
                descriptor(y, config.block_m, piece),
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
            CONV=conv_of(weight.shape, groups, stride, padding, dilation),
            TILE=config.tile,
            DESCRIPTORS=descriptors,
            PRECISION=precision_of(grad.dtype, precision),
            num_warps=warps(config.num_warps * 32),
            num_stages=config.num_stages,
        )
    dx = dx.view(images, height, width, groups * c).movedim(-1, 1)
    return (dx, partials) if bias_partials else dx
