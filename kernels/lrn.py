"""Local response normalisation across channels, forward and backward, one pass over memory each.

    d_c  = k + alpha/size * sum of x_j^2 over the window of c        window [c - size//2, c + (size-1)//2]
    y_c  = x_c * d_c^-beta
    dx_c = g_c * d_c^-beta - 2 * beta * alpha/size * x_c * sum of t_j over the adjoint window of c
    t_j  = g_j * x_j * d_j^(-beta-1)                                  window [c - (size-1)//2, c + size//2]

The windows end at the borders of the channel group.  Squares, sums and powers are fp32 whatever the dtype.
Compulsory DRAM traffic is one read of x and one write of y forward (4 bytes per element in fp16), one read of
x and g and one write of dx backward (6): nothing but x is saved, because writing d would cost as much as
recomputing it saves.

Three kernels a pass:
- channels last: a thread holds one 16-byte vector of channels and its halo in registers;
- nchw (contiguous): a thread holds a chunk of channels of one pixel and its halo;
- any_window: windows that reach further than one vector; a whole channel group lives in one program.

Source: Krizhevsky et al. 2012, section 3.3, in the convention of Caffe and torch.nn.functional (alpha/size).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .geometry import dense, in_layout_of, is_channels_last
from .registers import (
    DTYPES,
    LANES,
    inverse_power,
    next_power_of_2,
    pack,
    take,
    unpack,
    use_asm,
    vector_width,
    warps,
    window_sums,
)

THREADS = 128
# Lanes that exchange their neighbours' terms by shuffles, a warp or half of AMD's; the outer two only feed the others.
EXCHANGING = tl.constexpr(32)
FEEDING = tl.constexpr(2)
# Halo channels a side that the NCHW kernels keep in registers: windows up to 17.
MAX_HALO = 8
# Channels of one pixel that a thread of the NCHW kernels computes. Backward takes 35 instructions per element
# with 8, 28 with 16; registers allow no more at full occupancy.
CHUNK = 16
# Elements of a program of the kernels for any window: 16 per thread.
ANY_WINDOW_TILE = 2048


@triton.jit
def work_items(COUNT: tl.constexpr, LARGE: tl.constexpr):
    """The numbers of this program's COUNT work items, 64-bit where the tensor has 2^31 elements or more."""
    first = tl.program_id(0)
    if LARGE:
        first = first.to(tl.int64)
    return first * COUNT + tl.arange(0, COUNT)


@triton.jit
def load_channels(ptr, channel, START: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, MASKED: tl.constexpr):
    """N neighbouring channels from `channel` + START on, as a tuple of fp32 tensors; zero outside the group.

    The mask is constant along the vectors wherever N divides START, CHANNELS and `channel`: loads stay wide.
    """
    lane = START + tl.arange(0, N)
    ptr = tl.expand_dims(ptr, -1) + lane
    if MASKED:
        c = tl.expand_dims(channel, -1) + lane
        x = tl.load(ptr, mask=(c >= 0) & (c < CHANNELS), other=0.0)
    else:
        x = tl.load(ptr)
    return unpack(x.to(tl.float32), N)


@triton.jit
def store_channels(ptr, t, channel, mask, N: tl.constexpr, CHANNELS: tl.constexpr, MASKED: tl.constexpr):
    """The inverse of `load_channels` at START = 0, where `mask` holds."""
    lane = tl.arange(0, N)
    mask = tl.expand_dims(mask, -1)
    if MASKED:
        mask = mask & (tl.expand_dims(channel, -1) + lane < CHANNELS)
    tl.store(tl.expand_dims(ptr, -1) + lane, pack(t, N).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_window(
    ptr,
    channel,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """BELOW + N + ABOVE channels around the vector of N channels at `channel`."""
    x = load_channels(ptr, channel, 0, N, CHANNELS, CHANNELS % N != 0)
    if BELOW > 0:
        LEFT: tl.constexpr = next_power_of_2(BELOW)
        x = take(load_channels(ptr, channel, -LEFT, LEFT, CHANNELS, True), LEFT - BELOW, LEFT) + x
    if ABOVE > 0:
        RIGHT: tl.constexpr = next_power_of_2(ABOVE)
        x = x + take(load_channels(ptr, channel, N, RIGHT, CHANNELS, True), 0, ABOVE)
    return x


@triton.jit
def denominators(x, N: tl.constexpr, SIZE: tl.constexpr, SCALE: tl.constexpr, K: tl.constexpr):
    """k + alpha/size * sum of squares for the N windows of SIZE among N + SIZE - 1 values."""
    squares = ()
    for i in tl.static_range(N + SIZE - 1):
        squares = squares + (x[i] * x[i],)
    sums = window_sums(squares, N, SIZE)
    out = ()
    for i in tl.static_range(N):
        out = out + (sums[i] * SCALE + K,)
    return out


@triton.jit
def vector_offset(vector, VECTORS: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr):
    """The first channel of a vector inside its group, and where it lies in memory (64-bit)."""
    channel = vector % VECTORS * N
    if CHANNELS % N == 0:
        return channel, vector.to(tl.int64) * N
    else:
        return channel, (vector // VECTORS).to(tl.int64) * CHANNELS + channel


@triton.jit
def lrn_fwd_kernel(
    x_ptr,  # rows x CHANNELS, a row being one channel group of one pixel
    y_ptr,  # the same
    vectors,  # rows * cdiv(CHANNELS, VEC)
    CHANNELS: tl.constexpr,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    ASM: tl.constexpr,
    LARGE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channels last, one vector of VEC channels per thread: 13.5 instructions per fp16 element on sm_90."""
    # Clamped: the last threads write equal values twice. A mask on `vectors` would cost the 16-byte loads.
    vector = tl.minimum(work_items(BLOCK, LARGE), vectors - 1)
    channel, offset = vector_offset(vector, tl.cdiv(CHANNELS, VEC), CHANNELS, VEC)
    x = load_window(x_ptr + offset, channel, BELOW, ABOVE, VEC, CHANNELS)
    d = denominators(x, VEC, BELOW + 1 + ABOVE, SCALE, K)
    y = ()
    for i in tl.static_range(VEC):
        y = y + (x[BELOW + i] * inverse_power(d[i], BETA, ASM),)
    store_channels(y_ptr + offset, y, channel, channel >= 0, VEC, CHANNELS, CHANNELS % VEC != 0)


@triton.jit
def gradient_terms(g, x, d, BETA: tl.constexpr, ASM: tl.constexpr):
    """u = g * d^-beta and t = u * x / d, the direct part of the gradient and what the neighbours receive.

    1/d goes in as two roots: their products with u and x stay in range where d^-1 does not.
    """
    r = tl.rsqrt(d)
    u = g * inverse_power(d, BETA, ASM)
    return u, (u * r) * (x * r)


@triton.jit
def lrn_bwd_kernel(
    x_ptr,  # rows x CHANNELS, a row being one channel group of one pixel
    g_ptr,  # the same
    dx_ptr,  # the same
    vectors,  # rows * cdiv(CHANNELS, VEC)
    CHANNELS: tl.constexpr,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    ASM: tl.constexpr,
    LARGE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channels last, one vector of VEC channels per thread; the halo of t comes from the neighbouring lanes.

    Shuffling that halo takes 26 instructions per fp16 element on sm_90, recomputing it a third more, although
    the outer two of 32 lanes store nothing.
    """
    lane = tl.arange(0, EXCHANGING)
    INNER: tl.constexpr = EXCHANGING - FEEDING
    warp = work_items(BLOCK // EXCHANGING, LARGE)
    position = tl.expand_dims(warp * INNER - 1, 1) + tl.expand_dims(lane, 0)
    vector = tl.minimum(tl.maximum(position, 0), vectors - 1)
    stored = (position < vectors) & tl.expand_dims((lane > 0) & (lane < EXCHANGING - 1), 0)
    channel, offset = vector_offset(vector, tl.cdiv(CHANNELS, VEC), CHANNELS, VEC)

    x = load_window(x_ptr + offset, channel, BELOW, ABOVE, VEC, CHANNELS)
    g = load_channels(g_ptr + offset, channel, 0, VEC, CHANNELS, CHANNELS % VEC != 0)
    d = denominators(x, VEC, BELOW + 1 + ABOVE, SCALE, K)
    us = ()
    ts = ()
    for i in tl.static_range(VEC):
        u, t = gradient_terms(g[i], x[BELOW + i], d[i], BETA, ASM)
        us = us + (u,)
        ts = ts + (t,)

    # the adjoint window reaches ABOVE channels down and BELOW channels up
    previous = tl.broadcast_to(tl.expand_dims(tl.maximum(lane - 1, 0), 0), position.shape)
    following = tl.broadcast_to(tl.expand_dims(tl.minimum(lane + 1, EXCHANGING - 1), 0), position.shape)
    around = ()
    for i in tl.static_range(VEC - ABOVE, VEC):
        around = around + (tl.where(channel > 0, tl.gather(ts[i], previous, 1), 0.0),)
    around = around + ts
    for i in tl.static_range(BELOW):
        around = around + (tl.where(channel + VEC < CHANNELS, tl.gather(ts[i], following, 1), 0.0),)
    sums = window_sums(around, VEC, BELOW + 1 + ABOVE)
    dx = ()
    for i in tl.static_range(VEC):
        dx = dx + (us[i] - (x[BELOW + i] * (2 * SCALE * BETA)) * sums[i],)
    store_channels(dx_ptr + offset, dx, channel, stored, VEC, CHANNELS, CHANNELS % VEC != 0)


@triton.jit
def load_nchw(
    ptr,
    first,
    START: tl.constexpr,
    STOP: tl.constexpr,
    N: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Channels `first` + START up to `first` + STOP of each pixel, fp32; zero outside the group.

    N divides `first`.  PLANE is a constant because the addresses then are: 11 instructions per element less.
    """
    out = ()
    for i in tl.static_range(START, STOP):
        if i >= 0 and i < N and CHANNELS % N == 0:
            x = tl.load(ptr + i * PLANE)
        else:
            # the same for all pixels: costs a predicate, not a mask per element
            x = tl.load(ptr + i * PLANE, mask=(first + i >= 0) & (first + i < CHANNELS), other=0.0)
        out = out + (x.to(tl.float32),)
    return out


@triton.jit
def store_nchw(ptr, t, first, N: tl.constexpr, PLANE: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of `load_nchw` for START = 0 and STOP = N."""
    for i in tl.static_range(N):
        value = t[i].to(ptr.dtype.element_ty)
        if CHANNELS % N == 0:
            tl.store(ptr + i * PLANE, value)
        else:
            tl.store(ptr + i * PLANE, value, mask=first + i < CHANNELS)


@triton.jit
def pixel_chunk(
    pixels,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
):
    """The first channel of this program's chunk and the offset (64-bit) of that channel of each pixel.

    Chunks of the same pixels are neighbours in the grid: their common halo is read from DRAM once.
    """
    CHUNKS: tl.constexpr = tl.cdiv(CHANNELS, CHUNK)
    program = tl.program_id(0)
    block = program // CHUNKS
    first = (program - block * CHUNKS) * CHUNK
    if LARGE:
        block = block.to(tl.int64)
    pixel = tl.minimum(block * BLOCK + tl.arange(0, BLOCK), pixels - 1)
    group = pixel // PLANE
    offset = (group.to(tl.int64) * CHANNELS + first) * PLANE + (pixel - group * PLANE)
    return first, offset


@triton.jit
def lrn_fwd_nchw_kernel(
    x_ptr,  # (N, groups, CHANNELS, plane)
    y_ptr,  # the same
    pixels,  # N * groups * plane
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    ASM: tl.constexpr,
    LARGE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Contiguous, CHUNK channels of one pixel per thread.  Planes of odd size allow no wider loads."""
    first, offset = pixel_chunk(pixels, PLANE, CHANNELS, CHUNK, BLOCK, LARGE)
    # all loads come before the first store: the compiler moves no load over a store
    x = load_nchw(x_ptr + offset, first, -BELOW, CHUNK + ABOVE, CHUNK, PLANE, CHANNELS)
    d = denominators(x, CHUNK, BELOW + 1 + ABOVE, SCALE, K)
    y = ()
    for i in tl.static_range(CHUNK):
        y = y + (x[BELOW + i] * inverse_power(d[i], BETA, ASM),)
    store_nchw(y_ptr + offset, y, first, CHUNK, PLANE, CHANNELS)


@triton.jit
def lrn_bwd_nchw_kernel(
    x_ptr,  # (N, groups, CHANNELS, plane)
    g_ptr,  # the same
    dx_ptr,  # the same
    pixels,  # N * groups * plane
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    ASM: tl.constexpr,
    LARGE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Contiguous, CHUNK channels of one pixel per thread, t recomputed in the halo."""
    SIZE: tl.constexpr = BELOW + 1 + ABOVE
    REACH: tl.constexpr = BELOW + ABOVE
    first, offset = pixel_chunk(pixels, PLANE, CHANNELS, CHUNK, BLOCK, LARGE)
    x = load_nchw(x_ptr + offset, first, -REACH, CHUNK + REACH, CHUNK, PLANE, CHANNELS)
    g = load_nchw(g_ptr + offset, first, -ABOVE, CHUNK + BELOW, CHUNK, PLANE, CHANNELS)
    d = denominators(x, CHUNK + REACH, SIZE, SCALE, K)
    us = ()
    ts = ()
    for i in tl.static_range(CHUNK + REACH):
        u, t = gradient_terms(g[i], x[BELOW + i], d[i], BETA, ASM)
        us = us + (u,)
        ts = ts + (t,)
    sums = window_sums(ts, CHUNK, SIZE)
    dx = ()
    for i in tl.static_range(CHUNK):
        dx = dx + (us[ABOVE + i] - (x[REACH + i] * (2 * SCALE * BETA)) * sums[i],)
    store_nchw(dx_ptr + offset, dx, first, CHUNK, PLANE, CHANNELS)


@triton.jit
def shifted_sums(t, channel, BELOW: tl.constexpr, ABOVE: tl.constexpr, CHANNELS: tl.constexpr):
    """Window sums over the second dimension of t, in the order of the channels."""
    total = tl.zeros(t.shape, tl.float32)
    for shift in range(-BELOW, ABOVE + 1):
        source = channel + shift
        inside = (source >= 0) & (source < CHANNELS)
        index = tl.broadcast_to(tl.where(inside, source, 0), t.shape)
        total += tl.where(inside, tl.gather(t, index, 1), 0.0)
    return total


@triton.jit
def row_offsets(rows, plane, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, LARGE: tl.constexpr):
    """Channel numbers (1, TILE), offsets and mask (BLOCK, TILE) of whole channel groups, in either layout."""
    row = tl.expand_dims(tl.minimum(work_items(BLOCK, LARGE), rows - 1), 1)
    channel = tl.expand_dims(tl.arange(0, TILE), 0)
    group = row // plane
    offset = (group.to(tl.int64) * CHANNELS + channel) * plane + (row - group * plane)
    return channel, offset, (channel < CHANNELS) & (row >= 0)


@triton.jit
def lrn_fwd_any_window_kernel(
    x_ptr,  # (rows / plane, CHANNELS, plane); channels last is plane = 1
    y_ptr,  # the same
    rows,
    plane,
    CHANNELS: tl.constexpr,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    ASM: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Any window: BLOCK whole channel groups per program, neighbours by gather instead of memory."""
    channel, offset, mask = row_offsets(rows, plane, CHANNELS, BLOCK, TILE, LARGE)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    d = shifted_sums(x * x, channel, BELOW, ABOVE, CHANNELS) * SCALE + K
    y = x * inverse_power(d, BETA, ASM)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lrn_bwd_any_window_kernel(
    x_ptr,  # (rows / plane, CHANNELS, plane); channels last is plane = 1
    g_ptr,  # the same
    dx_ptr,  # the same
    rows,
    plane,
    CHANNELS: tl.constexpr,
    BELOW: tl.constexpr,
    ABOVE: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    ASM: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Any window: BLOCK whole channel groups per program, neighbours by gather instead of memory."""
    channel, offset, mask = row_offsets(rows, plane, CHANNELS, BLOCK, TILE, LARGE)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    d = shifted_sums(x * x, channel, BELOW, ABOVE, CHANNELS) * SCALE + K
    u, t = gradient_terms(g, x, d, BETA, ASM)
    dx = u - (x * (2 * SCALE * BETA)) * shifted_sums(t, channel, ABOVE, BELOW, CHANNELS)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Pass:
    """The kernels of one direction and how much work a program of them takes."""

    channels_last: Callable
    nchw: Callable
    any_window: Callable
    # threads of a program of the channels-last kernel, and vectors that it stores
    threads: int
    vectors: int


FORWARD = Pass(lrn_fwd_kernel, lrn_fwd_nchw_kernel, lrn_fwd_any_window_kernel, THREADS, THREADS)
# One warp, which waits for no other where it exchanges its halo.
BACKWARD = Pass(lrn_bwd_kernel, lrn_bwd_nchw_kernel, lrn_bwd_any_window_kernel, LANES, LANES // 32 * 30)


def check(x, size, groups):
    if x.dim() < 3:
        raise ValueError(f"x must have 3 or more dimensions (N, C, ...), got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be fp16, bf16 or fp32, got {x.dtype}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")


def vector_size(channels, width, reach):
    """Channels per thread: a full vector, or less where that divides the channels and covers the halo."""
    divisor = math.gcd(channels, width)
    return divisor if divisor >= max(4, reach) else min(width, triton.next_power_of_2(channels))


def chunk_size(channels):
    """Channels per thread of the NCHW kernels: a divisor that needs no masks, unless it is small."""
    divisor = next(n for n in range(min(channels, CHUNK), 0, -1) if channels % n == 0)
    return divisor if 2 * divisor >= CHUNK else min(channels, CHUNK)


def launch(direction, tensors, size, alpha, beta, k, groups):
    """Run the kernel of `direction` that fits window and layout; tensors: equal strides, x first."""
    x = tensors[0]
    if x.numel() == 0:
        return
    channels = x.shape[1] // groups
    rows = x.numel() // channels
    plane = 1 if is_channels_last(x) else x[0, 0].numel()
    # a window that reaches past the group from everywhere is as wide as the group
    below, above = min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)
    vec = vector_size(channels, vector_width(x.dtype), max(below, above))
    constants = {
        "CHANNELS": channels,
        "BELOW": below,
        "ABOVE": above,
        "SCALE": float(alpha) / size,
        "BETA": float(beta),
        "K": float(k),
        "ASM": use_asm(),
        # work items are 32-bit and never more than elements, but for the last program's surplus
        "LARGE": x.numel() >= 2**31 - 2**16,
    }
    threads = direction.threads if is_channels_last(x) and max(below, above) <= vec else THREADS
    constants["num_warps"] = warps(threads)
    if is_channels_last(x) and max(below, above) <= vec:
        vectors = rows * triton.cdiv(channels, vec)
        grid = (triton.cdiv(vectors, direction.vectors),)
        direction.channels_last[grid](*tensors, vectors, **constants, VEC=vec, BLOCK=threads)
    elif not is_channels_last(x) and max(below, above) <= MAX_HALO:
        chunk = chunk_size(channels)
        grid = (triton.cdiv(rows, THREADS) * triton.cdiv(channels, chunk),)
        direction.nchw[grid](*tensors, rows, PLANE=plane, **constants, CHUNK=chunk, BLOCK=THREADS)
    else:
        tile = triton.next_power_of_2(channels)
        block = max(1, ANY_WINDOW_TILE // tile)
        grid = (triton.cdiv(rows, block),)
        direction.any_window[grid](*tensors, rows, plane, **constants, BLOCK=block, TILE=tile)


def lrn_fwd(x, size, alpha, beta, k, groups=1):
    """y = x / (k + alpha/size * sum of x^2 over the window of channels) ** beta.

    x: (N, C, ...) of 3 or more dimensions, fp16, bf16 or fp32.  Packed channels-last and contiguous memory is
    read in place, anything else is copied to the nearer of the two first.  `size` is odd or even; `groups`
    channel groups are normalised apart; k + alpha/size * sum must be positive (NaN where it is not).
    Squares above the fp32 range (|x| > 1.8e19) count as infinite.

    Returns y in x's shape, dtype and memory format.  Raises ValueError for a wrong rank, dtype, size or group
    count.
    """
    check(x, size, groups)
    x = dense(x)
    y = torch.empty_like(x)
    launch(FORWARD, (x, y), size, alpha, beta, k, groups)
    return y


def lrn_bwd(grad, x, size, alpha, beta, k, groups=1):
    """The gradient of `lrn_fwd` with respect to x, from the gradient with respect to y.

    grad: shape and dtype of x, any strides.  Everything else as in `lrn_fwd`.
    """
    check(x, size, groups)
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(
            f"grad must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}, got {tuple(grad.shape)} {grad.dtype}"
        )
    x = dense(x)
    dx = torch.empty_like(x)
    launch(BACKWARD, (x, in_layout_of(x, grad), dx), size, alpha, beta, k, groups)
    return dx
