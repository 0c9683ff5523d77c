"""Building blocks of the convolutions as matrix products: taps, tiles of odd widths, the target.

A convolution's sum runs over taps (r, s) and input channels c, taps outside and channels inside, in one flat loop:
the software pipeline then never drains between taps (unrolling the taps gives 4,000 instructions and spills).
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .registers import interpreting

# The narrowest tile of a tensor-core product, in either direction.
NARROWEST = 16


def capability():
    """Compute capability of the GPU that launches go to, 90 for 9.0; 0 for AMD; 80 in the interpreter."""
    if interpreting():
        return 80
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def descriptor(matrix, rows, columns):
    """Tiles of rows x columns of a packed matrix, copied by the tensor memory accelerator.  None without either."""
    if matrix is None or 0 in (rows, columns):
        return None
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def split_tile(count, limit):
    """Two widths of tile (a, b), b = a / 2 or 0, powers of two, for `count` channels; a is at most `limit`.

    The widest a + b that divides the count, but `limit` alone if it does: 96 = 64 + 32, 192 = 128 + 64, 48 = 32 + 16.
    Padding them to a power of two instead would waste a quarter of the tile.  A count that nothing divides gets the
    widest tile that wastes the least, or within a quarter of that.
    """
    widths = [NARROWEST << i for i in range(8) if NARROWEST << i <= limit]
    pairs = [(a, 0) for a in widths] + [(a, a // 2) for a in widths if a > NARROWEST]
    if count % limit == 0:
        return limit, 0
    whole = [pair for pair in pairs if count % sum(pair) == 0]
    if whole:
        return max(whole, key=sum)
    padded = {a: triton.cdiv(count, a) * a for a in widths}
    return max(a for a in widths if padded[a] <= 1.25 * min(padded.values())), 0


@triton.jit
def tap_range(start, size, taps, DILATION: tl.constexpr):
    """[first, stop) of the taps t for which start + t * DILATION lies in [0, size); first = stop if there are none."""
    # Triton's // rounds to zero: wrong for negative numbers, which the bounds replace anyway
    first = tl.minimum(tl.maximum((DILATION - 1 - start) // DILATION, 0), taps)
    stop = tl.minimum((size - start + DILATION - 1) // DILATION, taps)
    return first, tl.maximum(stop, first)


@triton.jit
def next_step(
    r, s, c, s_first, s_stop, channels, DEPTH: tl.constexpr, R_STEP: tl.constexpr = 1, S_STEP: tl.constexpr = 1
):  # fmt: skip
    """The step after (r, s, c): DEPTH channels on, then S_STEP taps in [s_first, s_stop), then R_STEP rows of taps."""
    c += DEPTH
    done = c >= channels
    c = tl.where(done, 0, c)
    s = tl.where(done, s + S_STEP, s)
    done = s >= s_stop
    r = tl.where(done, r + R_STEP, r)
    s = tl.where(done, s_first, s)
    return r, s, c


@triton.jit
def tap_bits(start, size, TAPS: tl.constexpr, DILATION: tl.constexpr):
    """One bit per tap t: whether start + t * DILATION lies in [0, size).  For up to 31 taps and a vector of starts."""
    bits = tl.zeros(start.shape, tl.int32)
    for t in tl.static_range(TAPS):
        position = start + t * DILATION
        bits |= ((position >= 0) & (position < size)).to(tl.int32) << t
    return bits


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc + a @ b in fp32.  WIDEN: bf16 in the interpreter, whose product of bf16 is garbage."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
