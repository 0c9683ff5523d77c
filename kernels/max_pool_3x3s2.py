"""Backward of 3x3 max-pooling with stride 2, from window codes: what AlexNet's networks pool with.

2x2 pixels meet four windows in nine cells.  A thread that owns them reads each code once, where the kernel for any
window reads it up to four times; codes stay four to a word, tested by one logic instruction.  Compulsory traffic in
fp16: 2.72 bytes per input element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import one_hot
from .registers import pack, unpack, use_asm

# One warp a program where rows are walked: a warp-wide sum then needs no shared memory.
WARP = 32
# Pixels a program in NCHW, one per thread of four warps.
BLOCK = 128
# Programs that fill any GPU here several times over (132 processors x 32 warps x 4); fewer would idle at the end.
MANY_PROGRAMS = 16384
# Walking more rows than this saves nothing more: the per-program prologue is 40 of about 165 instructions a row.
MAX_ROWS_PER_PROGRAM = 4
# Channel-sum partials may add this share to the bytes that the backward pass moves anyway.
PARTIALS_SHARE = 0.02

ONE_HOT_3X3 = tl.constexpr(tuple(one_hot(row, column, 3, 3) for row in range(3) for column in range(3)))


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
    partials_ptr,  # (groups of row pairs * blocks of columns, C) fp32, or None
    row_pairs,  # N * ceil(H / 2)
    per_program,  # row pairs that one program walks over
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    COLUMNS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """channels_last: a thread owns two columns of pixels and VEC channels, and walks down pairs of rows.

    Rows are the program's, so that their index arithmetic and the batch offset (int64) are scalars, and the bias
    gradient of a channel stays in registers until the end.  A program is one warp: with partials its BLOCK lanes are
    COLUMNS column pairs x BLOCK / COLUMNS channel vectors, and the final sum over columns is a few shuffles;
    without, the lanes run through (column pair, channel vector) and waste nothing.
    """
    CV: tl.constexpr = C // VEC
    PW: tl.constexpr = (W + 1) // 2
    PH: tl.constexpr = (H + 1) // 2
    lane = tl.arange(0, BLOCK)
    if partials_ptr is not None:
        LANES_C: tl.constexpr = BLOCK // COLUMNS
        BLOCKS_C: tl.constexpr = CV // LANES_C
        BLOCKS_W: tl.constexpr = (PW + COLUMNS - 1) // COLUMNS
        BLOCKS: tl.constexpr = BLOCKS_C * BLOCKS_W
        block = tl.program_id(0) % BLOCKS
        cv = block % BLOCKS_C * LANES_C + lane % LANES_C
        j = block // BLOCKS_C * COLUMNS + lane // LANES_C
    else:
        BLOCKS: tl.constexpr = (PW * CV + BLOCK - 1) // BLOCK
        # A clamped thread repeats its neighbour and writes equal values twice: no mask that differs inside a vector.
        item = tl.minimum(tl.program_id(0) % BLOCKS * BLOCK + lane, PW * CV - 1)
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
    total = tl.zeros([BLOCK, VEC], tl.float32)
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
        if partials_ptr is not None:
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
    if partials_ptr is not None:
        row = (group * BLOCKS_W + block // BLOCKS_C).to(tl.int64)
        # every lane gets its channel's sum and the first column stores it: no change of layout, so no shared memory
        sums = tl.sum(tl.reshape(total, [COLUMNS, LANES_C, VEC]), 0, keep_dims=True)
        sums = tl.reshape(tl.broadcast_to(sums, [COLUMNS, LANES_C, VEC]), [BLOCK, VEC])
        partial = row * C + (cv * VEC)[:, None] + vector
        tl.store(partials_ptr + partial, sums, mask=(lane < LANES_C)[:, None])


@triton.jit
def max_pool_bwd_3x3s2_nchw_kernel(
    grad_ptr,  # (N, C, OH, OW)
    codes_ptr,  # (N, C, OH, OW) int8
    dx_ptr,  # (N, C, H, W)
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """NCHW: a thread owns 2x2 pixels of a plane.  Planes of odd size are misaligned, so loads are single elements."""
    PW: tl.constexpr = (W + 1) // 2
    PH: tl.constexpr = (H + 1) // 2
    ITEMS: tl.constexpr = C * PH * PW
    BLOCKS: tl.constexpr = (ITEMS + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    item = tl.minimum(tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK), ITEMS - 1)
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


# ---------------------------------------------------------------------------------------------- launchers
def rows_per_program(rows: int, blocks: int) -> int:
    """How many rows a program walks, as far as there are programs enough without."""
    return max(1, min(MAX_ROWS_PER_PROGRAM, rows * blocks // MANY_PROGRAMS))


def max_pool_bwd_3x3s2(grad: Tensor, codes: Tensor, dx: Tensor, vec: int, bias_partials: bool) -> Tensor | None:
    """Fill dx, in channels_last, by vectors of 4 or 8 channels; returns fp32 (P, C) that sum to dx's sums, if wanted.

    grad, codes, dx: dense, 16-byte aligned, as max_pool_bwd has checked them.
    """
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
        partials = None
    max_pool_bwd_3x3s2_kernel[(groups * blocks,)](
        grad,
        codes,
        dx,
        partials,
        row_pairs,
        per_program,
        H=h,
        W=w,
        OH=codes.shape[2],
        OW=codes.shape[3],
        C=c,
        VEC=vec,
        COLUMNS=columns,
        ASM=use_asm(),
        BLOCK=WARP,
        num_warps=1,
    )
    return partials


def max_pool_bwd_3x3s2_nchw(grad: Tensor, codes: Tensor, dx: Tensor) -> None:
    """Fill dx, in NCHW, as above."""
    n, c, h, w = dx.shape
    items = c * triton.cdiv(h, 2) * triton.cdiv(w, 2)
    max_pool_bwd_3x3s2_nchw_kernel[(n * triton.cdiv(items, BLOCK),)](
        grad, codes, dx, H=h, W=w, OH=codes.shape[2], OW=codes.shape[3], C=c, ASM=use_asm(), BLOCK=BLOCK, num_warps=4
    )
