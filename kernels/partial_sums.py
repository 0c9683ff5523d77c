"""The last step of every sum that is split between programs: rows of fp32 partial sums, added in a fixed order.

    out_c = max(0, sum over p of partials_pc + bias_c)          bias and max where they are asked for

One read of the partials and one write of the result; no atomics, so two runs give equal bits.
"""

import torch
import triton
import triton.language as tl

from .registers import warps

THREADS = 128
# Elements of a program's tile, at most 128 rows of them: 8 columns are one 32-byte sector of each row.
TILE = 1024
MAX_ROWS = 128
# From here on there are programs enough without sharing the rows of a column.
LONG = 16 * TILE
# Tiles that one program adds, all of them in flight at once: 16 loads of 16 bytes per thread.
MAX_STEPS = 8
# Four for each of 132 multiprocessors.
ENOUGH_PROGRAMS = 528


@triton.jit
def sum_partials_kernel(
    partials_ptr,  # count x length, fp32
    bias_ptr,  # `features`, or None
    out_ptr,  # programs per block of columns x length
    count,
    length,
    features,  # the columns repeat the bias: column i has entry i % features
    RELU: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program adds STEPS blocks of ROWS rows of one block of columns; no load waits for another.

    With ROWS = 1 it adds all rows, STEPS of them at a time.
    """
    blocks = tl.cdiv(length, COLUMNS)
    chunk = tl.program_id(0) // blocks
    c = (tl.program_id(0) - chunk * blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    if ROWS == 1:
        # a thread keeps its columns: nothing is exchanged, and they are stored as wide as they are loaded
        total = tl.zeros([COLUMNS], tl.float32)
        for p in range(0, count, STEPS):
            for step in tl.static_range(STEPS):
                mask = (c < length) & (p + step < count)
                total += tl.load(partials_ptr + tl.cast(p + step, tl.int64) * length + c, mask=mask, other=0.0)
    else:
        first = chunk * (STEPS * ROWS) + tl.arange(0, ROWS)
        tile = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in tl.static_range(STEPS):
            p = first + step * ROWS
            mask = (p < count)[:, None] & (c < length)[None, :]
            tile += tl.load(partials_ptr + p.to(tl.int64)[:, None] * length + c[None, :], mask=mask, other=0.0)
        total = tl.sum(tile, 0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c % features, mask=c < length, other=0.0).to(tl.float32)
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + chunk.to(tl.int64) * length + c, total.to(out_ptr.dtype.element_ty), mask=c < length)


def sum_partials(partials, bias=None, *, relu=False, dtype=torch.float32):
    """The sum over the rows of an fp32 matrix (P, L), plus a bias, then max(0, x): [L] in `dtype`, rounded once.

    bias: [K] for a K that divides L, added to every K columns; or None.  P = 0 sums to zeros.  NaN stays NaN.  One
    launch for up to 1,024 rows, two for up to a million.
    """
    count, length = partials.shape
    if not length:
        return torch.empty(0, dtype=dtype, device=partials.device)
    if not count:
        partials, count = partials.new_zeros(1, length), 1
    # parts of a whole tensor are few and long, partial sums of channels many and short
    rows = 1 if count <= MAX_STEPS * MAX_STEPS and length >= LONG else MAX_ROWS
    columns = TILE // rows
    blocks = triton.cdiv(length, columns)
    while True:
        tiles = triton.cdiv(count, rows)
        # what one launch can finish, it does; before that, as many programs as run at once
        finishes = rows == 1 or tiles <= MAX_STEPS
        steps = triton.next_power_of_2(
            min(MAX_STEPS, tiles if finishes else triton.cdiv(tiles * blocks, ENOUGH_PROGRAMS))
        )
        chunks = 1 if finishes else triton.cdiv(tiles, steps)
        out = torch.empty(chunks, length, dtype=dtype if finishes else torch.float32, device=partials.device)
        sum_partials_kernel[(chunks * blocks,)](
            partials, bias if finishes else None, out, count, length, 1 if bias is None else bias.numel(),
            RELU=relu and finishes, STEPS=steps, ROWS=rows, COLUMNS=columns, num_warps=warps(THREADS),
        )  # fmt: skip
        if finishes:
            return out[0]
        partials, count = out, chunks
