"""Max-pooling over windows of up to 127 cells, forward and backward, with one-byte codes in place of indices.

Forward writes the maximum and the code of its cell (window_code.py); backward is a gather: each input pixel looks at
the windows that cover it, so nothing is added atomically and two runs are bit-equal.  Compulsory traffic of a
3x3 window with stride 2 in fp16, channels_last or not: 2.72 bytes per input element each way.
"""

import torch
import triton
import triton.language as tl

from .registers import pack, unpack
from .window_code import one_hot

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# One thread keeps this many windows or pixels in unrolled code; larger windows take runtime loops.
MAX_UNROLLED = 9

ONE_HOT_3X3 = tl.constexpr(tuple(one_hot(row, column, 3, 3) for row in range(3) for column in range(3)))


# ---------------------------------------------------------------------------------------------- backward gather
@triton.constexpr_function
def match_mask(row, column, k):
    """The bits that are 0 in a word of four codes of 3x3 windows where code k % 4 means (row, column)."""
    return ONE_HOT_3X3[3 * row + column] << 8 * (k % 4)


@triton.jit
def add_matching(acc, grad, codes, MASK: tl.constexpr, ASM: tl.constexpr):
    """acc + (codes & MASK == 0 ? grad : 0)

    As inline assembly this is one logic instruction that writes a predicate and one predicated addition; LLVM
    would collect the hundred predicates of a kernel in bit masks, 8 to 11 instructions more per element.
    """
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
def select_window(grads, codes, ROW: tl.constexpr, COLUMN: tl.constexpr, VEC: tl.constexpr):
    """The gradients of a 3x3 window for its cell (ROW, COLUMN): VEC fp32 tensors, 0 where another cell won."""
    out = ()
    for k in tl.static_range(VEC):
        out = out + (tl.where((codes[k // 4] & match_mask(ROW, COLUMN, k)) == 0, grads[k], 0.0),)
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
    p00 = select_window(grads, codes, 0, 0, VEC)
    p01 = select_window(grads, codes, 0, 1, VEC)
    p10 = select_window(grads, codes, 1, 0, VEC)
    p11 = select_window(grads, codes, 1, 1, VEC)
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
    partials_ptr,  # (programs along rows * ceil(W / 2), C) fp32; unused unless PARTIALS
    row_pairs,  # N * ceil(H / 2)
    per_program,  # row pairs that one program walks over
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    VEC: tl.constexpr,
    PARTIALS: tl.constexpr,
    ASM: tl.constexpr,
    V: tl.constexpr,
):
    """channels_last: a thread owns two columns of pixels and VEC channels, and walks down pairs of rows.

    Rows are the program's, so that their index arithmetic and the batch offset (int64) are scalars, and the bias
    gradient of a channel stays in registers until the end.
    """
    CV: tl.constexpr = C // VEC
    PW: tl.constexpr = (W + 1) // 2
    PH: tl.constexpr = (H + 1) // 2
    BLOCKS: tl.constexpr = (PW * CV + V - 1) // V
    group = tl.program_id(0) // BLOCKS
    # A clamped thread repeats its neighbour and writes equal values twice; a mask would not be uniform over VEC.
    item = tl.minimum((tl.program_id(0) % BLOCKS) * V + tl.arange(0, V), PW * CV - 1)
    cv = item % CV
    j = item // CV
    left = j > 0
    right = j < OW
    second_column = (2 * j + 1 < W)[:, None]
    vector = tl.arange(0, VEC)
    window = (j * CV + cv) * VEC
    pixel = ((2 * j * CV + cv) * VEC)[:, None] + vector
    total = tl.zeros([V, VEC], tl.float32)
    for pair in range(group * per_program, tl.minimum((group + 1) * per_program, row_pairs)):
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
        tl.store(pixels, pack(p00, VEC).to(dtype))
        tl.store(pixels + C, pack(p01, VEC).to(dtype), mask=second_column)
        tl.store(pixels + W * C, pack(p10, VEC).to(dtype), mask=second_row)
        tl.store(pixels + (W * C + C), pack(p11, VEC).to(dtype), mask=second_row & second_column)
    if PARTIALS:
        row = group.to(tl.int64) * (PW * C)
        tl.store(partials_ptr + row + window[:, None] + vector, total)
