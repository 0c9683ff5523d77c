"""Convolution, bias and ReLU in one kernel: y = max(0, conv2d(x, weight) + bias), by one of four algorithms.

Memory is channels last throughout, and a weight (K, C/groups, R, S) in channels-last memory is the matrix that the
product needs: none copies or repacks anything.

- `batch_tiled`: a program computes one output pixel for 128 or 256 images (Krizhevsky's layout of 2012, turned round).
  Which taps lie in the padding is then one decision per program, and they are skipped: 10 % of the products of a
  13x13 layer with 3x3 taps, 9 % of 27x27 with 5x5.  No masks, no division, no wasted rows for batches of 128 and more.
- `descriptors`: the same on two-dimensional tensor descriptors (TMA), for sm_90 and later.
- `spatial`: a program computes 64 or 128 consecutive output pixels, across images; rows whose tap lies in the padding
  are masked by one bit per row of taps and one per column.  For batches below 128.
- `split_k`: as `spatial`, with the sum cut into parts that run side by side and are added up by
  `sum_partials`.  For batch 1, where a layer has too few pixels to fill a GPU.

The sum is fp32 in all of them and is rounded once.  Two runs give equal bits.
"""

import torch
import triton
import triton.language as tl

from ..geometry import output_size
from ..partial_sums import sum_partials
from ..registers import DTYPES
from .config import forward_config
from .implicit_gemm import capability, conv_of, descriptor, multiply_add, next_step, precision_of, tap_bits, tap_range

ALGORITHMS = ("batch_tiled", "descriptors", "spatial", "split_k")


# ------------------------------------------------------------------------------------------------- kernels
@triton.jit
def add_bias(acc, bias_ptr, feature, end, WHOLE: tl.constexpr, RELU: tl.constexpr):
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
def load_inputs(x, first, at, inside, channel, left, WHOLE: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """rows x channels of x, zero where a row is not `inside` (None: all are) or `left` channels are passed.

    x: pointers, `at` elements before the tile; or a descriptor, whose rows begin at `first`.
    """
    if DESCRIPTORS:
        return x.load([first, at])
    elif WHOLE:
        if inside is None:
            return tl.load(x + at)
        else:
            return tl.load(x + at, mask=inside[:, None], other=0.0)
    else:
        if inside is None:
            return tl.load(x + at, mask=(channel < left)[None, :], other=0.0)
        else:
            return tl.load(x + at, mask=inside[:, None] & (channel < left)[None, :], other=0.0)


@triton.jit
def load_weights(weight, first, at, channel, left, WHOLE: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """channels x features of the weight, zero where `left` channels are passed; `weight` as x of `load_inputs`."""
    if DESCRIPTORS:
        return weight.load([first, at]).T
    elif WHOLE:
        return tl.load(weight + at)
    else:
        return tl.load(weight + at, mask=(channel < left)[:, None], other=0.0)


@triton.jit
def weight_rows(weight_ptr, feature, last, LENGTH: tl.constexpr):
    """Pointers to the rows of these features, a row vector.  Clamped: a mask would cost the loads their width."""
    return (weight_ptr + tl.minimum(feature, last) * LENGTH)[None, :]


@triton.jit
def finish(
    acc, bias_ptr, y, first, n, plane, at, feature, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, RELU: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Bias, ReLU and store: the images from `first` on, below n, and the channels from `feature` on, below `end`.

    `at`: elements of a plane of y before the pixel.
    """
    channel = feature + tl.arange(0, BLOCK_N)
    out = add_bias(acc, bias_ptr, channel, end, EVEN, RELU)
    if DESCRIPTORS:
        y.store([first, at + feature], out.to(y.dtype))
    else:
        image = first + tl.arange(0, BLOCK_M)
        rows = y + (image.to(tl.int64) * plane + at)[:, None]
        inside = (image < n)[:, None] & (channel < end)[None, :]
        tl.store(rows + channel[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def conv_relu_batch_kernel(
    x,  # (N, H, W, GROUPS * C_IN): pointer, or descriptor of (N, H * W * GROUPS * C_IN), BLOCK_M x BLOCK_K
    x_tail,  # BLOCK_M x BLOCK_K_TAIL; as all tails a descriptor, or None
    weight,  # (GROUPS * C_OUT, R, S, C_IN): pointer, or descriptor of its rows, BLOCK_N x BLOCK_K
    weight_k_tail,  # BLOCK_N x BLOCK_K_TAIL
    weight_n_tail,  # BLOCK_N_TAIL x BLOCK_K
    weight_tails,  # BLOCK_N_TAIL x BLOCK_K_TAIL
    bias_ptr,  # GROUPS * C_OUT, or None
    y,  # (N, OH, OW, GROUPS * C_OUT): pointer, or descriptor of (N, OH * OW * GROUPS * C_OUT), BLOCK_M x BLOCK_N
    y_tail,  # BLOCK_M x BLOCK_N_TAIL
    n,  # images
    h,
    w,
    oh,
    ow,
    CONV: tl.constexpr,
    TILE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One output pixel, BLOCK_M images, one tile of features.  Neighbouring programs share their part of x.

    By descriptors, images beyond the batch read as zeros and are not stored.
    """
    C_IN: tl.constexpr = CONV[0]
    C_OUT: tl.constexpr = CONV[1]
    GROUPS: tl.constexpr = CONV[2]
    R: tl.constexpr = CONV[3]
    S: tl.constexpr = CONV[4]
    DILATION_H: tl.constexpr = CONV[9]
    DILATION_W: tl.constexpr = CONV[10]
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    BLOCK_N_TAIL: tl.constexpr = TILE[2]
    BLOCK_K: tl.constexpr = TILE[3]
    BLOCK_K_TAIL: tl.constexpr = TILE[4]
    WIDTH: tl.constexpr = BLOCK_N + BLOCK_N_TAIL
    STEP: tl.constexpr = BLOCK_K + BLOCK_K_TAIL
    WHOLE: tl.constexpr = C_IN % STEP == 0
    tl.static_assert(WHOLE or (BLOCK_K_TAIL == 0 and not DESCRIPTORS))
    tl.static_assert(C_OUT % WIDTH == 0 or not DESCRIPTORS)
    TILES: tl.constexpr = (C_OUT + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    column_tile = program % (TILES * GROUPS)
    pixel = program // (TILES * GROUPS)
    first = pixel // (oh * ow) * BLOCK_M
    pixel = pixel % (oh * ow)
    group = column_tile // TILES
    group_end = (group + 1) * C_OUT
    feature = group * C_OUT + column_tile % TILES * WIDTH
    top = pixel // ow * CONV[5] - CONV[7]
    left = pixel % ow * CONV[6] - CONV[8]

    k = tl.arange(0, BLOCK_K)
    origin = (top * w + left) * (GROUPS * C_IN) + group * C_IN
    if not DESCRIPTORS:
        image = first + tl.arange(0, BLOCK_M)
        # the last image again instead of a mask; what comes of it is not stored
        x_rows = x + (tl.minimum(image, n - 1).to(tl.int64) * (h * w * (GROUPS * C_IN)))[:, None]
        w_rows = weight_rows(weight, feature + tl.arange(0, BLOCK_N), group_end - 1, R * S * C_IN)
        x = x_rows + k[None, :]
        weight = w_rows + k[:, None]
        if BLOCK_K_TAIL > 0:
            k_tail = tl.arange(0, BLOCK_K_TAIL)
            x_tail = x_rows + k_tail[None, :]
            weight_k_tail = w_rows + k_tail[:, None]
        if BLOCK_N_TAIL > 0:
            feature_tail = feature + BLOCK_N + tl.arange(0, BLOCK_N_TAIL)
            w_rows_tail = weight_rows(weight_n_tail, feature_tail, group_end - 1, R * S * C_IN)
            weight_n_tail = w_rows_tail + k[:, None]
            if BLOCK_K_TAIL > 0:
                weight_tails = w_rows_tail + k_tail[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N_TAIL > 0:
        acc_tail = tl.zeros([BLOCK_M, BLOCK_N_TAIL], tl.float32)

    r_first, r_stop = tap_range(top, h, R, DILATION_H)
    s_first, s_stop = tap_range(left, w, S, DILATION_W)
    r = r_first
    s = s_first
    c = 0
    steps = (r_stop - r_first) * (s_stop - s_first) * ((C_IN + STEP - 1) // STEP)
    for _ in tl.range(0, steps, warp_specialize=TILE[5]):
        at = origin + (r * DILATION_H * w + s * DILATION_W) * (GROUPS * C_IN) + c
        w_at = (r * S + s) * C_IN + c
        # the short product first: sm_90 waits for it before the long one, which it leaves running through the rest
        if BLOCK_K_TAIL > 0:
            b = load_inputs(x_tail, first, at + BLOCK_K, None, k, 0, True, DESCRIPTORS)
            b_weight = load_weights(weight_k_tail, feature, w_at + BLOCK_K, k, 0, True, DESCRIPTORS)
            acc = multiply_add(b, b_weight, acc, PRECISION)
            if BLOCK_N_TAIL > 0:
                b_weight = load_weights(weight_tails, feature + BLOCK_N, w_at + BLOCK_K, k, 0, True, DESCRIPTORS)
                acc_tail = multiply_add(b, b_weight, acc_tail, PRECISION)
        a = load_inputs(x, first, at, None, k, C_IN - c, WHOLE, DESCRIPTORS)
        a_weight = load_weights(weight, feature, w_at, k, C_IN - c, WHOLE, DESCRIPTORS)
        acc = multiply_add(a, a_weight, acc, PRECISION)
        if BLOCK_N_TAIL > 0:
            a_weight = load_weights(weight_n_tail, feature + BLOCK_N, w_at, k, C_IN - c, WHOLE, DESCRIPTORS)
            acc_tail = multiply_add(a, a_weight, acc_tail, PRECISION)
        r, s, c = next_step(r, s, c, s_first, s_stop, C_IN, STEP)

    EVEN: tl.constexpr = C_OUT % WIDTH == 0
    plane = oh * ow * (GROUPS * C_OUT)
    at = pixel * (GROUPS * C_OUT)
    finish(acc, bias_ptr, y, first, n, plane, at, feature, group_end, BLOCK_M, BLOCK_N, EVEN, RELU, DESCRIPTORS)
    if BLOCK_N_TAIL > 0:
        feature += BLOCK_N
        y = y_tail if DESCRIPTORS else y
        finish(
            acc_tail, bias_ptr, y, first, n, plane, at, feature, group_end,
            BLOCK_M, BLOCK_N_TAIL, EVEN, RELU, DESCRIPTORS,
        )  # fmt: skip


@triton.jit
def conv_relu_spatial_kernel(
    x_ptr,  # (N, H, W, GROUPS * C_IN)
    weight_ptr,  # (GROUPS * C_OUT, R, S, C_IN)
    bias_ptr,  # GROUPS * C_OUT, or None
    y_ptr,  # pixels x GROUPS * C_OUT; SPLIT_K of them, fp32 sums without bias and ReLU, if SPLIT_K > 1
    pixels,  # N * OH * OW
    h,
    w,
    oh,
    ow,
    CONV: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_K: tl.constexpr,  # parts of the sum
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M consecutive output pixels, one tile of features, one part of the sum."""
    C_IN: tl.constexpr = CONV[0]
    C_OUT: tl.constexpr = CONV[1]
    GROUPS: tl.constexpr = CONV[2]
    R: tl.constexpr = CONV[3]
    S: tl.constexpr = CONV[4]
    DILATION_H: tl.constexpr = CONV[9]
    DILATION_W: tl.constexpr = CONV[10]
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    BLOCK_N_TAIL: tl.constexpr = TILE[2]
    BLOCK_K: tl.constexpr = TILE[3]
    BLOCK_K_TAIL: tl.constexpr = TILE[4]
    WIDTH: tl.constexpr = BLOCK_N + BLOCK_N_TAIL
    STEP: tl.constexpr = BLOCK_K + BLOCK_K_TAIL
    WHOLE: tl.constexpr = C_IN % STEP == 0
    tl.static_assert(WHOLE or BLOCK_K_TAIL == 0)
    TILES: tl.constexpr = (C_OUT + WIDTH - 1) // WIDTH
    CHUNKS: tl.constexpr = (C_IN + STEP - 1) // STEP
    program = tl.program_id(0)
    column_tile = program % (TILES * GROUPS)
    row_tile = program // (TILES * GROUPS)
    part = row_tile % SPLIT_K
    group = column_tile // TILES
    group_end = (group + 1) * C_OUT

    pixel = row_tile // SPLIT_K * BLOCK_M + tl.arange(0, BLOCK_M)
    present = pixel < pixels
    image = pixel // (oh * ow)
    within = pixel % (oh * ow)
    top = within // ow * CONV[5] - CONV[7]
    left = within % ow * CONV[6] - CONV[8]
    r_bits = tl.where(present, tap_bits(top, h, R, DILATION_H), 0)
    s_bits = tap_bits(left, w, S, DILATION_W)

    origin = (top * w + left) * (GROUPS * C_IN) + group * C_IN
    x_rows = x_ptr + (image.to(tl.int64) * (h * w * (GROUPS * C_IN)) + origin)[:, None]
    feature = group * C_OUT + column_tile % TILES * WIDTH + tl.arange(0, BLOCK_N)
    w_rows = weight_rows(weight_ptr, feature, group_end - 1, R * S * C_IN)
    k = tl.arange(0, BLOCK_K)
    x_a = x_rows + k[None, :]
    w_a = w_rows + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_K_TAIL > 0:
        k_tail = BLOCK_K + tl.arange(0, BLOCK_K_TAIL)
        x_b = x_rows + k_tail[None, :]
        w_b = w_rows + k_tail[:, None]
    if BLOCK_N_TAIL > 0:
        feature_tail = group * C_OUT + column_tile % TILES * WIDTH + BLOCK_N + tl.arange(0, BLOCK_N_TAIL)
        w_rows_tail = weight_rows(weight_ptr, feature_tail, group_end - 1, R * S * C_IN)
        w_a_tail = w_rows_tail + k[:, None]
        acc_tail = tl.zeros([BLOCK_M, BLOCK_N_TAIL], tl.float32)
        if BLOCK_K_TAIL > 0:
            w_b_tail = w_rows_tail + k_tail[:, None]

    PER_PART: tl.constexpr = (R * S * CHUNKS + SPLIT_K - 1) // SPLIT_K
    first = part * PER_PART
    stop = tl.minimum(first + PER_PART, R * S * CHUNKS)
    r = first // (S * CHUNKS)
    s = first // CHUNKS % S
    c = first % CHUNKS * STEP
    for _ in range(stop - first):
        at = (r * DILATION_H * w + s * DILATION_W) * (GROUPS * C_IN) + c
        w_at = (r * S + s) * C_IN + c
        inside = ((r_bits >> r) & (s_bits >> s) & 1) != 0
        # the short product first: sm_90 waits for it before the long one, which it leaves running through the rest
        if BLOCK_K_TAIL > 0:
            b = load_inputs(x_b, 0, at, inside, k, 0, True, False)
            acc = multiply_add(b, tl.load(w_b + w_at), acc, PRECISION)
            if BLOCK_N_TAIL > 0:
                acc_tail = multiply_add(b, tl.load(w_b_tail + w_at), acc_tail, PRECISION)
        a = load_inputs(x_a, 0, at, inside, k, C_IN - c, WHOLE, False)
        acc = multiply_add(a, load_weights(w_a, 0, w_at, k, C_IN - c, WHOLE, False), acc, PRECISION)
        if BLOCK_N_TAIL > 0:
            a_weight = load_weights(w_a_tail, 0, w_at, k, C_IN - c, WHOLE, False)
            acc_tail = multiply_add(a, a_weight, acc_tail, PRECISION)
        r, s, c = next_step(r, s, c, 0, S, C_IN, STEP)

    y_rows = y_ptr + ((part.to(tl.int64) * pixels + pixel) * (GROUPS * C_OUT))[:, None]
    inside = feature < group_end
    if SPLIT_K == 1:
        acc = add_bias(acc, bias_ptr, feature, group_end, C_OUT % WIDTH == 0, RELU)
    tl.store(y_rows + feature[None, :], acc.to(y_ptr.dtype.element_ty), mask=present[:, None] & inside[None, :])
    if BLOCK_N_TAIL > 0:
        inside = feature_tail < group_end
        if SPLIT_K == 1:
            acc_tail = add_bias(acc_tail, bias_ptr, feature_tail, group_end, C_OUT % WIDTH == 0, RELU)
        out = acc_tail.to(y_ptr.dtype.element_ty)
        tl.store(y_rows + feature_tail[None, :], out, mask=present[:, None] & inside[None, :])


# ------------------------------------------------------------------------------------------------- launchers
def unsupported(algorithm, x, weight, stride, padding, dilation, groups):
    """Why `algorithm` cannot compute this convolution, or None if it can.  Reads shapes, dtypes and offsets only.

    Valid arguments are assumed (`conv_relu` says what they are).  Whether one is worth taking is another question:
    `descriptors` runs below sm_90, too, but as loads of single elements.
    """
    groups_channels, features = weight.shape[1], weight.shape[0] // groups
    oh, ow = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if max(x[0].numel() if x.shape[0] else 0, oh * ow * weight.shape[0], weight.numel()) >= 2**31:
        return "an image, its output or the weight has 2**31 elements or more"
    if algorithm in ("spatial", "split_k"):
        if max(weight.shape[2:]) > 31:
            return f"needs a kernel of at most 31 x 31, got {tuple(weight.shape[2:])}"
        if x.shape[0] * oh * ow >= 2**31:
            return f"needs fewer than 2**31 output pixels, got {x.shape[0] * oh * ow}"
    if algorithm == "descriptors":
        if capability() == 0:
            return "needs an NVIDIA GPU"
        for name, count in (("input", groups_channels), ("output", features)):
            if count % 16:
                return f"needs {name} channels per group in multiples of 16, got {count}"
        for name, tensor in (("x", x), ("weight", weight)):
            if tensor.storage_offset() * tensor.element_size() % 16:
                return f"needs {name} to start at a multiple of 16 bytes, got offset {tensor.storage_offset()}"
    return None


def check(x, weight, bias, stride, padding, dilation, groups, algorithm, precision):
    """Raise ValueError for arguments that make no convolution."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
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
    algorithm,
    precision="ieee",
    relu=True,
    config=None,
):
    """y = max(0, conv2d(x, weight) + bias): (N, C, H, W), (K, C/groups, R, S), (K) -> (N, K, OH, OW).

    x, weight: fp16, bf16 or fp32, channels last (anything else is copied to that first); bias: any of these dtypes, or
    None.  y: x's dtype, channels last.  The sum is fp32, rounded once.  stride and dilation: (height, width);
    padding: ((top, bottom), (left, right)), zeros.  algorithm: one of ALGORITHMS.  precision, for fp32 only:
    "ieee" multiplies in fp32, "tf32" on tensor cores with factors of 10 bits.  relu=False leaves the ReLU out.  config:
    a Config instead of the heuristic's, for `algorithm`.

    NaN stays NaN.  Padding is not multiplied: an infinite weight meets no zero there, where torch has NaN; in
    `spatial` and `split_k` it does as in torch.  Raises ValueError for arguments that make no convolution, and where
    `unsupported` has a reason.
    """
    check(x, weight, bias, stride, padding, dilation, groups, algorithm, precision)
    reason = unsupported(algorithm, x, weight, stride, padding, dilation, groups)
    if reason:
        raise ValueError(f"algorithm {algorithm!r} {reason}")
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    n, _, h, w = x.shape
    k = weight.shape[0]
    oh, ow = output_size((h, w), weight.shape[2:], stride, padding, dilation)
    y = torch.empty((n, k, oh, ow), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    if config is None:
        config = forward_config(algorithm, n, oh * ow, tuple(weight.shape), groups, x.dtype, precision, capability())
    column_tiles = groups * triton.cdiv(k // groups, sum(config.block_n))
    constants = {
        "CONV": conv_of(weight.shape, groups, stride, padding, dilation),
        "TILE": config.tile,
        "RELU": relu,
        "PRECISION": precision_of(x.dtype, precision),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if algorithm in ("batch_tiled", "descriptors"):
        tensors = [x, None, weight, None, weight, None, bias, y, None]
        if algorithm == "descriptors":
            tensors = [
                *descriptors(x, (config.block_m,), config.block_k),
                *descriptors(weight, config.block_n, config.block_k),
                bias,
                *descriptors(y, (config.block_m,), config.block_n),
            ]
        conv_relu_batch_kernel[(column_tiles * oh * ow * triton.cdiv(n, config.block_m),)](
            *tensors, n, h, w, oh, ow, **constants, DESCRIPTORS=algorithm == "descriptors"
        )
        return y
    pixels = n * oh * ow
    out = y
    if config.split_k > 1:
        out = torch.empty((config.split_k, pixels, k), dtype=torch.float32, device=x.device)
    if config.num_warps == 4 and capability():
        # without a number ptxas spills a few registers of four warps to make room for programs that do not exist
        constants["maxnreg"] = 255
    conv_relu_spatial_kernel[(column_tiles * config.split_k * triton.cdiv(pixels, config.block_m),)](
        x, weight, bias, out, pixels, h, w, oh, ow, **constants, SPLIT_K=config.split_k
    )
    if config.split_k == 1:
        return y
    sums = sum_partials(out.flatten(1), bias, relu=relu, dtype=x.dtype)
    return sums.view(n, oh, ow, k).movedim(-1, 1)
