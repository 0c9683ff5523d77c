"""Building blocks of the convolutions as matrix products: taps, products, the target.

A convolution's sum runs over taps (r, s) and input channels c, taps outside and channels inside, in one flat loop:
the software pipeline then never drains between taps (unrolling the taps gives 4,000 instructions and spills).

Two tuples carry what is fixed when a kernel is compiled:

    CONV  C_IN and C_OUT of a group, GROUPS, R, S, STRIDE_H, STRIDE_W, TOP, LEFT, DILATION_H, DILATION_W
    TILE  BLOCK_M, BLOCK_N, BLOCK_N_TAIL, BLOCK_K, BLOCK_K_TAIL, WARP_SPECIALIZE (`config.Config.tile`)
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..registers import interpreting

# The narrowest tile of a tensor-core product, in either direction.
NARROWEST = 16


def capability():
    """Compute capability of the GPU that launches go to, 90 for 9.0; 0 for AMD; 80 in the interpreter."""
    if interpreting():
        return 80
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def conv_of(weight_shape, groups, stride, padding, dilation):
    """CONV, for a weight (K, C / groups, R, S)."""
    features, channels, rows, columns = weight_shape
    (top, _), (left, _) = padding
    return (channels, features // groups, groups, rows, columns, *stride, top, left, *dilation)


def descriptor(matrix, rows, columns):
    """Tiles of rows x columns of a packed matrix, copied by the tensor memory accelerator.  None without either."""
    if matrix is None or 0 in (rows, columns):
        return None
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def precision_of(dtype, precision):
    """The kernels' PRECISION: "ieee" or "tf32" of fp32's factors; "widened": bf16 in the interpreter."""
    if interpreting() and dtype == torch.bfloat16:
        return "widened"
    return precision if dtype == torch.float32 else "ieee"


@triton.jit
def tap_range(start, size, taps, DILATION: tl.constexpr):
    """[first, stop) of the taps t for which start + t * DILATION lies in [0, size); first = stop if there are none."""
    # Triton's // rounds to zero: wrong for negative numbers, which the bounds replace anyway
    first = tl.minimum(tl.maximum((DILATION - 1 - start) // DILATION, 0), taps)
    stop = tl.minimum((size - start + DILATION - 1) // DILATION, taps)
    return first, tl.maximum(stop, first)


@triton.jit
def next_step(
    r, s, c, s_first, s_stop, channels, BLOCK_K: tl.constexpr, R_STEP: tl.constexpr = 1, S_STEP: tl.constexpr = 1
):  # fmt: skip
    """The step after (r, s, c): BLOCK_K channels, then S_STEP taps in [s_first, s_stop), then R_STEP rows of taps."""
    c += BLOCK_K
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
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32.  "widened": the interpreter's product of bf16 is garbage."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
