"""Max-pooling over windows of up to 127 cells, forward and backward, with one-byte codes in place of indices.

Forward writes the maximum and the code of its cell (geometry.py); backward is a gather: each input pixel looks at
the windows that cover it, so nothing is added atomically and two runs are bit-equal.  Compulsory traffic of a
3x3 window with stride 2 in fp16, channels_last or not: 2.72 bytes per input element each way.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import Pair, Window, memory_format, one_hot
from .registers import DTYPES, pack, unpack, use_asm, vector_width

# One warp a program where rows are walked: a warp-wide test or sum then needs no shared memory.
WARP = 32
# Vectors of channels, pixels or codes a program where nothing crosses threads: one per thread of four warps.
LANES = 128
# Programs that fill any GPU here several times over (132 processors x 32 warps x 4); fewer would idle at the end.
MANY_PROGRAMS = 16384
# Walking more rows than this saves nothing more: the per-program prologue is 40 of about 165 instructions a row.
MAX_ROWS_PER_PROGRAM = 4
# Channel-sum partials may add this share to the bytes that the backward pass moves anyway.
PARTIALS_SHARE = 0.02
# Windows of up to this many cells are unrolled; larger ones take runtime loops.
MAX_UNROLLED = tl.constexpr(9)

ONE_HOT_3X3 = tl.constexpr(tuple(one_hot(row, column, 3, 3) for row in range(3) for column in range(3)))


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    PIXEL: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One step of PyTorch's scan over a window in row-major order: take what is larger, or NaN."""
    cell_ptr = corner_ptr + (row * DH * W + column * DW) * PIXEL
    if PADDED:
        h = h0 + row * DH
        w = w0 + column * DW
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        value = tl.load(cell_ptr, mask=inside[:, None], other=float("-inf")).to(tl.float32)
    else:
        value = tl.load(cell_ptr).to(tl.float32)
    taken = (value > best) | (value != value)
    return tl.where(taken, value, best), tl.where(taken, cell_code(row, column, ROWS, COLUMNS), code)


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    CODES: tl.constexpr,
    AFTER_RELU: tl.constexpr,
    V: tl.constexpr,
):
    """Any window, layout and dtype: a thread scans one window, VEC channels of it (1 in NCHW), in fp32."""
    ITEMS: tl.constexpr = OH * OW * C // VEC
    BLOCKS: tl.constexpr = (ITEMS + V - 1) // V
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    # A clamped thread repeats its neighbour and writes equal values twice; a mask would not be uniform over VEC.
    item = tl.minimum((tl.program_id(0) % BLOCKS) * V + tl.arange(0, V), ITEMS - 1)
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
        code = tl.broadcast_to(cell_code(first_row, first_column, ROWS, COLUMNS)[:, None], [V, VEC])
    else:
        code = tl.full([V, VEC], cell_code(0, 0, ROWS, COLUMNS), tl.int32)
    best = tl.full([V, VEC], float("-inf"), tl.float32)
    if ROWS * COLUMNS <= MAX_UNROLLED:
        for k in tl.static_range(ROWS * COLUMNS):
            best, code = scan_cell(
                best, code, corner_ptr, h0, w0, k // COLUMNS, k % COLUMNS, H, W, ROWS, COLUMNS, DH, DW, PIXEL, PADDED
            )
    else:
        for row in range(ROWS):
            for column in range(COLUMNS):
                best, code = scan_cell(
                    best, code, corner_ptr, h0, w0, row, column, H, W, ROWS, COLUMNS, DH, DW, PIXEL, PADDED
                )
    out = n * (C * OH * OW) + (item * VEC)[:, None] + vector
    tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty))
    if CODES:
        if AFTER_RELU:
            dead: tl.constexpr = (1 << (ROWS + COLUMNS)) - 1 if ROWS + COLUMNS <= 6 else 127
            code = tl.where(best == 0, dead, code)
        tl.store(codes_ptr + out, code.to(tl.int8))


# ---------------------------------------------------------------------------------------------- forward, packed pairs
@triton.jit
def pair_maximum(a, b, BF16: tl.constexpr):
    """Maxima of the two 16-bit floats in each 32-bit word; NaN beats everything and comes out as 0x7fff."""
    asm: tl.constexpr = "max.NaN.bf16x2 $0, $1, $2;" if BF16 else "max.NaN.f16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def pair_negated(x, BF16: tl.constexpr):
    """0 - x in each half of the word: the negative, but +0 for zeros of either sign."""
    ones = tl.full(x.shape, -0x407F4080 if BF16 else -0x43FF4400, tl.int32)  # -1.0 in each half
    zeros = tl.zeros(x.shape, tl.int32)
    return pair_fma(x, ones, zeros, BF16)


@triton.jit
def pair_fma(a, b, c, BF16: tl.constexpr):
    """a * b + c of the 16-bit floats in each half of the words (sm_80 adds bf16 pairs in no other way)."""
    asm: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;" if BF16 else "fma.rn.f16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def pair_below(x, negated_best, BF16: tl.constexpr):
    """0xffff in each half of the word where x < best, 0 where x == best (zeros of either sign too), best finite.

    The sign of x - best, spread over its half.  The difference of distinct numbers never rounds to zero; that of
    equal numbers is +0 as long as no zero is subtracted from -0 (see pair_negated).
    """
    ones = tl.full(x.shape, 0x3F803F80 if BF16 else 0x3C003C00, tl.int32)  # 1.0 in each half
    return spread_sign(pair_fma(x, ones, negated_best, BF16))


@triton.jit
def spread_sign(x):
    """0xffff in each half of the word whose top bit is set, 0 in the others."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0xbb99;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def low_bytes(a, b):
    """The low bytes of the four halves of two words, as one word."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def pair_reaches(x, MAGNITUDE: tl.constexpr):
    """The top bit of each half of the word is set where that 16-bit float, its sign apart, has at least these bits."""
    return ((x & 0x7FFF7FFF) + (0x8000 - MAGNITUDE) * 0x10001) & -0x7FFF8000


@triton.jit
def pair_differs(a, b):
    """The top bit of each half of the word is set where the halves of a and b differ in any bit."""
    difference = a ^ b
    return (((difference & 0x7FFF7FFF) + 0x7FFF7FFF) | difference) & -0x7FFF8000


@triton.jit
def bitwise_or(a, b):
    return a | b


@triton.jit
def max_pool_fwd_packed_kernel(
    x_ptr,  # (N, H, W, C), fp16 or bf16
    y_ptr,  # (N, OH, OW, C)
    codes_ptr,  # (N, OH, OW, C) int8; unused unless CODES
    rows,  # N * OH
    per_program,  # output rows that one program walks over
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CODES: tl.constexpr,
    AFTER_RELU: tl.constexpr,
    V: tl.constexpr,
):
    """channels_last, windows inside the input, at most 9 cells: two channels per instruction.

    First the maximum of the cells, then, from the last cell to the first, the code of each cell that equals it:
    four instructions for a cell of two channels (maximum, difference, spread sign, select), any sign.  NaN would
    take twice that, and the difference of infinities is NaN: a warp that meets a maximum of either kind (a program
    is one warp, so the test is one `redux`) repairs its codes.
    """
    CELLS: tl.constexpr = ROWS * COLUMNS
    CV: tl.constexpr = C // 8
    BLOCKS: tl.constexpr = (OW * CV + V - 1) // V
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    INFINITY: tl.constexpr = 0x7F80 if BF16 else 0x7C00
    group = tl.program_id(0) // BLOCKS
    item = tl.minimum((tl.program_id(0) % BLOCKS) * V + tl.arange(0, V), OW * CV - 1)
    window = ((item // CV * (SW * CV) + item % CV) * 4)[:, None] + tl.arange(0, 4)
    x_words_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    y_words_ptr = y_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    code_words_ptr = codes_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    first = group * per_program
    for step in range(tl.minimum(per_program, rows - first)):
        output_row = first + step
        n = (output_row // OH).to(tl.int64)
        corner_ptr = x_words_ptr + (n * H + output_row % OH * SH) * (W * C // 2) + window
        cells = ()
        for k in tl.static_range(CELLS):
            cells = cells + (tl.load(corner_ptr + (k // COLUMNS * DH * W + k % COLUMNS * DW) * (C // 2)),)
        best = cells[0]
        for k in tl.static_range(1, CELLS):
            best = pair_maximum(best, cells[k], BF16)
        out_row = output_row.to(tl.int64) * OW
        tl.store(y_words_ptr + out_row * (C // 2) + (item * 4)[:, None] + tl.arange(0, 4), best)
        if CODES:
            negated = pair_negated(best, BF16)
            last: tl.constexpr = cell_code(ROWS - 1, COLUMNS - 1, ROWS, COLUMNS) * 0x10001
            codes = tl.full([V, 4], last, tl.int32)
            for k in tl.static_range(CELLS - 2, -1, -1):
                below = pair_below(cells[k], negated, BF16)
                codes = (below & codes) | (~below & cell_code(k // COLUMNS, k % COLUMNS, ROWS, COLUMNS) * 0x10001)
            if AFTER_RELU:
                positive = pair_below(tl.zeros([V, 4], tl.int32), negated, BF16)
                dead: tl.constexpr = ((1 << (ROWS + COLUMNS)) - 1) * 0x10001
                codes = (positive & codes) | (~positive & dead)
            infinite = pair_reaches(best, INFINITY)
            if tl.reduce(tl.reduce(infinite, 1, bitwise_or), 0, bitwise_or) != 0:
                infinite = spread_sign(infinite)
                for k in tl.static_range(CELLS - 1, -1, -1):
                    equal = infinite & ~spread_sign(pair_differs(cells[k], best))
                    codes = (equal & cell_code(k // COLUMNS, k % COLUMNS, ROWS, COLUMNS) * 0x10001) | (~equal & codes)
                for k in tl.static_range(CELLS):
                    nan = spread_sign(pair_reaches(cells[k], INFINITY + 1))
                    codes = (nan & cell_code(k // COLUMNS, k % COLUMNS, ROWS, COLUMNS) * 0x10001) | (~nan & codes)
            c01, c23, c45, c67 = unpack(codes, 4)
            words = pack((low_bytes(c01, c23), low_bytes(c45, c67)), 2)
            tl.store(code_words_ptr + out_row * (C // 4) + (item * 2)[:, None] + tl.arange(0, 2), words)


# ---------------------------------------------------------------------------------------------- backward gather
@triton.constexpr_function
def match_mask(row, column, k):
    """The bits that are 0 in a word of four codes of 3x3 windows where code k % 4 means (row, column)."""
    return ONE_HOT_3X3[3 * row + column] << 8 * (k % 4)


@triton.jit
def select_matching(grad, codes, MASK: tl.constexpr, ASM: tl.constexpr):
    """codes & MASK == 0 ? grad : 0

    As inline assembly one logic instruction that writes a predicate, and one that uses it.  LLVM would collect the
    hundred predicates of a kernel in bit masks: 2 (pooling) to 11 (pooling with LRN) instructions more per element.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.eq.u32 p, t, 0; selp.f32 $0, $1, 0f00000000, p; }",
            "=f,f,r,r",
            [grad, codes, tl.full(codes.shape, MASK, tl.int32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.where((codes & MASK) == 0, grad, 0.0)


@triton.jit
def add_matching(acc, grad, codes, MASK: tl.constexpr, ASM: tl.constexpr):
    """acc + select_matching(...), in two instructions as well."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; and.b32 t, $3, $4; setp.eq.u32 p, t, 0; "
            "mov.b32 $0, $1; @p add.f32 $0, $1, $2; }",
            "=&f,f,f,r,r",
            [acc, grad, codes, tl.full(codes.shape, MASK, tl.int32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return acc + tl.where((codes & MASK) == 0, grad, 0.0)


@triton.jit
def select_window(grads, codes, ROW: tl.constexpr, COLUMN: tl.constexpr, VEC: tl.constexpr, ASM: tl.constexpr):
    """The gradients of a 3x3 window for its cell (ROW, COLUMN): VEC fp32 tensors, 0 where another cell won."""
    out = ()
    for k in tl.static_range(VEC):
        out = out + (select_matching(grads[k], codes[k // 4], match_mask(ROW, COLUMN, k), ASM),)
    return out


@triton.jit
def add_window(acc, grads, codes, ROW: tl.constexpr, COLUMN: tl.constexpr, VEC: tl.constexpr, ASM: tl.constexpr):
    """acc + select_window(...)"""
    out = ()
    for k in tl.static_range(VEC):
        out = out + (add_matching(acc[k], grads[k], codes[k // 4], match_mask(ROW, COLUMN, k), ASM),)
    return out


@triton.jit
def load_window(grad_ptr, codes_ptr, exists, VEC: tl.constexpr):
    """VEC consecutive gradients in fp32 and their codes, four to a word (VEC = 1: one), at pointers of any shape.

    Where the window does not exist, all bits of the codes are set: they match no cell.
    """
    exists = tl.expand_dims(exists, -1)
    grads = tl.load(tl.expand_dims(grad_ptr, -1) + tl.arange(0, VEC), mask=exists, other=0.0).to(tl.float32)
    if VEC == 1:
        codes = tl.load(tl.expand_dims(codes_ptr, -1), mask=exists, other=-1).to(tl.int32)
        return unpack(grads, 1), unpack(codes, 1)
    else:
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        codes = tl.load(tl.expand_dims(words_ptr, -1) + tl.arange(0, VEC // 4), mask=exists, other=-1)
        return unpack(grads, VEC), unpack(codes, VEC // 4)


@triton.jit
def gather_2x2(
    grad_ptr,
    codes_ptr,
    above,
    below,
    left,
    right,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    VEC: tl.constexpr,
    ASM: tl.constexpr,
):
    """Input gradients of the pixels (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1) under 3x3 windows with stride 2.

    The pointers (any shape) stand at window (i, j), VEC channels each; the strides step to the next window row and
    column.  `above`: i > 0; `below`: i < OH; `left`: j > 0; `right`: j < OW.  These four pixels meet four windows
    in nine cells.  Returns four tuples of VEC fp32 tensors; a pixel outside the input gets zeros.
    """
    grads, codes = load_window(grad_ptr, codes_ptr, below & right, VEC)
    p00 = select_window(grads, codes, 0, 0, VEC, ASM)
    p01 = select_window(grads, codes, 0, 1, VEC, ASM)
    p10 = select_window(grads, codes, 1, 0, VEC, ASM)
    p11 = select_window(grads, codes, 1, 1, VEC, ASM)
    grads, codes = load_window(grad_ptr - ROW_STRIDE, codes_ptr - ROW_STRIDE, above & right, VEC)
    p00 = add_window(p00, grads, codes, 2, 0, VEC, ASM)
    p01 = add_window(p01, grads, codes, 2, 1, VEC, ASM)
    grads, codes = load_window(grad_ptr - COLUMN_STRIDE, codes_ptr - COLUMN_STRIDE, below & left, VEC)
    p00 = add_window(p00, grads, codes, 0, 2, VEC, ASM)
    p10 = add_window(p10, grads, codes, 1, 2, VEC, ASM)
    corner: tl.constexpr = ROW_STRIDE + COLUMN_STRIDE
    grads, codes = load_window(grad_ptr - corner, codes_ptr - corner, above & left, VEC)
    p00 = add_window(p00, grads, codes, 2, 2, VEC, ASM)
    return p00, p01, p10, p11


@triton.jit
def max_pool_bwd_3x3s2_kernel(
    grad_ptr,  # (N, OH, OW, C)
    codes_ptr,  # (N, OH, OW, C) int8
    dx_ptr,  # (N, H, W, C)
    partials_ptr,  # (groups of row pairs * blocks of columns, C) fp32; unused unless PARTIALS
    row_pairs,  # N * ceil(H / 2)
    per_program,  # row pairs that one program walks over
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTIALS: tl.constexpr,
    ASM: tl.constexpr,
    V: tl.constexpr,
):
    """channels_last: a thread owns two columns of pixels and VEC channels, and walks down pairs of rows.

    Rows are the program's, so that their index arithmetic and the batch offset (int64) are scalars, and the bias
    gradient of a channel stays in registers until the end.  A program is one warp: with PARTIALS its V lanes are
    COLUMNS column pairs x V / COLUMNS channel vectors, and the final sum over columns is a few shuffles;
    without, the lanes run through (column pair, channel vector) and waste nothing.
    """
    CV: tl.constexpr = C // VEC
    PW: tl.constexpr = (W + 1) // 2
    PH: tl.constexpr = (H + 1) // 2
    lane = tl.arange(0, V)
    if PARTIALS:
        LANES_C: tl.constexpr = V // COLUMNS
        BLOCKS_C: tl.constexpr = CV // LANES_C
        BLOCKS_W: tl.constexpr = (PW + COLUMNS - 1) // COLUMNS
        BLOCKS: tl.constexpr = BLOCKS_C * BLOCKS_W
        block = tl.program_id(0) % BLOCKS
        cv = block % BLOCKS_C * LANES_C + lane % LANES_C
        j = block // BLOCKS_C * COLUMNS + lane // LANES_C
    else:
        BLOCKS: tl.constexpr = (PW * CV + V - 1) // V
        # A clamped thread repeats its neighbour and writes equal values twice: no mask that differs inside a vector.
        item = tl.minimum(tl.program_id(0) % BLOCKS * V + lane, PW * CV - 1)
        cv = item % CV
        j = item // CV
    group = tl.program_id(0) // BLOCKS
    left = (j > 0) & (j <= OW)
    right = j < OW
    first_column = (2 * j < W)[:, None]
    second_column = (2 * j + 1 < W)[:, None]
    vector = tl.arange(0, VEC)
    window = (j * CV + cv) * VEC
    pixel = ((2 * j * CV + cv) * VEC)[:, None] + vector
    total = tl.zeros([V, VEC], tl.float32)
    first = group * per_program
    for step in range(tl.minimum(per_program, row_pairs - first)):
        pair = first + step
        n = (pair // PH).to(tl.int64)
        i = pair % PH
        windows = (n * OH + i) * (OW * C)
        p00, p01, p10, p11 = gather_2x2(
            grad_ptr + windows + window,
            codes_ptr + windows + window,
            i > 0,
            i < OH,
            left,
            right,
            OW * C,
            C,
            VEC,
            ASM,
        )
        if PARTIALS:
            sums = ()
            for k in tl.static_range(VEC):
                sums = sums + ((p00[k] + p01[k]) + (p10[k] + p11[k]),)
            total += pack(sums, VEC)
        pixels = dx_ptr + (n * H + 2 * i) * (W * C) + pixel
        second_row = 2 * i + 1 < H
        dtype: tl.constexpr = dx_ptr.dtype.element_ty
        tl.store(pixels, pack(p00, VEC).to(dtype), mask=first_column)
        tl.store(pixels + C, pack(p01, VEC).to(dtype), mask=second_column)
        tl.store(pixels + W * C, pack(p10, VEC).to(dtype), mask=second_row & first_column)
        tl.store(pixels + (W * C + C), pack(p11, VEC).to(dtype), mask=second_row & second_column)
    if PARTIALS:
        row = (group * BLOCKS_W + block // BLOCKS_C).to(tl.int64)
        # every lane gets its channel's sum and the first column stores it: no change of layout, so no shared memory
        sums = tl.sum(tl.reshape(total, [COLUMNS, LANES_C, VEC]), 0, keep_dims=True)
        sums = tl.reshape(tl.broadcast_to(sums, [COLUMNS, LANES_C, VEC]), [V, VEC])
        partial = row * C + (cv * VEC)[:, None] + vector
        tl.store(partials_ptr + partial, sums, mask=(lane < LANES_C)[:, None])


@triton.jit
def max_pool_bwd_3x3s2_plane_kernel(
    grad_ptr,  # (N, C, OH, OW)
    codes_ptr,  # (N, C, OH, OW) int8
    dx_ptr,  # (N, C, H, W)
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    ASM: tl.constexpr,
    V: tl.constexpr,
):
    """NCHW: a thread owns 2x2 pixels of a plane.  Planes of odd size are misaligned, so loads are single elements."""
    PW: tl.constexpr = (W + 1) // 2
    PH: tl.constexpr = (H + 1) // 2
    ITEMS: tl.constexpr = C * PH * PW
    BLOCKS: tl.constexpr = (ITEMS + V - 1) // V
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    item = tl.minimum(tl.program_id(0) % BLOCKS * V + tl.arange(0, V), ITEMS - 1)
    j = item % PW
    i = item // PW % PH
    c = item // (PW * PH)
    window = n * (C * OH * OW) + (c * OH + i) * OW + j
    p00, p01, p10, p11 = gather_2x2(grad_ptr + window, codes_ptr + window, i > 0, i < OH, j > 0, j < OW, OW, 1, 1, ASM)
    pixel_ptr = dx_ptr + n * (C * H * W) + (c * H + 2 * i) * W + 2 * j
    second_row = 2 * i + 1 < H
    second_column = 2 * j + 1 < W
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    tl.store(pixel_ptr, p00[0].to(dtype))
    tl.store(pixel_ptr + 1, p01[0].to(dtype), mask=second_column)
    tl.store(pixel_ptr + W, p10[0].to(dtype), mask=second_row)
    tl.store(pixel_ptr + W + 1, p11[0].to(dtype), mask=second_row & second_column)


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    PIXEL: tl.constexpr,
):
    """acc plus the gradient of one of the windows that cover pixel (h, w), where its code names that pixel."""
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    V: tl.constexpr,
):
    """Any window, layout and dtype: a thread sums the windows that cover one pixel, VEC channels (1 in NCHW)."""
    ITEMS: tl.constexpr = H * W * C // VEC
    BLOCKS: tl.constexpr = (ITEMS + V - 1) // V
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    item = tl.minimum(tl.program_id(0) % BLOCKS * V + tl.arange(0, V), ITEMS - 1)
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
    acc = tl.zeros([V, VEC], tl.float32)
    # how many windows can cover a pixel along each dimension
    KH: tl.constexpr = ((ROWS - 1) * DH + SH) // SH
    KW: tl.constexpr = ((COLUMNS - 1) * DW + SW) // SW
    if KH * KW <= MAX_UNROLLED:
        for k in tl.static_range(KH * KW):
            acc = add_covering_window(
                acc, grads, codes, h, w, k // KW, k % KW, OH, OW, ROWS, COLUMNS, SH, SW, PH, PW, DH, DW, PIXEL
            )
    else:
        for kh in range(KH):
            for kw in range(KW):
                acc = add_covering_window(
                    acc, grads, codes, h, w, kh, kw, OH, OW, ROWS, COLUMNS, SH, SW, PH, PW, DH, DW, PIXEL
                )
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    V: tl.constexpr,
):
    """Codes to h * W + w of the input plane, one element a lane."""
    ITEMS: tl.constexpr = OH * OW * C
    BLOCKS: tl.constexpr = (ITEMS + V - 1) // V
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    item = tl.program_id(0) % BLOCKS * V + tl.arange(0, V)
    position = item // C if CHANNELS_LAST else item
    ow = position % OW
    oh = position // OW % OH
    code = tl.load(codes_ptr + n * ITEMS + item, mask=item < ITEMS, other=0).to(tl.int32)
    if ROWS + COLUMNS <= 6:
        row = tl.zeros([V], tl.int32)
        column = tl.zeros([V], tl.int32)
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


def rows_per_program(rows: int, blocks: int) -> int:
    """How many rows a program walks, as far as there are programs enough without."""
    return max(1, min(MAX_ROWS_PER_PROGRAM, rows * blocks // MANY_PROGRAMS))


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
    is 0 then get the dead code, so that max_pool_bwd carries the ReLU mask of the layer below.

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
    cells = window.kernel_size[0] * window.kernel_size[1]
    if vec == 8 and cells <= MAX_UNROLLED.value and window.inside((h, w), (oh, ow)) and use_asm():
        blocks = triton.cdiv(ow * c // 8, WARP)
        per_program = rows_per_program(n * oh, blocks)
        max_pool_fwd_packed_kernel[(triton.cdiv(n * oh, per_program) * blocks,)](
            x, y, code_out, n * oh, per_program, **sizes, **window.constants, **kinds, V=WARP, num_warps=1
        )
    else:
        max_pool_fwd_kernel[(n * triton.cdiv(oh * ow * c // vec, LANES),)](
            x,
            y,
            code_out,
            **sizes,
            **window.constants,
            **window.padding_constants,
            **kinds,
            CHANNELS_LAST=channels_last,
            VEC=vec,
            V=LANES,
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
    if window.is_3x3_stride_2 and vec >= 4 and window.inside((h, w), (oh, ow)):
        return bwd_3x3s2(grad, codes, dx, sizes, vec, bias_partials)
    if window.is_3x3_stride_2 and not channels_last and window.inside((h, w), (oh, ow)):
        items = c * triton.cdiv(h, 2) * triton.cdiv(w, 2)
        max_pool_bwd_3x3s2_plane_kernel[(n * triton.cdiv(items, LANES),)](
            grad, codes, dx, **sizes, ASM=use_asm(), V=LANES, num_warps=4
        )
    else:
        max_pool_bwd_kernel[(n * triton.cdiv(h * w * c // vec, LANES),)](
            grad,
            codes,
            dx,
            **sizes,
            **window.constants,
            **window.padding_constants,
            CHANNELS_LAST=channels_last,
            VEC=vec,
            V=LANES,
            num_warps=4,
        )
    return (dx, dx.sum((0, 2, 3), dtype=torch.float32)[None]) if bias_partials else dx


def bwd_3x3s2(grad: Tensor, codes: Tensor, dx: Tensor, sizes: dict[str, int], vec: int, bias_partials: bool):
    """max_pool_bwd in channels_last for 3x3 windows with stride 2."""
    n, c, h, w = dx.shape
    row_pairs = n * triton.cdiv(h, 2)
    column_pairs = triton.cdiv(w, 2)
    vectors = c // vec
    # 4 channel vectors beside each other are 64 bytes; the other lanes go over columns, which a warp can sum
    lanes_c = min(4, vectors & -vectors)
    columns = WARP // lanes_c
    if bias_partials:
        column_blocks = triton.cdiv(column_pairs, columns)
        blocks = vectors // lanes_c * column_blocks
        moved = dx.numel() * dx.element_size() + grad.numel() * (grad.element_size() + 1)
        groups = max(1, int(PARTIALS_SHARE * moved) // (column_blocks * c * 4))
        per_program = max(triton.cdiv(row_pairs, groups), rows_per_program(row_pairs, blocks))
        groups = triton.cdiv(row_pairs, per_program)
        partials = torch.empty((groups * column_blocks, c), dtype=torch.float32, device=dx.device)
    else:
        blocks = triton.cdiv(column_pairs * vectors, WARP)
        per_program = rows_per_program(row_pairs, blocks)
        groups = triton.cdiv(row_pairs, per_program)
        partials = dx
    max_pool_bwd_3x3s2_kernel[(groups * blocks,)](
        grad,
        codes,
        dx,
        partials,
        row_pairs,
        per_program,
        **sizes,
        VEC=vec,
        COLUMNS=columns,
        PARTIALS=bias_partials,
        ASM=use_asm(),
        V=WARP,
        num_warps=1,
    )
    return (dx, partials) if bias_partials else dx


def max_pool_indices(
    codes: Tensor, input_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The codes of max_pool_fwd as PyTorch's indices: int64 h * W + w of the input plane, in the codes' memory format.

    For codes that are not dead.  Raises ValueError as max_pool_bwd.
    """
    window = Window(kernel_size, stride, padding, dilation)
    check_codes(codes, input_size, window)
    layout = memory_format(codes)
    codes = codes.contiguous(memory_format=layout)
    indices = torch.empty(codes.shape, dtype=torch.int64, device=codes.device, memory_format=layout)
    n, c, oh, ow = codes.shape
    if indices.numel() > 0:
        max_pool_indices_kernel[(n * triton.cdiv(c * oh * ow, LANES),)](
            codes,
            indices,
            W=input_size[1],
            OH=oh,
            OW=ow,
            C=c,
            **window.constants,
            **window.padding_constants,
            CHANNELS_LAST=layout == torch.channels_last,
            V=LANES,
            num_warps=4,
        )
    return indices
