"""The gradient of a convolution with respect to its weight, batch-tiled: the sum's steps are blocks of images.

    dw[k, c, r, s]  = sum over images n and outputs (oh, ow) of grad[n, k, oh, ow] * x[n, c, h, w]
    with h = oh * stride - top + r * dilation, and w likewise

A program has one tap, so which outputs see the image under it is a range of integers: nothing is masked in the loop and
no product with padding is computed.  Everything is read as it lies in channels_last memory; sums are fp32, in a fixed
order.
"""

import torch
import triton
import triton.language as tl

from ..partial_sums import sum_partials
from ..registers import warps
from .config import weight_grad_config
from .implicit_gemm import conv_of, descriptor, multiply_add, next_step, precision_of, tap_range
from .input_grad import check_precision, check_sizes, packed, unsupported


@triton.jit
def conv_weight_grad_kernel(
    grad,  # (N, OH, OW, GROUPS * C_OUT): pointer, or descriptor of (N, OH * OW * GROUPS * C_OUT)
    x,  # (N, H, W, GROUPS * C_IN): pointer, or descriptor of (N, H * W * GROUPS * C_IN)
    x_tail,  # the descriptor for BLOCK_N_TAIL columns
    out_ptr,  # (SPLIT_K, GROUPS * C_OUT, R, S, C_IN): fp32 partial sums, or the gradient itself if SPLIT_K is 1
    images,
    height,
    width,
    out_height,
    out_width,
    CONV: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN: tl.constexpr,  # whether BLOCK_K divides the images
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program makes BLOCK_M output channels x (BLOCK_N + BLOCK_N_TAIL) input channels of one tap.

    Over one of SPLIT_K parts of the outputs that see the image under this tap, times the blocks of BLOCK_K images.
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
    row_tiles: tl.constexpr = (C_OUT + BLOCK_M - 1) // BLOCK_M
    tiles: tl.constexpr = (C_IN + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    row = program % row_tiles * BLOCK_M
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
    blocks = tl.cdiv(images, BLOCK_K)
    steps = (oh_stop - oh0) * (ow_stop - ow0) * blocks
    share = tl.cdiv(steps, SPLIT_K)
    start = tl.minimum(split * share, steps)
    stop = tl.minimum(start + share, steps)
    output = start // blocks
    block = start - output * blocks
    columns = tl.maximum(ow_stop - ow0, 1)
    oh = oh0 + output // columns
    ow = ow0 + output % columns

    image = tl.arange(0, BLOCK_K)
    k = row + tl.arange(0, BLOCK_M)
    c = column + tl.arange(0, BLOCK_N)
    c_tail = column + BLOCK_N + tl.arange(0, BLOCK_N_TAIL if BLOCK_N_TAIL > 0 else 1)
    grad_plane = out_height * out_width * (C_OUT * GROUPS)
    x_plane = height * width * (C_IN * GROUPS)
    if not DESCRIPTORS:
        grad_at = grad + image.to(tl.int64)[None, :] * grad_plane + (group * C_OUT + k)[:, None]
        x_at = x + image.to(tl.int64)[:, None] * x_plane + (group * C_IN + c)[None, :]
        if BLOCK_N_TAIL > 0:
            tail_at = x + image.to(tl.int64)[:, None] * x_plane + (group * C_IN + c_tail)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N_TAIL > 0:
        acc_tail = tl.zeros([BLOCK_M, BLOCK_N_TAIL], tl.float32)
    for _ in tl.range(start, stop, warp_specialize=TILE[5]):
        h = oh * STRIDE_H - TOP + r * DILATION_H
        w = ow * STRIDE_W - LEFT + s * DILATION_W
        grad_offset = (oh * out_width + ow) * (C_OUT * GROUPS)
        x_offset = (h * width + w) * (C_IN * GROUPS)
        if DESCRIPTORS:
            a = grad.load([block * BLOCK_K, grad_offset + group * C_OUT + row]).T
            b = x.load([block * BLOCK_K, x_offset + group * C_IN + column])
        else:
            a_at = grad_at + (block.to(tl.int64) * BLOCK_K * grad_plane + grad_offset)
            b_at = x_at + (block.to(tl.int64) * BLOCK_K * x_plane + x_offset)
            here = image < images - block * BLOCK_K
            if not EVEN:
                a = tl.load(a_at, mask=here[None, :] & (k < C_OUT)[:, None], other=0.0)
                b = tl.load(b_at, mask=here[:, None] & (c < C_IN)[None, :], other=0.0)
            else:
                # rows and columns behind the last channel are not stored, whatever they hold
                a = tl.load(a_at, mask=(k < C_OUT)[:, None] if C_OUT % BLOCK_M != 0 else None)
                b = tl.load(b_at, mask=(c < C_IN)[None, :] if C_IN % WIDTH != 0 else None)
        acc = multiply_add(a, b, acc, PRECISION)
        if BLOCK_N_TAIL > 0:
            if DESCRIPTORS:
                b_tail = x_tail.load([block * BLOCK_K, x_offset + group * C_IN + column + BLOCK_N])
            else:
                b_tail_at = tail_at + (block.to(tl.int64) * BLOCK_K * x_plane + x_offset)
                if not EVEN:
                    b_tail = tl.load(b_tail_at, mask=here[:, None] & (c_tail < C_IN)[None, :], other=0.0)
                else:
                    b_tail = tl.load(b_tail_at, mask=(c_tail < C_IN)[None, :] if C_IN % WIDTH != 0 else None)
            acc_tail = multiply_add(a, b_tail, acc_tail, PRECISION)
        oh, ow, block = next_step(oh, ow, block, ow0, ow_stop, blocks, 1)

    to_row = out_ptr + ((split.to(tl.int64) * GROUPS + group) * C_OUT + k)[:, None] * (R * S * C_IN) + tap * C_IN
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(to_row + c[None, :], out, mask=(k < C_OUT)[:, None] & (c < C_IN)[None, :])
    if BLOCK_N_TAIL > 0:
        out_tail = acc_tail.to(out_ptr.dtype.element_ty)
        tl.store(to_row + c_tail[None, :], out_tail, mask=(k < C_OUT)[:, None] & (c_tail < C_IN)[None, :])


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
    config=None,
):
    """The gradient of a convolution with respect to its weight.

    grad: (N, K, OH, OW), fp16, bf16 or fp32; x: (N, C, H, W), same dtype; kernel_size: (R, S); padding: ((top,
    bottom), (left, right)).  channels_last memory is read in place, anything else is copied to it.  descriptors,
    precision and config: as in `conv_input_grad`.

    The sum over images and outputs is split between programs where tiles are few, into fp32 parts that
    `sum_partials` adds in a fixed order: how often depends on the shapes, not on the GPU, so two runs give equal bits.

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

    if config is None:
        config = weight_grad_config(
            images, c, k, r * s, out_height * out_width, groups, grad.dtype, descriptors, precision
        )
    block_k = config.block_k[0]
    dw = torch.empty(outputs, r, s, c, dtype=x.dtype, device=x.device)
    if not dw.numel() or not images:
        return dw.zero_().movedim(-1, 1)
    tiles = triton.cdiv(k, config.block_m) * triton.cdiv(c, sum(config.block_n)) * r * s * groups
    out = dw
    if config.split_k > 1:
        out = torch.empty(config.split_k, *dw.shape, dtype=torch.float32, device=x.device)
    grad = packed(grad).flatten(1)
    x = packed(x).flatten(1)
    tensors = [grad, x, None]
    if descriptors:
        tensors = [
            descriptor(grad, block_k, config.block_m),
            *(descriptor(x, block_k, columns) for columns in config.block_n),
        ]
    conv_weight_grad_kernel[(tiles * config.split_k,)](
        *tensors,
        out,
        images,
        height,
        width,
        out_height,
        out_width,
        CONV=conv_of((outputs, c, r, s), groups, stride, padding, dilation),
        TILE=config.tile,
        SPLIT_K=config.split_k,
        EVEN=images % block_k == 0,
        DESCRIPTORS=descriptors,
        PRECISION=precision_of(grad.dtype, precision),
        num_warps=warps(config.num_warps * 32),
        num_stages=config.num_stages,
    )
    if config.split_k > 1:
        dw = sum_partials(out.flatten(1), dtype=dw.dtype).view(dw.shape)
    return dw.movedim(-1, 1)
