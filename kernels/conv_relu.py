"""Convolution, bias and ReLU in one kernel: y = max(0, conv2d(x, weight) + bias), in four forms.

Memory is channels last throughout, and a weight (K, C/groups, R, S) in channels-last memory is the matrix that the
product needs: no form copies or repacks anything.

- `batch_tiled`: a program computes one output pixel for 128 or 256 images (Krizhevsky's layout of 2012, turned round).
  Which taps lie in the padding is then one decision per program, and they are skipped: 10 % of the products of a
  13x13 layer with 3x3 taps, 9 % of 27x27 with 5x5.  No masks, no division, no wasted rows for batches of 128 and more.
- `descriptors`: the same on two-dimensional tensor descriptors (TMA), for sm_90 and later.
- `spatial`: a program computes 64 or 128 consecutive output pixels, across images; rows whose tap lies in the padding
  are masked by one bit per row of taps and one per column.  For batches below 128.
- `split_k`: as `spatial`, with the sum cut into parts that run side by side, and a second kernel that adds them up in
  a fixed order.  For batch 1, where a layer has too few pixels to fill a GPU.

The sum is fp32 in all of them and is rounded once.  Two runs give equal bits.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .geometry import output_size
from .implicit_gemm import (
    capability,
    descriptor,
    multiply_add,
    next_step,
    split_tile,
    tap_bits,
    tap_range,
)
from .registers import DTYPES, interpreting, warps

FORMS = ("batch_tiled", "descriptors", "spatial", "split_k")


# ------------------------------------------------------------------------------------------------- kernels
@triton.jit
def relu_of(acc, bias_ptr, feature, end, WHOLE: tl.constexpr, RELU: tl.constexpr):
    """max(0, acc + bias), NaN kept; `feature`: the columns' output channels, below `end` if WHOLE."""
    if bias_ptr is not None:
        if WHOLE:
            # unmasked: a thread of sm_100 holds all columns, and reads them 16 bytes at a time
            bias = tl.load(bias_ptr + feature)
        else:
            bias = tl.load(bias_ptr + feature, mask=feature < end, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return acc


@triton.jit
def load_inputs(pointers, inside, channel, left, WHOLE: tl.constexpr):
    """rows x channels of x, zero where a row is not `inside` (None: all are) or `left` channels are passed."""
    if WHOLE:
        if inside is None:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        if inside is None:
            return tl.load(pointers, mask=(channel < left)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=inside[:, None] & (channel < left)[None, :], other=0.0)


@triton.jit
def load_weights(pointers, channel, left, WHOLE: tl.constexpr):
    """channels x features of the weight, zero where `left` channels are passed."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(channel < left)[:, None], other=0.0)


@triton.jit
def weight_rows(weight_ptr, feature, last, LENGTH: tl.constexpr):
    """Pointers to the rows of these features, a row vector.  Clamped: a mask would cost the loads their width."""
    return (weight_ptr + tl.minimum(feature, last) * LENGTH)[None, :]


@triton.jit
def conv_relu_batch_kernel(
    x_ptr,  # (N, H, W, GROUPS * CHANNELS)
    weight_ptr,  # (GROUPS * FEATURES, R, S, CHANNELS)
    bias_ptr,  # GROUPS * FEATURES, or None
    y_ptr,  # (N, OH, OW, GROUPS * FEATURES)
    n,  # images
    h,
    w,
    oh,
    ow,
    image,  # elements of an image of x
    out_image,  # and of y
    CHANNELS: tl.constexpr,  # per group
    FEATURES: tl.constexpr,  # output channels per group
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROWS: tl.constexpr,  # images per program
    COLUMNS: tl.constexpr,  # features per program: COLUMNS + COLUMNS_B
    COLUMNS_B: tl.constexpr,
    DEPTH: tl.constexpr,  # channels per step: DEPTH + DEPTH_B
    DEPTH_B: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One output pixel, ROWS images, one tile of features.  Neighbouring programs share their part of x."""
    TILE: tl.constexpr = COLUMNS + COLUMNS_B
    STEP: tl.constexpr = DEPTH + DEPTH_B
    WHOLE: tl.constexpr = CHANNELS % STEP == 0
    tl.static_assert(WHOLE or DEPTH_B == 0)
    TILES: tl.constexpr = (FEATURES + TILE - 1) // TILE
    XC: tl.constexpr = GROUPS * CHANNELS
    YC: tl.constexpr = GROUPS * FEATURES
    LENGTH: tl.constexpr = R * S * CHANNELS
    program = tl.program_id(0)
    column_tile = program % (TILES * GROUPS)
    pixel = program // (TILES * GROUPS)
    block = pixel // (oh * ow)
    pixel = pixel % (oh * ow)
    group = column_tile // TILES
    group_end = (group + 1) * FEATURES
    top = pixel // ow * STRIDE_H - TOP
    left = pixel % ow * STRIDE_W - LEFT

    index = block * ROWS + tl.arange(0, ROWS)
    present = index < n
    # the last image again instead of a mask; what comes of it is not stored
    x_rows = x_ptr + (tl.minimum(index, n - 1).to(tl.int64) * image + group * CHANNELS)[:, None]
    feature = group * FEATURES + column_tile % TILES * TILE + tl.arange(0, COLUMNS)
    w_rows = weight_rows(weight_ptr, feature, group_end - 1, LENGTH)
    k = tl.arange(0, DEPTH)
    x_a = x_rows + k[None, :]
    w_a = w_rows + k[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if DEPTH_B > 0:
        k_b = DEPTH + tl.arange(0, DEPTH_B)
        x_b = x_rows + k_b[None, :]
        w_b = w_rows + k_b[:, None]
    if COLUMNS_B > 0:
        feature_b = group * FEATURES + column_tile % TILES * TILE + COLUMNS + tl.arange(0, COLUMNS_B)
        w_rows_b = weight_rows(weight_ptr, feature_b, group_end - 1, LENGTH)
        w_a_b = w_rows_b + k[:, None]
        acc_b = tl.zeros([ROWS, COLUMNS_B], tl.float32)
        if DEPTH_B > 0:
            w_b_b = w_rows_b + k_b[:, None]

    r_first, r_stop = tap_range(top, h, R, DILATION_H)
    s_first, s_stop = tap_range(left, w, S, DILATION_W)
    r = r_first
    s = s_first
    c = 0
    for _ in range((r_stop - r_first) * (s_stop - s_first) * ((CHANNELS + STEP - 1) // STEP)):
        at = ((top + r * DILATION_H) * w + left + s * DILATION_W) * XC + c
        w_at = (r * S + s) * CHANNELS + c
        # the short product first: sm_90 waits for it before the long one, which it leaves running through the rest
        if DEPTH_B > 0:
            b = tl.load(x_b + at)
            acc = multiply_add(b, tl.load(w_b + w_at), acc, PRECISION, WIDEN)
            if COLUMNS_B > 0:
                acc_b = multiply_add(b, tl.load(w_b_b + w_at), acc_b, PRECISION, WIDEN)
        a = load_inputs(x_a + at, None, k, CHANNELS - c, WHOLE)
        acc = multiply_add(a, load_weights(w_a + w_at, k, CHANNELS - c, WHOLE), acc, PRECISION, WIDEN)
        if COLUMNS_B > 0:
            acc_b = multiply_add(a, load_weights(w_a_b + w_at, k, CHANNELS - c, WHOLE), acc_b, PRECISION, WIDEN)
        r, s, c = next_step(r, s, c, s_first, s_stop, CHANNELS, STEP)

    y_rows = y_ptr + (index.to(tl.int64) * out_image + pixel * YC)[:, None]
    inside = feature < group_end
    y = relu_of(acc, bias_ptr, feature, group_end, FEATURES % TILE == 0, RELU).to(y_ptr.dtype.element_ty)
    tl.store(y_rows + feature[None, :], y, mask=present[:, None] & inside[None, :])
    if COLUMNS_B > 0:
        inside = feature_b < group_end
        y_b = relu_of(acc_b, bias_ptr, feature_b, group_end, FEATURES % TILE == 0, RELU).to(y_ptr.dtype.element_ty)
        tl.store(y_rows + feature_b[None, :], y_b, mask=present[:, None] & inside[None, :])


@triton.jit
def conv_relu_descriptor_kernel(
    x_a,  # descriptors of x as (N, H * W * GROUPS * CHANNELS): blocks of ROWS x DEPTH
    x_b,  # ROWS x DEPTH_B, or None
    w_a,  # of the weight as (GROUPS * FEATURES, R * S * CHANNELS): COLUMNS x DEPTH
    w_b,  # COLUMNS x DEPTH_B, or None
    w_a_b,  # COLUMNS_B x DEPTH, or None
    w_b_b,  # COLUMNS_B x DEPTH_B, or None
    bias_ptr,  # GROUPS * FEATURES, or None
    y_a,  # of y as (N, OH * OW * GROUPS * FEATURES): ROWS x COLUMNS
    y_b,  # ROWS x COLUMNS_B, or None
    h,
    w,
    oh,
    ow,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMNS_B: tl.constexpr,
    DEPTH: tl.constexpr,
    DEPTH_B: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """conv_relu_batch_kernel on descriptors; images beyond the batch read as zeros and are not stored."""
    TILE: tl.constexpr = COLUMNS + COLUMNS_B
    STEP: tl.constexpr = DEPTH + DEPTH_B
    tl.static_assert(CHANNELS % STEP == 0)
    tl.static_assert(FEATURES % TILE == 0)
    TILES: tl.constexpr = FEATURES // TILE
    program = tl.program_id(0)
    column_tile = program % (TILES * GROUPS)
    pixel = program // (TILES * GROUPS)
    first = pixel // (oh * ow) * ROWS
    pixel = pixel % (oh * ow)
    group = column_tile // TILES
    # FEATURES is a multiple of TILE: tiles number the features of all groups
    feature = column_tile * TILE
    top = pixel // ow * STRIDE_H - TOP
    left = pixel % ow * STRIDE_W - LEFT

    r_first, r_stop = tap_range(top, h, R, DILATION_H)
    s_first, s_stop = tap_range(left, w, S, DILATION_W)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if COLUMNS_B > 0:
        acc_b = tl.zeros([ROWS, COLUMNS_B], tl.float32)
    r = r_first
    s = s_first
    c = 0
    steps = (r_stop - r_first) * (s_stop - s_first) * (CHANNELS // STEP)
    for _ in tl.range(0, steps, warp_specialize=WARP_SPECIALIZE):
        at = ((top + r * DILATION_H) * w + left + s * DILATION_W) * (GROUPS * CHANNELS) + group * CHANNELS + c
        w_at = (r * S + s) * CHANNELS + c
        # the short product first: sm_90 waits for it before the long one, which it leaves running through the rest
        if DEPTH_B > 0:
            b = x_b.load([first, at + DEPTH])
            acc = multiply_add(b, w_b.load([feature, w_at + DEPTH]).T, acc, PRECISION, WIDEN)
            if COLUMNS_B > 0:
                acc_b = multiply_add(b, w_b_b.load([feature + COLUMNS, w_at + DEPTH]).T, acc_b, PRECISION, WIDEN)
        a = x_a.load([first, at])
        acc = multiply_add(a, w_a.load([feature, w_at]).T, acc, PRECISION, WIDEN)
        if COLUMNS_B > 0:
            acc_b = multiply_add(a, w_a_b.load([feature + COLUMNS, w_at]).T, acc_b, PRECISION, WIDEN)
        r, s, c = next_step(r, s, c, s_first, s_stop, CHANNELS, STEP)

    out = pixel * (GROUPS * FEATURES) + feature
    y = relu_of(acc, bias_ptr, feature + tl.arange(0, COLUMNS), GROUPS * FEATURES, True, RELU)
    y_a.store([first, out], y.to(y_a.dtype))
    if COLUMNS_B > 0:
        y = relu_of(acc_b, bias_ptr, feature + COLUMNS + tl.arange(0, COLUMNS_B), GROUPS * FEATURES, True, RELU)
        y_b.store([first, out + COLUMNS], y.to(y_b.dtype))


@triton.jit
def conv_relu_spatial_kernel(
    x_ptr,  # (N, H, W, GROUPS * CHANNELS)
    weight_ptr,  # (GROUPS * FEATURES, R, S, CHANNELS)
    bias_ptr,  # GROUPS * FEATURES, or None
    y_ptr,  # pixels x GROUPS * FEATURES; PARTS of them, fp32 sums without bias and ReLU, if PARTS > 1
    pixels,  # N * OH * OW
    h,
    w,
    oh,
    ow,
    image,  # elements of an image of x
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROWS: tl.constexpr,  # pixels per program
    COLUMNS: tl.constexpr,
    COLUMNS_B: tl.constexpr,
    DEPTH: tl.constexpr,
    DEPTH_B: tl.constexpr,
    PARTS: tl.constexpr,  # of the sum
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """ROWS consecutive output pixels, one tile of features, one part of the sum."""
    TILE: tl.constexpr = COLUMNS + COLUMNS_B
    STEP: tl.constexpr = DEPTH + DEPTH_B
    WHOLE: tl.constexpr = CHANNELS % STEP == 0
    tl.static_assert(WHOLE or DEPTH_B == 0)
    TILES: tl.constexpr = (FEATURES + TILE - 1) // TILE
    XC: tl.constexpr = GROUPS * CHANNELS
    YC: tl.constexpr = GROUPS * FEATURES
    LENGTH: tl.constexpr = R * S * CHANNELS
    CHUNKS: tl.constexpr = (CHANNELS + STEP - 1) // STEP
    program = tl.program_id(0)
    column_tile = program % (TILES * GROUPS)
    row_tile = program // (TILES * GROUPS)
    part = row_tile % PARTS
    group = column_tile // TILES
    group_end = (group + 1) * FEATURES

    pixel = row_tile // PARTS * ROWS + tl.arange(0, ROWS)
    present = pixel < pixels
    index = pixel // (oh * ow)
    within = pixel % (oh * ow)
    top = within // ow * STRIDE_H - TOP
    left = within % ow * STRIDE_W - LEFT
    r_bits = tl.where(present, tap_bits(top, h, R, DILATION_H), 0)
    s_bits = tap_bits(left, w, S, DILATION_W)

    x_rows = x_ptr + (index.to(tl.int64) * image + ((top * w + left) * XC + group * CHANNELS))[:, None]
    feature = group * FEATURES + column_tile % TILES * TILE + tl.arange(0, COLUMNS)
    w_rows = weight_rows(weight_ptr, feature, group_end - 1, LENGTH)
    k = tl.arange(0, DEPTH)
    x_a = x_rows + k[None, :]
    w_a = w_rows + k[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if DEPTH_B > 0:
        k_b = DEPTH + tl.arange(0, DEPTH_B)
        x_b = x_rows + k_b[None, :]
        w_b = w_rows + k_b[:, None]
    if COLUMNS_B > 0:
        feature_b = group * FEATURES + column_tile % TILES * TILE + COLUMNS + tl.arange(0, COLUMNS_B)
        w_rows_b = weight_rows(weight_ptr, feature_b, group_end - 1, LENGTH)
        w_a_b = w_rows_b + k[:, None]
        acc_b = tl.zeros([ROWS, COLUMNS_B], tl.float32)
        if DEPTH_B > 0:
            w_b_b = w_rows_b + k_b[:, None]

    PER_PART: tl.constexpr = (R * S * CHUNKS + PARTS - 1) // PARTS
    first = part * PER_PART
    stop = tl.minimum(first + PER_PART, R * S * CHUNKS)
    r = first // (S * CHUNKS)
    s = first // CHUNKS % S
    c = first % CHUNKS * STEP
    for _ in range(stop - first):
        at = (r * DILATION_H * w + s * DILATION_W) * XC + c
        w_at = (r * S + s) * CHANNELS + c
        inside = ((r_bits >> r) & (s_bits >> s) & 1) != 0
        # the short product first: sm_90 waits for it before the long one, which it leaves running through the rest
        if DEPTH_B > 0:
            b = load_inputs(x_b + at, inside, k, CHANNELS, True)
            acc = multiply_add(b, tl.load(w_b + w_at), acc, PRECISION, WIDEN)
            if COLUMNS_B > 0:
                acc_b = multiply_add(b, tl.load(w_b_b + w_at), acc_b, PRECISION, WIDEN)
        a = load_inputs(x_a + at, inside, k, CHANNELS - c, WHOLE)
        acc = multiply_add(a, load_weights(w_a + w_at, k, CHANNELS - c, WHOLE), acc, PRECISION, WIDEN)
        if COLUMNS_B > 0:
            acc_b = multiply_add(a, load_weights(w_a_b + w_at, k, CHANNELS - c, WHOLE), acc_b, PRECISION, WIDEN)
        r, s, c = next_step(r, s, c, 0, S, CHANNELS, STEP)

    y_rows = y_ptr + ((part.to(tl.int64) * pixels + pixel) * YC)[:, None]
    inside = feature < group_end
    if PARTS == 1:
        acc = relu_of(acc, bias_ptr, feature, group_end, FEATURES % TILE == 0, RELU)
    tl.store(y_rows + feature[None, :], acc.to(y_ptr.dtype.element_ty), mask=present[:, None] & inside[None, :])
    if COLUMNS_B > 0:
        inside = feature_b < group_end
        if PARTS == 1:
            acc_b = relu_of(acc_b, bias_ptr, feature_b, group_end, FEATURES % TILE == 0, RELU)
        tl.store(y_rows + feature_b[None, :], acc_b.to(y_ptr.dtype.element_ty), mask=present[:, None] & inside[None, :])


@triton.jit
def sum_parts_kernel(
    parts_ptr,  # PARTS x count, fp32
    bias_ptr,  # FEATURES, or None
    y_ptr,  # count
    count,
    FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """max(0, sum of the parts + bias), parts added in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.load(parts_ptr + i, mask=inside, other=0.0)
    at = i
    for _ in tl.static_range(1, PARTS):
        at += count
        total += tl.load(parts_ptr + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + i % FEATURES, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------- configurations
@dataclass(frozen=True)
class Config:
    """How a form cuts its work: tiles of `rows` x `columns` outputs, `depth` input channels per step of the sum.

    columns, depth: (a, b), one tile of a and one of b channels, b = 0 for none (`implicit_gemm.split_tile`).
    parts: of the sum, for `split_k`.
    """

    rows: int
    columns: tuple[int, int]
    depth: tuple[int, int]
    num_warps: int
    num_stages: int
    warp_specialize: bool = False
    parts: int = 1


# Programs that fill a large GPU once: 132 multiprocessors.
ENOUGH_PROGRAMS = 132
# A part of the sum shorter than this spends its time filling the pipeline.
MIN_STEPS = 4
# A tile of 128 x 96 sums is 96 registers per thread with 4 warps, and its narrowest copies are wider than with 8.
FOUR_WARPS = 128 * 96
# Of shared memory, for the pipeline of sm_90 and sm_100: 227 KB less the tile that is stored.
PIPELINE_BYTES = 200 * 1024


@functools.lru_cache(maxsize=1024)
def heuristic(form, images, pixels, weight_shape, groups, dtype, precision, target):
    """The configuration of a form: `pixels` = OH * OW outputs of each image, for a `capability`."""
    features, channels = weight_shape[0] // groups, weight_shape[1]
    ieee = dtype == torch.float32 and precision == "ieee"
    # wgmma and tcgen05, which want 128 rows and read tiles from shared memory
    large = target in (90, 100) and not ieee
    # 128 bytes of a row, the widest swizzle; products without tensor cores reread shared memory and gain nothing
    depth = split_tile(channels, 16 if ieee else 128 // dtype.itemsize)
    # products without tensor cores need registers for their factors, too
    four_warps = 64 * 64 if ieee else FOUR_WARPS

    if form in ("batch_tiled", "descriptors"):
        # powers of two: what is compiled does not follow every batch
        rows = min(128, max(128 if large else 16, triton.next_power_of_2(images)))
        columns = (128, 64) if large and features % 192 == 0 else split_tile(features, 128)
        # L2 to shared memory, bytes per multiply-add: 256 x 128 needs 3/4 of 128 x 128, and 256 x 192 7/12.  Twice
        # the threads would halve the copies of a narrow tile of weights, which TMA does not mind.
        wide = form == "descriptors" or sum(columns) >= 128
        if large and wide and dtype.itemsize == 2 and triton.cdiv(images, 256) * 2 <= triton.cdiv(images, 128):
            rows = 256
        if ieee and form == "descriptors":
            # tiles of TMA lie across what FFMA reads, which takes registers: 443 spills with 128 x 128
            columns = split_tile(features, 32 if features % 64 else 64)
            return Config(rows, columns, depth, min(8, rows // 16), 3)
        # AMD has 64 KB of shared memory
        stages = 3 if target else 2
        if form == "descriptors" and target == 90:
            stages = min(4, PIPELINE_BYTES // ((rows + sum(columns)) * sum(depth) * dtype.itemsize))
        # 16 rows each: beyond that, warps would compute the same
        warps = min(4 if rows * sum(columns) <= four_warps else 8, rows // 16)
        return Config(rows, columns, depth, warps, stages, form == "descriptors" and target == 100)

    rows = 128
    # 64 x 64 makes four programs of one and needs twice the bytes from L2 per multiply-add
    if form == "split_k" or images * pixels * weight_shape[0] < 128 * 128 * ENOUGH_PROGRAMS // 2:
        rows = 64
    columns = split_tile(features, rows)
    parts = 1
    if form == "split_k":
        programs = triton.cdiv(images * pixels, rows) * triton.cdiv(features, sum(columns)) * groups
        steps = weight_shape[2] * weight_shape[3] * triton.cdiv(channels, sum(depth))
        parts = max(1, min(triton.cdiv(ENOUGH_PROGRAMS, programs), steps // MIN_STEPS))
        # as many as there are, none empty
        parts = triton.cdiv(steps, triton.cdiv(steps, parts))
    if dtype == torch.float32 and channels % sum(depth):
        # masked, and loaded one by one: with 4 warps, the addresses of so many rows are 4 to 36 spills
        four_warps //= 2
    warps = 4 if rows * sum(columns) <= four_warps else 8
    # the pipeline holds one tile less than it has stages; a third one of 128 x 192, or in tf32 of 48 channels, would be
    # too much for the 99 KB of sm_86, sm_89 and sm_120
    three = 3 * (rows + sum(columns)) * sum(depth) * dtype.itemsize
    fits = sum(columns) <= 128 and not (target in (86, 89, 120) and three > 99 * 1024)
    stages = (4 if fits else 3) if target else 2
    return Config(rows, columns, depth, warps, stages, parts=parts)


# ------------------------------------------------------------------------------------------------- launchers
def unsupported(form, x, weight, stride, padding, dilation, groups):
    """Why `form` cannot compute this convolution, or None if it can.  Reads shapes, dtypes and offsets only.

    Valid arguments are assumed (`conv_relu` says what they are).  Whether a form is worth taking is another question:
    `descriptors` runs below sm_90, too, but as loads of single elements.
    """
    groups_channels, features = weight.shape[1], weight.shape[0] // groups
    oh, ow = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if max(x[0].numel() if x.shape[0] else 0, oh * ow * weight.shape[0], weight.numel()) >= 2**31:
        return "an image, its output or the weight has 2**31 elements or more"
    if form in ("spatial", "split_k"):
        if max(weight.shape[2:]) > 31:
            return f"needs a kernel of at most 31 x 31, got {tuple(weight.shape[2:])}"
        if x.shape[0] * oh * ow >= 2**31:
            return f"needs fewer than 2**31 output pixels, got {x.shape[0] * oh * ow}"
    if form == "descriptors":
        if capability() == 0:
            return "needs an NVIDIA GPU"
        for name, count in (("input", groups_channels), ("output", features)):
            if count % 16:
                return f"needs {name} channels per group in multiples of 16, got {count}"
        for name, tensor in (("x", x), ("weight", weight)):
            if tensor.storage_offset() * tensor.element_size() % 16:
                return f"needs {name} to start at a multiple of 16 bytes, got offset {tensor.storage_offset()}"
    return None


def check(x, weight, bias, stride, padding, dilation, groups, form, precision):
    """Raise ValueError for arguments that make no convolution."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be fp16, bf16 or fp32, got {x.dtype}")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"weight must be {x.dtype} on {x.device} as x, got {weight.dtype} on {weight.device}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels, got {groups}")
    if x.shape[1] != groups * weight.shape[1] or weight.numel() == 0:
        raise ValueError(
            f"weight must have shape (K, C / groups, R, S) with C = {x.shape[1]} and groups = {groups}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.dtype not in DTYPES or bias.device != x.device):
        raise ValueError(
            f"bias must be fp16, bf16 or fp32 of shape ({weight.shape[0]},) on {x.device}, "
            f"got {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        )
    for name, values, least in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", sum(padding, ()), 0)):
        if min(values) < least:
            raise ValueError(f"{name} must be {least} or more, got {values}")
    out = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if min(*out, *x.shape[2:]) < 1:
        raise ValueError(
            f"x must be at least as large as the window of the {tuple(weight.shape[2:])} kernel with dilation "
            f"{dilation}, got {tuple(x.shape[2:])} and padding {padding}"
        )


def descriptors(tensor, heights, widths):
    """Of a channels-last tensor as a matrix with one row per item of its first dimension, for blocks of each height
    and width; None where one is 0."""
    length = tensor.shape[1] * tensor.shape[2] * tensor.shape[3]
    matrix = tensor.as_strided([tensor.shape[0], length], [length, 1])
    return [descriptor(matrix, height, width) for height in heights for width in widths]


def conv_relu(
    x,
    weight,
    bias=None,
    stride=(1, 1),
    padding=((0, 0), (0, 0)),
    dilation=(1, 1),
    groups=1,
    *,
    form,
    precision="ieee",
    relu=True,
    config=None,
):
    """y = max(0, conv2d(x, weight) + bias): (N, C, H, W), (K, C/groups, R, S), (K) -> (N, K, OH, OW).

    x, weight: fp16, bf16 or fp32, channels last (anything else is copied to that first); bias: any of these dtypes, or
    None.  y: x's dtype, channels last.  The sum is fp32, rounded once.  stride and dilation: (height, width);
    padding: ((top, bottom), (left, right)), zeros.  form: one of FORMS.  precision, for fp32 only: "ieee" multiplies
    in fp32, "tf32" on tensor cores with factors of 10 bits.  relu=False leaves the ReLU out.  config: a Config instead
    of the heuristic's, for `form`.

    NaN stays NaN.  Padding is not multiplied: an infinite weight meets no zero there, where torch has NaN; in
    `spatial` and `split_k` it does as in torch.  Raises ValueError for arguments that make no convolution, and where
    `unsupported` has a reason.
    """
    check(x, weight, bias, stride, padding, dilation, groups, form, precision)
    reason = unsupported(form, x, weight, stride, padding, dilation, groups)
    if reason:
        raise ValueError(f"form {form!r} {reason}")
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    n, xc, h, w = x.shape
    k, channels, r, s = weight.shape
    oh, ow = output_size((h, w), (r, s), stride, padding, dilation)
    y = torch.empty((n, k, oh, ow), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    if config is None:
        config = heuristic(form, n, oh * ow, tuple(weight.shape), groups, x.dtype, precision, capability())
    column_tiles = groups * triton.cdiv(k // groups, sum(config.columns))
    constants = {
        "CHANNELS": channels,
        "FEATURES": k // groups,
        "GROUPS": groups,
        "R": r,
        "S": s,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "TOP": padding[0][0],
        "LEFT": padding[1][0],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "ROWS": config.rows,
        "COLUMNS": config.columns[0],
        "COLUMNS_B": config.columns[1],
        "DEPTH": config.depth[0],
        "DEPTH_B": config.depth[1],
        "RELU": relu,
        "PRECISION": precision if x.dtype == torch.float32 else "ieee",
        "WIDEN": interpreting() and x.dtype == torch.bfloat16,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if form == "batch_tiled":
        grid = (column_tiles * oh * ow * triton.cdiv(n, config.rows),)
        conv_relu_batch_kernel[grid](x, weight, bias, y, n, h, w, oh, ow, h * w * xc, oh * ow * k, **constants)
    elif form == "descriptors":
        grid = (column_tiles * oh * ow * triton.cdiv(n, config.rows),)
        conv_relu_descriptor_kernel[grid](
            *descriptors(x, (config.rows,), config.depth),
            *descriptors(weight, config.columns, config.depth),
            bias,
            *descriptors(y, (config.rows,), config.columns),
            h, w, oh, ow, **constants, WARP_SPECIALIZE=config.warp_specialize,
        )  # fmt: skip
    else:
        pixels = n * oh * ow
        out = y
        if config.parts > 1:
            out = torch.empty((config.parts, pixels, k), dtype=torch.float32, device=x.device)
        if config.num_warps == 4 and capability():
            # without a number ptxas spills a few registers of four warps to make room for programs that do not exist
            constants["maxnreg"] = 255
        conv_relu_spatial_kernel[(column_tiles * config.parts * triton.cdiv(pixels, config.rows),)](
            x, weight, bias, out, pixels, h, w, oh, ow, h * w * xc, **constants, PARTS=config.parts
        )
        if config.parts > 1:
            block = 512
            sum_parts_kernel[(triton.cdiv(y.numel(), block),)](
                out, bias, y, y.numel(), FEATURES=k, PARTS=config.parts, RELU=relu, BLOCK=block, num_warps=warps(128)
            )
    return y
