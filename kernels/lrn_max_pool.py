"""Local response normalisation and overlapping max-pooling, one kernel each way.

Eager PyTorch moves 68 MB per image between the outputs of conv1 and pool2 (fp16, forward and backward); these
kernels move 3.5 MB.  Forward reads x and writes the pooled values and one byte per window: 2.72 bytes per
element of x.  Backward reads x, the pooled gradient and the bytes and writes dx: 4.72 bytes.  The normalised
tensor never exists in memory; backward recomputes it from x, which costs less than reading it would.

An item of work, one thread's, is an output column (forward) or 2x2 pixels (backward) of a chunk of channels: the 16
bytes that one load brings.  The window over channels lies in registers; the few channels beyond the chunk are a second,
narrow load that the cache answers.  In NCHW that would be a load per channel and three times the instructions: there
kernels/lrn.py and kernels/max_pool.py, one after the other, are faster.

Source: Krizhevsky et al. 2012, sections 3.3 and 3.4.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import geometry
from .geometry import dense, in_layout_of, is_channels_last, no_cell, output_size
from .lrn import denominators, gradient_terms, load_window
from .max_pool import gather_2x2
from .registers import DTYPES, inverse_power, pack, take, unpack, use_asm, vector_width, window_sums

MAX_SIZE = 9

DEAD = tl.constexpr(no_cell(3, 3))
one_hot = triton.constexpr_function(geometry.one_hot)


# ------------------------------------------------------------------------------------------------ channels
@triton.jit
def store_channels(ptr, x, N: tl.constexpr, mask=None):
    """Write the last dimension of x, N channels, where mask (None: everywhere) holds."""
    ptr = tl.expand_dims(ptr, -1) + tl.arange(0, N)
    if mask is None:
        tl.store(ptr, x)
    else:
        tl.store(ptr, x, mask=tl.expand_dims(mask, -1))


# ------------------------------------------------------------------------------------------------- forward
# What competes for a window's maximum, by MODE (each part holds N channels in its last dimension):
#   "packed"  (key,)         int32: the bits of a 16-bit value >= 0, then the cell's one-hot bits.  One integer
#                            maximum finds value and cell together; ties go to the earlier cell.
#   "pairs"   (value, bits)  any sign and dtype; strictly greater or NaN takes over, as in PyTorch.
#   "values"  (value,)       no code is wanted.
@triton.jit
def candidate(y, BITS: tl.constexpr, DTYPE: tl.constexpr, MODE: tl.constexpr, ASM: tl.constexpr):
    """The normalised value y, rounded to DTYPE, of the cell with the one-hot BITS."""
    if MODE == "packed":
        if not ASM:
            # |y| clears the sign of -0 and of NaN, which would lose against everything
            key = (tl.abs(y).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16) | BITS
        elif DTYPE.is_fp16():
            # One conversion rounds y into the high half and the subnormal number whose bits are BITS into the
            # low half.  It writes every NaN as 0x7fff.
            low = tl.full(y.shape, BITS * 2.0**-24, tl.float32)
            key = tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [y, low], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            low = tl.full(y.shape, BITS << 16, tl.int32)
            key = tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,r", [y, low], dtype=tl.int32, is_pure=True, pack=1
            )
        return (key,)
    elif MODE == "pairs":
        return y.to(DTYPE).to(tl.float32), tl.full(y.shape, BITS, tl.int32)
    else:
        return (y,)


@triton.jit
def larger(first, second, MODE: tl.constexpr):
    """The winner of two candidates; `first` comes earlier in the window."""
    if MODE == "packed":
        return (tl.maximum(first[0], second[0]),)
    elif MODE == "pairs":
        takes = (second[0] > first[0]) | (second[0] != second[0])
        return tl.where(takes, second[0], first[0]), tl.where(takes, second[1], first[1])
    else:
        return (tl.maximum(first[0], second[0], propagate_nan=tl.PropagateNan.ALL),)


@triton.jit
def with_bits_added(c, BITS: tl.constexpr, MODE: tl.constexpr):
    """A candidate as the next window sees it."""
    if MODE == "packed":
        return (c[0] + BITS,)
    elif MODE == "pairs":
        return c[0], c[1] + BITS
    else:
        return c


@triton.jit
def normalised(
    x_ptr,
    channel,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    ASM: tl.constexpr,
):
    """LRN of N channels of one pixel, in the last dimension of one fp32 tensor."""
    BELOW: tl.constexpr = SIZE // 2
    x = load_window(x_ptr, channel, BELOW, (SIZE - 1) // 2, N, GROUP_CHANNELS)
    # One tensor from here on: compile time grows with the third power of the number of operations.
    d = pack(denominators(x, N, SIZE, SCALE, K), N)
    return pack(take(x, BELOW, BELOW + N), N) * inverse_power(d, BETA, ASM)


@triton.jit
def row_maximum(
    x_ptr,
    channel,
    ROW: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    C: tl.constexpr,
    MODE: tl.constexpr,
    ASM: tl.constexpr,
):
    """The best candidate among the three pixels of row ROW of a window."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    y = normalised(x_ptr, channel, SIZE, SCALE, BETA, K, N, GROUP_CHANNELS, ASM)
    best = candidate(y, one_hot(ROW, 0, 3, 3), DTYPE, MODE, ASM)
    for j in tl.static_range(1, 3):
        y = normalised(x_ptr + j * C, channel, SIZE, SCALE, BETA, K, N, GROUP_CHANNELS, ASM)
        best = larger(best, candidate(y, one_hot(ROW, j, 3, 3), DTYPE, MODE, ASM), MODE)
    return best


@triton.jit
def value_of(c, DTYPE: tl.constexpr, MODE: tl.constexpr):
    if MODE == "packed":
        return (c[0] >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return c[0].to(DTYPE)


@triton.jit
def code_of(c, AFTER_RELU: tl.constexpr, MODE: tl.constexpr):
    """The byte of kernels/geometry.py; a pooled 0 behind a ReLU receives no gradient, so no cell does."""
    if MODE == "packed":
        code = tl.where(c[0] < 0x10000, DEAD, ~c[0] & DEAD)
    elif AFTER_RELU:
        code = tl.where(c[0] == 0.0, DEAD, DEAD - c[1])
    else:
        code = DEAD - c[1]
    return code.to(tl.int8)


# The batch size reaches the kernel only through `items` and `rows`: one compiled kernel serves every batch.
@triton.jit(do_not_specialize=["items", "rows"])
def lrn_max_pool_fwd_kernel(
    x_ptr,  # (N, H, W, C)
    y_ptr,  # (N, OH, OW, C)
    codes_ptr,  # as y, int8; unused where MODE is "values"
    items,  # N * cdiv(OH, rows) * OW * C / VEC
    rows,  # of the output, per item
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    AFTER_RELU: tl.constexpr,
    MODE: tl.constexpr,
    ASM: tl.constexpr,
    VEC: tl.constexpr,  # channels per item
    BLOCK: tl.constexpr,  # items per program
):
    """An item rolls down `rows` windows of one column; the row that two windows share is computed once."""
    OH: tl.constexpr = (H - 3) // 2 + 1
    OW: tl.constexpr = (W - 3) // 2 + 1
    CV: tl.constexpr = C // VEC
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty

    # Clamped items repeat the last one, and the last block of rows overlaps its neighbour: equal values are written
    # twice.  A mask on `items` would turn 16-byte loads into 2-byte ones.
    item = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), items - 1)
    blocks = (OH + rows - 1) // rows
    cv = item % CV
    column = item // CV % OW
    block = item // (CV * OW) % blocks
    # an image has fewer than 2^31 elements, a batch may have more
    n = (item // (CV * OW) // blocks).to(tl.int64)
    row = tl.minimum(block * rows, OH - rows)
    # VEC is the last factor: the compiler sees that it divides the offsets, and loads 16 bytes
    x_ptr += (((n * H + 2 * row) * W + 2 * column) * CV + cv) * VEC
    out = (((n * OH + row) * OW + column) * CV + cv) * VEC
    y_ptr += out
    codes_ptr += out
    channel = cv * VEC % GROUP_CHANNELS

    top = row_maximum(x_ptr, channel, 0, SIZE, SCALE, BETA, K, VEC, GROUP_CHANNELS, C, MODE, ASM)
    for _ in range(rows):
        middle = row_maximum(x_ptr + W * C, channel, 1, SIZE, SCALE, BETA, K, VEC, GROUP_CHANNELS, C, MODE, ASM)
        bottom = row_maximum(x_ptr + 2 * W * C, channel, 2, SIZE, SCALE, BETA, K, VEC, GROUP_CHANNELS, C, MODE, ASM)
        best = larger(larger(top, middle, MODE), bottom, MODE)
        store_channels(y_ptr, value_of(best, DTYPE, MODE), VEC)
        if MODE != "values":
            store_channels(codes_ptr, code_of(best, AFTER_RELU, MODE), VEC)
        # the last row of this window is the first of the next
        top = with_bits_added(bottom, one_hot(0, 0, 3, 3) - one_hot(2, 0, 3, 3), MODE)
        x_ptr += 2 * W * C
        y_ptr += OW * C
        codes_ptr += OW * C


# ------------------------------------------------------------------------------------------------ backward
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
# Lanes of a warp: 64 on AMD's datacentre GPUs.
LANES = 64 if torch.version.hip else 32
# 23 warps of the forward kernel for each of 132 multiprocessors: with fewer, an H100 waits for memory (conv1 at batch
# 128: 49 us with 3,888 warps, 54 with 2,592, 68 with 1,296).
ENOUGH_WARPS = 3072
# Row pairs of an item of the backward kernel are halved no further than that.
ENOUGH_BACKWARD_WARPS = 1280
# Bias partials are written once and read once: each way at most this share of what backward moves anyway.  Longer
# items would have fewer, and take longer than writing them (conv1 at batch 128: 105 us with 4 pairs of rows, 126 with
# 14).
PARTIALS_SHARE = 0.06


@dataclass(frozen=True)
class ForwardConfig:
    """How lrn_max_pool_fwd is cut into programs.

    rows: of the output, per item; 2 * rows + 1 of 2 * rows rows of x are computed.  One warp per program: its
    registers are free for another as soon as it ends.
    """

    rows: int
    warps: int = 1


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
def forward_config(batch, chunks, out_height, out_width):
    """The cheapest cut that still makes ENOUGH_WARPS, or the finest one.  chunks: of channels, per pixel."""
    cuts = [triton.cdiv(out_height, blocks) for blocks in range(1, out_height + 1)]
    enough = [r for r in cuts if batch * chunks * out_width * triton.cdiv(out_height, r) >= 32 * ENOUGH_WARPS]
    # a row that two items share is computed by both
    return ForwardConfig(min(enough, key=lambda rows: triton.cdiv(out_height, rows) * (2 * rows + 1), default=1))


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
        if pairs % divisor == 0 and items >= 32 * ENOUGH_BACKWARD_WARPS:
            rows = divisor
    return BackwardConfig(rows)


def unsupported(x, size, groups=1, kernel_size=(3, 3), stride=(2, 2)):
    """Why the fused kernels do not take x with these windows, in words, or None if they do.

    kernels/lrn.py and kernels/max_pool.py, one after the other, take what these refuse.
    """
    if x.dim() != 4:
        return f"x has {x.dim()} dimensions, not 4"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not fp16, bf16 or fp32"
    if kernel_size != (3, 3):
        return f"kernel_size is {kernel_size}, not (3, 3)"
    if stride != (2, 2):
        return f"stride is {stride}, not (2, 2)"
    _, channels, height, width = x.shape
    if min(height, width) < 3:
        return f"the {height}x{width} image is smaller than one 3x3 window"
    if not 1 <= size <= MAX_SIZE:
        return f"size is {size}, not between 1 and {MAX_SIZE}"
    vector = vector_width(x.dtype)
    if groups < 1 or channels % (groups * vector):
        return f"{channels} channels in {groups} groups: channels per group are no multiple of {vector}"
    if channels * height * width >= 2**31:
        return f"an image of {channels}x{height}x{width} has 2^31 elements or more"
    if not is_channels_last(x):
        return "x is not channels_last"
    return None


def check(x, size, groups):
    """Raise ValueError where the fused kernels cannot take x; return the channels of an item."""
    reason = unsupported(x, size, groups)
    if reason is not None:
        raise ValueError(f"lrn_max_pool: {reason} (x has shape {tuple(x.shape)})")


def constants(x, size, alpha, beta, k, groups):
    """The compile-time arguments that forward and backward share."""
    channels, height, width = x.shape[1:]
    return {
        "H": height,
        "W": width,
        "C": channels,
        "GROUP_CHANNELS": channels // groups,
        "SIZE": size,
        "SCALE": float(alpha) / size,
        "BETA": float(beta),
        "K": float(k),
        "VEC": vector_width(x.dtype),
        "ASM": use_asm(),
    }


def pooled_like(x, dtype):
    """An uninitialised tensor of one element per window, channels_last."""
    batch, channels, height, width = x.shape
    shape = (batch, channels, *output_size((height, width), (3, 3), (2, 2)))
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def lrn_max_pool_fwd(x, size, alpha, beta, k, *, groups=1, after_relu=False, codes=True, config=None):
    """max_pool2d(local_response_norm(x, size, alpha, beta, k), 3, 2), and the codes of the maxima, in one pass.

    x: (N, C, H, W) in fp16, bf16 or fp32, channels_last (strided and expanded tensors are copied to that first), H and
    W at least 3, C / groups a multiple of 8 (fp32: 4).  The normalised values are rounded to the dtype of x before they
    are compared: the result is that of the two operators apart.

    after_relu: x holds no negative number (NaN is fine).  In 16 bit that enables a comparison in one instruction;
    in every dtype a window whose maximum is 0 gets the dead code, so that backward includes the ReLU's mask.
    codes=False computes the values only.

    Returns y and codes (int8, geometry.py; or None), both (N, C, (H - 3) // 2 + 1, (W - 3) // 2 + 1) in
    channels_last.  The first maximum of a window wins.  The last NaN wins, as in PyTorch, but with
    after_relu in 16 bit the first.  Raises ValueError for what `unsupported` names.
    """
    x = dense(x)
    check(x, size, groups)
    y = pooled_like(x, x.dtype)
    code = pooled_like(x, torch.int8) if codes else None
    if y.numel() == 0:
        return y, code
    shared = constants(x, size, alpha, beta, k, groups)
    batch, out_height, out_width = x.shape[0], *y.shape[2:]
    chunks = x.shape[1] // shared["VEC"]
    if not codes:
        mode = "values"
    elif after_relu and x.dtype != torch.float32:
        mode = "packed"
    else:
        mode = "pairs"
    config = config or forward_config(batch, chunks, out_height, out_width)
    rows = min(config.rows, out_height)
    items = batch * chunks * triton.cdiv(out_height, rows) * out_width
    block = config.warps * LANES
    lrn_max_pool_fwd_kernel[(triton.cdiv(items, block),)](
        x,
        y,
        y if code is None else code,
        items,
        rows,
        **shared,
        AFTER_RELU=after_relu,
        MODE=mode,
        BLOCK=block,
        num_warps=config.warps,
    )
    return y, code


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
