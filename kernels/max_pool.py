"""Max-pooling over windows of up to 127 cells, forward and backward, with one-byte codes in place of indices.

Forward writes the maximum and the code of its cell (geometry.py); backward is a gather: each input pixel looks at
the windows that cover it, so nothing is added atomically and two runs are bit-equal.  Compulsory traffic of a
3x3 window with stride 2 in fp16, channels_last or not: 2.72 bytes per input element each way.

Backward of 3x3 windows with stride 2 has kernels of its own in max_pool_3x3s2.py.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import Pair, Window, memory_format
from .max_pool_3x3s2 import max_pool_bwd_3x3s2, max_pool_bwd_3x3s2_nchw
from .registers import DTYPES, vector_width

# Vectors of channels, pixels or codes a program: nothing crosses threads, one for each of four warps' threads.
BLOCK = 128
# Windows of up to this many cells are unrolled; larger ones take runtime loops.
MAX_UNROLLED = tl.constexpr(9)


# ---------------------------------------------------------------------------------------------- window codes
@triton.jit
def cell_code(row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """geometry.cell_code in the kernel's language, for numbers and for tensors."""
    if ROWS + COLUMNS <= 6:
        all_ones: tl.constexpr = (1 << (ROWS + COLUMNS)) - 1
        out = (1 << (COLUMNS + ROWS - 1 - row) | 1 << (COLUMNS - 1 - column)) ^ all_ones
    else:
        out = row * COLUMNS + column
    return out


# ---------------------------------------------------------------------------------------------- forward, any window
@triton.jit
def scan_cell(
    best,
    code,
    corner_ptr,
    h0,
    w0,
    row,
    column,
    H: tl.constexpr,
    W: tl.constexpr,
    WINDOW: tl.constexpr,
    PIXEL: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One step of PyTorch's scan over a window in row-major order: take what is larger, or NaN."""
    DH: tl.constexpr = WINDOW[6]
    DW: tl.constexpr = WINDOW[7]
    cell_ptr = corner_ptr + (row * DH * W + column * DW) * PIXEL
    if PADDED:
        h = h0 + row * DH
        w = w0 + column * DW
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        value = tl.load(cell_ptr, mask=inside[:, None], other=float("-inf")).to(tl.float32)
    else:
        value = tl.load(cell_ptr).to(tl.float32)
    taken = (value > best) | (value != value)
    return tl.where(taken, value, best), tl.where(taken, cell_code(row, column, WINDOW[0], WINDOW[1]), code)


@triton.jit
def max_pool_fwd_kernel(
    x_ptr,  # (N, H, W, C) if CHANNELS_LAST else (N, C, H, W)
    y_ptr,  # (N, OH, OW, C) or (N, C, OH, OW)
    codes_ptr,  # as y, int8; unused unless CODES
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    CODES: tl.constexpr,
    AFTER_RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Any window, layout and dtype: a thread scans one window, VEC channels of it (1 in NCHW), in fp32."""
    ROWS: tl.constexpr = WINDOW[0]
    COLUMNS: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    PH: tl.constexpr = WINDOW[4]
    PW: tl.constexpr = WINDOW[5]
    DH: tl.constexpr = WINDOW[6]
    DW: tl.constexpr = WINDOW[7]
    ITEMS: tl.constexpr = OH * OW * C // VEC
    BLOCKS: tl.constexpr = (ITEMS + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    # A clamped thread repeats its neighbour and writes equal values twice; a mask would not be uniform over VEC.
    item = tl.minimum((tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK), ITEMS - 1)
    if CHANNELS_LAST:
        CV: tl.constexpr = C // VEC
        PIXEL: tl.constexpr = C
        start = item % CV * VEC
        ow = item // CV % OW
        oh = item // (CV * OW)
    else:
        PIXEL: tl.constexpr = 1
        start = item // (OW * OH) * (H * W)
        ow = item % OW
        oh = item // OW % OH
    h0 = oh * SH - PH
    w0 = ow * SW - PW
    vector = tl.arange(0, VEC)
    corner_ptr = x_ptr + n * (C * H * W) + ((h0 * W + w0) * PIXEL + start)[:, None] + vector
    # with ceil_mode the last windows may reach past the end without any padding
    PADDED: tl.constexpr = (
        PH > 0 or PW > 0 or (OH - 1) * SH + DH * (ROWS - 1) >= H or (OW - 1) * SW + DW * (COLUMNS - 1) >= W
    )
    # A window of minus infinities belongs to its first cell inside the input.
    if PADDED:
        first_row = tl.where(h0 < 0, (DH - 1 - h0) // DH, 0)
        first_column = tl.where(w0 < 0, (DW - 1 - w0) // DW, 0)
        code = tl.broadcast_to(cell_code(first_row, first_column, ROWS, COLUMNS)[:, None], [BLOCK, VEC])
    else:
        code = tl.full([BLOCK, VEC], cell_code(0, 0, ROWS, COLUMNS), tl.int32)
    best = tl.full([BLOCK, VEC], float("-inf"), tl.float32)
    if ROWS * COLUMNS <= MAX_UNROLLED:
        for k in tl.static_range(ROWS * COLUMNS):
            best, code = scan_cell(
                best, code, corner_ptr, h0, w0, k // COLUMNS, k % COLUMNS, H, W, WINDOW, PIXEL, PADDED
            )
    else:
        for row in range(ROWS):
            for column in range(COLUMNS):
                best, code = scan_cell(best, code, corner_ptr, h0, w0, row, column, H, W, WINDOW, PIXEL, PADDED)
    out = n * (C * OH * OW) + (item * VEC)[:, None] + vector
    tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty))
    if CODES:
        if AFTER_RELU:
            no_cell: tl.constexpr = (1 << (ROWS + COLUMNS)) - 1 if ROWS + COLUMNS <= 6 else 127
            code = tl.where(best == 0, no_cell, code)
        tl.store(codes_ptr + out, code.to(tl.int8))


# ---------------------------------------------------------------------------------------------- backward, any window
@triton.jit
def window_and_cell(
    position, k, OUT: tl.constexpr, CELLS: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr
):
    """Along one dimension: the k-th last window that can cover `position`, its cell there, and whether it does."""
    window = (position + P) // S - k
    offset = position + P - window * S
    covers = (window >= 0) & (window < OUT) & (offset % D == 0) & (offset // D < CELLS)
    return window, tl.minimum(offset // D, CELLS - 1), covers


@triton.jit
def add_covering_window(
    acc,
    grad_ptr,
    codes_ptr,
    h,
    w,
    kh,
    kw,
    OH: tl.constexpr,
    OW: tl.constexpr,
    WINDOW: tl.constexpr,
    PIXEL: tl.constexpr,
):
    """acc plus the gradient of one of the windows that cover pixel (h, w), where its code names that pixel."""
    ROWS: tl.constexpr = WINDOW[0]
    COLUMNS: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    PH: tl.constexpr = WINDOW[4]
    PW: tl.constexpr = WINDOW[5]
    DH: tl.constexpr = WINDOW[6]
    DW: tl.constexpr = WINDOW[7]
    oh, row, covers_h = window_and_cell(h, kh, OH, ROWS, SH, PH, DH)
    ow, column, covers_w = window_and_cell(w, kw, OW, COLUMNS, SW, PW, DW)
    covers = (covers_h & covers_w)[:, None]
    window = ((oh * OW + ow) * PIXEL)[:, None]
    grad = tl.load(grad_ptr + window, mask=covers, other=0.0).to(tl.float32)
    code = tl.load(codes_ptr + window, mask=covers, other=-1).to(tl.int32)
    if ROWS + COLUMNS <= 6:
        bits = 1 << (COLUMNS + ROWS - 1 - row) | 1 << (COLUMNS - 1 - column)
        matches = (code & bits[:, None]) == 0
    else:
        matches = code == (row * COLUMNS + column)[:, None]
    return acc + tl.where(matches, grad, 0.0)


@triton.jit
def max_pool_bwd_kernel(
    grad_ptr,  # (N, OH, OW, C) if CHANNELS_LAST else (N, C, OH, OW)
    codes_ptr,  # as grad, int8
    dx_ptr,  # (N, H, W, C) or (N, C, H, W)
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Any window, layout and dtype: a thread sums the windows that cover one pixel, VEC channels (1 in NCHW)."""
    ROWS: tl.constexpr = WINDOW[0]
    COLUMNS: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    DH: tl.constexpr = WINDOW[6]
    DW: tl.constexpr = WINDOW[7]
    ITEMS: tl.constexpr = H * W * C // VEC
    BLOCKS: tl.constexpr = (ITEMS + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    item = tl.minimum(tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK), ITEMS - 1)
    if CHANNELS_LAST:
        CV: tl.constexpr = C // VEC
        PIXEL: tl.constexpr = C
        start = item % CV * VEC
        w = item // CV % W
        h = item // (CV * W)
    else:
        PIXEL: tl.constexpr = 1
        start = item // (H * W) * (OH * OW)
        w = item % W
        h = item // W % H
    vector = tl.arange(0, VEC)
    image = n * (C * OH * OW) + start[:, None] + vector
    grads = grad_ptr + image
    codes = codes_ptr + image
    acc = tl.zeros([BLOCK, VEC], tl.float32)
    # how many windows can cover a pixel along each dimension
    KH: tl.constexpr = ((ROWS - 1) * DH + SH) // SH
    KW: tl.constexpr = ((COLUMNS - 1) * DW + SW) // SW
    if KH * KW <= MAX_UNROLLED:
        for k in tl.static_range(KH * KW):
            acc = add_covering_window(acc, grads, codes, h, w, k // KW, k % KW, OH, OW, WINDOW, PIXEL)
    else:
        for kh in range(KH):
            for kw in range(KW):
                acc = add_covering_window(acc, grads, codes, h, w, kh, kw, OH, OW, WINDOW, PIXEL)
    pixel = n * (C * H * W) + (item * VEC)[:, None] + vector
    tl.store(dx_ptr + pixel, acc.to(dx_ptr.dtype.element_ty))


# ---------------------------------------------------------------------------------------------- indices
@triton.jit
def max_pool_indices_kernel(
    codes_ptr,  # (N, OH, OW, C) if CHANNELS_LAST else (N, C, OH, OW), int8
    indices_ptr,  # as codes, int64
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes to h * W + w of the input plane, one element a lane."""
    ROWS: tl.constexpr = WINDOW[0]
    COLUMNS: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    PH: tl.constexpr = WINDOW[4]
    PW: tl.constexpr = WINDOW[5]
    DH: tl.constexpr = WINDOW[6]
    DW: tl.constexpr = WINDOW[7]
    ITEMS: tl.constexpr = OH * OW * C
    BLOCKS: tl.constexpr = (ITEMS + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    item = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    position = item // C if CHANNELS_LAST else item
    ow = position % OW
    oh = position // OW % OH
    code = tl.load(codes_ptr + n * ITEMS + item, mask=item < ITEMS, other=0).to(tl.int32)
    if ROWS + COLUMNS <= 6:
        row = tl.zeros([BLOCK], tl.int32)
        column = tl.zeros([BLOCK], tl.int32)
        for r in tl.static_range(1, ROWS):
            row = tl.where((code >> (COLUMNS + ROWS - 1 - r)) & 1 == 0, r, row)
        for s in tl.static_range(1, COLUMNS):
            column = tl.where((code >> (COLUMNS - 1 - s)) & 1 == 0, s, column)
    else:
        row = code // COLUMNS
        column = code % COLUMNS
    index = (oh * SH - PH + row * DH) * W + (ow * SW - PW + column * DW)
    tl.store(indices_ptr + n * ITEMS + item, index.to(tl.int64), mask=item < ITEMS)


# ---------------------------------------------------------------------------------------------- launchers
def channels_per_access(x: Tensor) -> int:
    """Channels that one access of at most 16 bytes can take: a power of two that divides C."""
    return min(vector_width(x.dtype), x.shape[1] & -x.shape[1])


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where a view starts off a 16-byte boundary: kernels here read it as 32-bit words."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def check_input(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"max_pool: the input must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"max_pool: the input must be float16, bfloat16 or float32, got {x.dtype}")
    if x[:1].numel() >= 2**31:
        raise ValueError(f"max_pool: one image must have fewer than 2**31 elements, got shape {tuple(x.shape)}")


def max_pool_fwd(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    *,
    codes: bool = True,
    after_relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The maximum of each window, (N, C, H, W) -> (N, C, OH, OW), and which cell held it, as geometry.py says.

    Exactly torch.nn.functional.max_pool2d: padding is never chosen, the first maximum in row-major order wins a tie
    (of signed zeros too), the last NaN of a window beats everything, a window of minus infinities belongs to its
    first cell.  fp16, bf16, fp32; channels_last or NCHW, and the outputs in the same memory format; what is neither is
    copied to the nearer one.

    `codes=False` returns None for the codes.  `after_relu=True` promises x >= 0 (or NaN): windows whose maximum
    is 0 then get the code of no cell, so that max_pool_bwd carries the ReLU mask of the layer below.

    Raises ValueError for another rank or dtype, a window outside PyTorch's rules or of more than 127 cells.
    """
    check_input(x)
    window = Window(kernel_size, stride, padding, dilation)
    n, c, h, w = x.shape
    oh, ow = window.output_size((h, w), ceil_mode)
    layout = memory_format(x)
    x = aligned(x.contiguous(memory_format=layout))
    y = torch.empty((n, c, oh, ow), dtype=x.dtype, device=x.device, memory_format=layout)
    out = torch.empty((n, c, oh, ow), dtype=torch.int8, device=x.device, memory_format=layout) if codes else None
    if y.numel() == 0:
        return y, out
    channels_last = layout == torch.channels_last
    vec = channels_per_access(x) if channels_last else 1
    sizes = {"H": h, "W": w, "OH": oh, "OW": ow, "C": c}
    kinds = {"CODES": codes, "AFTER_RELU": after_relu}
    # a kernel that writes no codes still takes a pointer
    code_out = y if out is None else out
    max_pool_fwd_kernel[(n * triton.cdiv(oh * ow * c // vec, BLOCK),)](
        x,
        y,
        code_out,
        **sizes,
        WINDOW=window.flat,
        **kinds,
        CHANNELS_LAST=channels_last,
        VEC=vec,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return y, out


def check_codes(codes: Tensor, input_size: Pair, window: Window) -> None:
    if codes.dim() != 4 or codes.dtype != torch.int8:
        raise ValueError(f"max_pool: codes must be int8 (N, C, OH, OW), got {codes.dtype} {tuple(codes.shape)}")
    sizes = {window.windows(input_size, ceil_mode) for ceil_mode in (False, True)}
    if tuple(codes.shape[2:]) not in sizes:
        raise ValueError(
            f"max_pool: codes of shape {tuple(codes.shape)} do not belong to input_size {input_size}: "
            f"these windows give {' or '.join(map(str, sorted(sizes)))}"
        )


@overload
def max_pool_bwd(
    grad: Tensor,
    codes: Tensor,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    bias_partials: Literal[False] = False,
) -> Tensor: ...
@overload
def max_pool_bwd(
    grad: Tensor,
    codes: Tensor,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    bias_partials: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def max_pool_bwd(
    grad: Tensor,
    codes: Tensor,
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    bias_partials: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """dx (N, C, H, W) from the gradient of the pooled map (N, C, OH, OW) and the codes of max_pool_fwd.

    Each input pixel adds up, in fp32, the gradients of the windows whose code names it; rounded once to grad's dtype.
    No atomics, two runs are bit-equal.  `input_size` is (H, W).  dx has the memory format of the codes; a gradient in
    another one is copied.  With `bias_partials` also returns fp32 (P, C) whose sum over P is the sum of dx over
    N, H and W: the bias gradient of the convolution below, deterministic too.

    Raises ValueError where shapes or dtypes do not fit together, and as max_pool_fwd.
    """
    window = Window(kernel_size, stride, padding, dilation)
    check_codes(codes, input_size, window)
    check_input(grad)
    if grad.shape != codes.shape:
        raise ValueError(f"max_pool: grad has shape {tuple(grad.shape)}, codes have {tuple(codes.shape)}")
    layout = memory_format(codes)
    codes = aligned(codes.contiguous(memory_format=layout))
    grad = aligned(grad.contiguous(memory_format=layout))
    n, c, oh, ow = codes.shape
    h, w = input_size
    dx = torch.empty((n, c, h, w), dtype=grad.dtype, device=grad.device, memory_format=layout)
    if dx.numel() == 0:
        return (dx, torch.zeros((1, c), dtype=torch.float32, device=grad.device)) if bias_partials else dx
    check_input(dx)
    channels_last = layout == torch.channels_last
    vec = channels_per_access(grad) if channels_last else 1
    sizes = {"H": h, "W": w, "OH": oh, "OW": ow, "C": c}
    special = window.is_3x3_stride_2 and window.inside((h, w), (oh, ow))
    if special and vec >= 4:
        partials = max_pool_bwd_3x3s2(grad, codes, dx, vec, bias_partials)
        return dx if partials is None else (dx, partials)
    if special and not channels_last:
        max_pool_bwd_3x3s2_nchw(grad, codes, dx)
    else:
        max_pool_bwd_kernel[(n * triton.cdiv(h * w * c // vec, BLOCK),)](
            grad,
            codes,
            dx,
            **sizes,
            WINDOW=window.flat,
            CHANNELS_LAST=channels_last,
            VEC=vec,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return (dx, dx.sum((0, 2, 3), dtype=torch.float32)[None]) if bias_partials else dx


def max_pool_indices(
    codes: Tensor, input_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The codes of max_pool_fwd as PyTorch's indices: int64 h * W + w of the input plane, in the codes' memory format.

    For codes that name a cell.  Raises ValueError as max_pool_bwd.
    """
    window = Window(kernel_size, stride, padding, dilation)
    check_codes(codes, input_size, window)
    layout = memory_format(codes)
    codes = codes.contiguous(memory_format=layout)
    indices = torch.empty(codes.shape, dtype=torch.int64, device=codes.device, memory_format=layout)
    n, c, oh, ow = codes.shape
    if indices.numel() > 0:
        max_pool_indices_kernel[(n * triton.cdiv(c * oh * ow, BLOCK),)](
            codes,
            indices,
            W=input_size[1],
            OH=oh,
            OW=ow,
            C=c,
            WINDOW=window.flat,
            CHANNELS_LAST=layout == torch.channels_last,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return indices
