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
from .geometry import dense, is_channels_last, no_cell, output_size
from .lrn import denominators, load_window
from .registers import DTYPES, LANES, inverse_power, pack, take, use_asm, vector_width

MAX_SIZE = 9

NO_CELL = tl.constexpr(no_cell(3, 3))
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
        code = tl.where(c[0] < 0x10000, NO_CELL, ~c[0] & NO_CELL)
    elif AFTER_RELU:
        code = tl.where(c[0] == 0.0, NO_CELL, NO_CELL - c[1])
    else:
        code = NO_CELL - c[1]
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


# ------------------------------------------------------------------------------------------------ launch
# 23 warps of the forward kernel for each of 132 multiprocessors: with fewer, an H100 waits for memory (conv1 at batch
# 128: 49 us with 3,888 warps, 54 with 2,592, 68 with 1,296).
ENOUGH_WARPS = 3072


@dataclass(frozen=True)
class ForwardConfig:
    """How lrn_max_pool_fwd is cut into programs.

    rows: of the output, per item; 2 * rows + 1 of 2 * rows rows of x are computed.  One warp per program: its
    registers are free for another as soon as it ends.
    """

    rows: int
    warps: int = 1


@functools.lru_cache
def forward_config(batch, chunks, out_height, out_width):
    """The cheapest cut that still makes ENOUGH_WARPS, or the finest one.  chunks: of channels, per pixel."""
    cuts = [triton.cdiv(out_height, blocks) for blocks in range(1, out_height + 1)]
    enough = [r for r in cuts if batch * chunks * out_width * triton.cdiv(out_height, r) >= 32 * ENOUGH_WARPS]
    # a row that two items share is computed by both
    return ForwardConfig(min(enough, key=lambda rows: triton.cdiv(out_height, rows) * (2 * rows + 1), default=1))


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
    in every dtype a window whose maximum is 0 gets the code of no cell, so that backward includes the ReLU's mask.
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
