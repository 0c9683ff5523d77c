"""Backward of LRN and 3x3 max-pooling with stride 2 in one pass: the gradient of the normalised map is never stored.

A thread owns 2x2 pixels of a vector of channels: it gathers their gradients from four windows and their codes
(max_pool_3x3s2.py) and sends them through the LRN's gradient (lrn.py), whose window over channels reaches into the
lanes beside it.  Compulsory traffic in fp16, with x read for both: 4.72 bytes per input element.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .geometry import dense, in_layout_of, output_size
from .lrn import denominators, gradient_terms, load_window
from .lrn_max_pool import check, constants, store_channels
from .max_pool_3x3s2 import gather_2x2
from .registers import LANES, pack, take, unpack, window_sums

# Row pairs of an item of the backward kernel are halved no further than that.
ENOUGH_WARPS = 1280
# Bias partials are written once and read once: each way at most this share of what backward moves anyway.  Longer
# items would have fewer, and take longer than writing them (conv1 at batch 128: 105 us with 4 pairs of rows, 126 with
# 14).
PARTIALS_SHARE = 0.06


@triton.jit
def with_neighbours(t, channel, LEFT: tl.constexpr, RIGHT: tl.constexpr, N: tl.constexpr, GROUP_CHANNELS: tl.constexpr):
    """LEFT channels from the previous lane (dimension 1), the lane's N, RIGHT from the next; zero outside the group."""
    LANES: tl.constexpr = channel.shape[1]
    lane = tl.broadcast_to(tl.expand_dims(tl.arange(0, LANES), 0), channel.shape)
    previous = tl.maximum(lane - 1, 0)
    following = tl.minimum(lane + 1, LANES - 1)
    out = ()
    for i in tl.static_range(N - LEFT, N):
        out = out + (tl.where(channel > 0, tl.gather(t[i], previous, 1), 0.0),)
    out = out + t
    for i in tl.static_range(RIGHT):
        out = out + (tl.where(channel < GROUP_CHANNELS - N, tl.gather(t[i], following, 1), 0.0),)
    return out


@triton.jit
def lrn_gradient(
    x_ptr,
    g,
    channel,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Gradient of N channels of one pixel (kernels/lrn.py has the formula), in the last dimension of one tensor.

    g: the gradients of their normalised values.
    """
    BELOW: tl.constexpr = SIZE // 2
    ABOVE: tl.constexpr = (SIZE - 1) // 2
    x = load_window(x_ptr, channel, BELOW, ABOVE, N, GROUP_CHANNELS)
    d = denominators(x, N, SIZE, SCALE, K)
    us = ()
    ts = ()
    for i in tl.static_range(N):
        u, t = gradient_terms(g[i], x[BELOW + i], d[i], BETA, ASM)
        us = us + (u,)
        ts = ts + (t,)
    # the adjoint window reaches ABOVE channels down and BELOW channels up
    sums = window_sums(with_neighbours(ts, channel, ABOVE, BELOW, N, GROUP_CHANNELS), N, SIZE)
    dx = ()
    for i in tl.static_range(N):
        dx = dx + (us[i] - (x[BELOW + i] * (2 * SCALE * BETA)) * sums[i],)
    return pack(dx, N)


@triton.jit(do_not_specialize=["items"])
def lrn_max_pool_bwd_kernel(
    grad_ptr,  # (N, OH, OW, C)
    codes_ptr,  # as grad, int8
    x_ptr,  # (N, H, W, C)
    dx_ptr,  # as x
    partials_ptr,  # (N * cdiv(H, 2) / ROWS * cdiv(W, 2), C) fp32; unused unless PARTIALS
    items,  # N * cdiv(H, 2) / ROWS * cdiv(W, 2) * C / VEC
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    PARTIALS: tl.constexpr,
    ASM: tl.constexpr,
    VEC: tl.constexpr,  # channels per item
    ROWS: tl.constexpr,  # row pairs per item; divides cdiv(H, 2)
    WARPS: tl.constexpr,  # of a program, in its tensors' first dimension
    LANES: tl.constexpr,  # of a warp, in the second
):
    """An item is 2x2 pixels, ROWS times: the four pooling windows above them, then LRN backward of each pixel.

    Neighbouring lanes hold neighbouring channels and hand each other the halo of the adjoint window by shuffles, 30.5
    instructions per element where recomputing it takes 37.  The outer lanes of a warp only feed.
    """
    OH: tl.constexpr = (H - 3) // 2 + 1
    OW: tl.constexpr = (W - 3) // 2 + 1
    CV: tl.constexpr = C // VEC
    PAIRS: tl.constexpr = (W + 1) // 2
    BLOCKS: tl.constexpr = (H + 1) // 2 // ROWS

    lane = tl.expand_dims(tl.arange(0, LANES), 0)
    warp = tl.expand_dims(tl.program_id(0) * WARPS + tl.arange(0, WARPS), 1)
    position = warp * (LANES - 2) - 1 + lane
    item = tl.minimum(tl.maximum(position, 0), items - 1)
    mine = (position < items) & (lane > 0) & (lane < LANES - 1)
    cv = item % CV
    j = item // CV % PAIRS
    block = item // (CV * PAIRS) % BLOCKS
    n = (item // (CV * PAIRS * BLOCKS)).to(tl.int64)
    i = block * ROWS
    pixel = (((n * H + 2 * i) * W + 2 * j) * CV + cv) * VEC
    window = (((n * OH + i) * OW + j) * CV + cv) * VEC
    channel = cv * VEC % GROUP_CHANNELS
    left = j > 0
    right = j < OW
    second_column = 2 * j + 1 < W
    # Where a pixel lies outside the image, its neighbour stands in: no window reaches it, nothing is stored.
    to_second_column = second_column.to(tl.int32) * C
    x_ptr += pixel
    dx_ptr += pixel
    grad_ptr += window
    codes_ptr += window
    total = tl.zeros([WARPS, LANES, VEC], tl.float32)
    for _ in range(ROWS):
        second_row = 2 * i + 1 < H
        p00, p01, p10, p11 = gather_2x2(grad_ptr, codes_ptr, i > 0, i < OH, left, right, OW * C, C, VEC, ASM)
        gradients = (p00, p01, p10, p11)
        to_second_row = second_row.to(tl.int32) * (W * C)
        for p in tl.static_range(4):
            source = x_ptr
            target = dx_ptr
            stored = mine
            if p % 2 == 1:
                source += to_second_column
                target += C
                stored = stored & second_column
            if p // 2 == 1:
                source += to_second_row
                target += W * C
                stored = stored & second_row
            dx = lrn_gradient(source, gradients[p], channel, SIZE, SCALE, BETA, K, VEC, GROUP_CHANNELS, ASM)
            if PARTIALS:
                total += dx
            store_channels(target, dx.to(dx_ptr.dtype.element_ty), VEC, stored)
        i += 1
        x_ptr += 2 * W * C
        dx_ptr += 2 * W * C
        grad_ptr += OW * C
        codes_ptr += OW * C
    if PARTIALS:
        row = (n * BLOCKS + block) * PAIRS + j
        partials_ptr += (row * CV + cv) * VEC
        totals = unpack(total, VEC)
        # 16 bytes at a time: eight fp32 channels would change lanes, through shared memory
        for k in tl.static_range(0, VEC, 4):
            store_channels(partials_ptr + k, pack(take(totals, k, k + 4), 4), 4, mine)


# ------------------------------------------------------------------------------------------------ launch
@dataclass(frozen=True)
class BackwardConfig:
    """How lrn_max_pool_bwd is cut into programs.

    rows: pairs of input rows per item, a divisor of cdiv(H, 2).  More than one pays only for bias partials, whose
    size it divides.  One warp per program: the exchange of the halo then waits for no other (Triton 3.6 sends it
    through shared memory; 80 us for conv1 at batch 128, 110 with four warps).
    """

    rows: int = 1
    warps: int = 1


@functools.lru_cache
def backward_config(batch, chunks, height, width, element_size, bias_partials):
    """One row pair per item; with bias partials as many as keep them within their share and still fill the GPU."""
    pairs = triton.cdiv(height, 2)
    # bytes per channel of an item and a row pair: four pixels of x and dx, one window and its code
    moved = 4 * 2 * element_size + element_size + 1
    rows = 1
    for divisor in range(2, pairs + 1):
        if not bias_partials or moved * rows * PARTIALS_SHARE >= 4:
            break
        items = batch * chunks * triton.cdiv(width, 2) * pairs // divisor
        if pairs % divisor == 0 and items >= 32 * ENOUGH_WARPS:
            rows = divisor
    return BackwardConfig(rows)


def lrn_max_pool_bwd(grad, codes, x, size, alpha, beta, k, *, groups=1, bias_partials=False, config=None):
    """The gradient of `lrn_max_pool_fwd` with respect to x, from that with respect to y.

    grad: shape of y, dtype of x, any strides; codes, x: of the forward pass.  Codes that forward wrote with
    after_relu carry the ReLU's mask: the result is then the gradient before the ReLU.  One difference to masking
    by x > 0: where x > 0 but its normalised value is rounded to 0 (x below 3e-8 * k**beta in fp16), the gradient that
    pooling sends to it is lost.

    Returns dx in the shape and dtype of x, channels_last; with bias_partials also a tensor (P, C) in fp32 whose
    sum over P is the sum of dx, before rounding, over batch and image: the gradient of the bias that was added
    before the ReLU.  Deterministic: a gather without atomics.  Raises ValueError for what `unsupported` names and for a
    grad or codes that do not belong to x.
    """
    x = dense(x)
    check(x, size, groups)
    batch, channels, height, width = x.shape
    pooled = (batch, channels, *output_size((height, width), (3, 3), (2, 2)))
    if grad.shape != pooled or grad.dtype != x.dtype:
        raise ValueError(f"grad must be {pooled} in {x.dtype}, got {tuple(grad.shape)} in {grad.dtype}")
    if codes.shape != pooled or codes.dtype != torch.int8:
        raise ValueError(f"codes must be {pooled} in torch.int8, got {tuple(codes.shape)} in {codes.dtype}")
    dx = torch.empty_like(x)
    shared = constants(x, size, alpha, beta, k, groups)
    chunks = channels // shared["VEC"]
    if config is None:
        config = backward_config(batch, chunks, height, width, x.element_size(), bias_partials)
    pairs = triton.cdiv(height, 2)
    if pairs % config.rows:
        raise ValueError(f"config.rows must divide the {pairs} pairs of rows of x, got {config.rows}")
    item_rows = batch * (pairs // config.rows) * triton.cdiv(width, 2)
    partials = torch.empty((item_rows, channels), dtype=torch.float32, device=x.device) if bias_partials else None
    if x.numel() > 0:
        items = item_rows * chunks
        lrn_max_pool_bwd_kernel[(triton.cdiv(items, config.warps * (LANES - 2)),)](
            in_layout_of(x, grad),
            in_layout_of(x, codes),
            x,
            dx,
            dx if partials is None else partials,
            items,
            **shared,
            PARTIALS=bias_partials,
            ROWS=config.rows,
            WARPS=config.warps,
            LANES=LANES,
            num_warps=config.warps,
        )
    return (dx, partials) if bias_partials else dx
