"""Bias, ReLU and dropout over a fresh convolution or matrix product, in place: one read and one write.

    y = max(0, z + bias_c)                    without dropout
    y = keep ? max(0, z + bias_c) / (1 - p) : 0

No mask is stored.  Zeros of y are exactly the elements whose gradient is zero, whether ReLU or dropout made
them, so backward is `relu_bias_grad(grad, y, scale=1 / (1 - p))`.
"""

import torch
import triton
import triton.language as tl

from .geometry import is_channels_last
from .registers import DTYPES, pack, unpack, vector_width, warps

THREADS = 128


@triton.jit
def uniforms(seed, vector, VEC: tl.constexpr):
    """VEC uniform numbers in [0, 1) per vector; element i of memory gets word i % 4 of Philox block i // 4."""
    out = ()
    for i in tl.static_range(VEC // 4):
        out = out + tl.rand4x(seed, vector * (VEC // 4) + i)
    return out


@triton.jit
def bias_relu_kernel(
    z_ptr,  # (N, CHANNELS, INNER), any number of elements; overwritten with y
    bias_ptr,  # CHANNELS, or None
    seed_ptr,  # one int64, or None for no dropout
    count,  # elements
    p,  # probability of dropping an element
    scale,  # 1 / (1 - p)
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One vector of VEC elements in memory order per thread, 16 bytes whatever the layout.

    Masked, not clamped: two threads that update the same vector in place would add the bias twice.
    """
    program = tl.program_id(0)
    if LARGE:
        program = program.to(tl.int64)
    vector = program * BLOCK + tl.arange(0, BLOCK)
    first = vector.to(tl.int64) * VEC
    index = first[:, None] + tl.arange(0, VEC)[None, :]
    if WHOLE:
        # constant along each vector, which keeps its load and store whole
        mask = (vector < count // VEC)[:, None]
    else:
        mask = index < count
    z = unpack(tl.load(z_ptr + index, mask=mask, other=0.0).to(tl.float32), VEC)

    if bias_ptr is not None:
        if INNER == 1 and CHANNELS % VEC == 0:
            channel = vector % (CHANNELS // VEC) * VEC
            bias = unpack(tl.load(bias_ptr + channel[:, None] + tl.arange(0, VEC)[None, :]).to(tl.float32), VEC)
        else:
            bias = ()
            for i in tl.static_range(VEC):
                channel = (vector * VEC + i) // INNER % CHANNELS
                bias = bias + (tl.load(bias_ptr + channel).to(tl.float32),)
    if seed_ptr is not None:
        u = uniforms(tl.load(seed_ptr), vector, VEC)

    y = ()
    for i in tl.static_range(VEC):
        value = z[i]
        if bias_ptr is not None:
            value = value + bias[i]
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if seed_ptr is not None:
            value = tl.where(u[i] >= p, value * scale, 0.0)
        y = y + (value,)
    tl.store(z_ptr + index, pack(y, VEC).to(z_ptr.dtype.element_ty), mask=mask)


def bias_relu_(z, bias=None, *, p=0.0, seed=None):
    """y = max(0, z + bias), with dropout for p > 0, written over z; returns z.

    Only for a z that nobody else holds: the fresh output of a convolution or a matrix product.

    z: (N, C) or (N, C, ...), fp16, bf16 or fp32, packed, channels last or contiguous; bias: (C,), any of these
    dtypes, or None.  Computed in fp32, rounded once.  p: probability of dropping an element, in [0, 1]; kept
    values are scaled by 1 / (1 - p), dropped ones are 0 (NaN and infinities too, where torch writes NaN).
    seed: int64 tensor of one element on z's device, read by the kernel, so that a captured CUDA graph draws
    anew when it changes.  Equal seeds drop the same places in memory, whatever the dtype.  NaN stays NaN.

    Raises ValueError for a wrong rank, dtype, layout, bias shape, p, or a missing or wrong seed.
    """
    if z.dim() < 2:
        raise ValueError(f"z must have 2 or more dimensions (N, C, ...), got shape {tuple(z.shape)}")
    if z.dtype not in DTYPES:
        raise ValueError(f"z must be fp16, bf16 or fp32, got {z.dtype}")
    if not (z.is_contiguous() or is_channels_last(z)):
        raise ValueError(f"z must be packed, channels last or contiguous, got strides {z.stride()}")
    channels = z.shape[1]
    if bias is not None and (bias.shape != (channels,) or bias.dtype not in DTYPES):
        raise ValueError(
            f"bias must be fp16, bf16 or fp32 of shape ({channels},), got {bias.dtype} {tuple(bias.shape)}"
        )
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie between 0 and 1, got {p}")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != z.device):
        got = seed if seed is None else f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
        raise ValueError(f"seed must be one int64 on {z.device} where p > 0, got {got}")
    if z.numel() == 0:
        return z

    vec = vector_width(z.dtype)
    bias_relu_kernel[(triton.cdiv(z.numel(), vec * THREADS),)](
        z,
        None if bias is None else bias.contiguous(),
        seed if p > 0 else None,
        z.numel(),
        p,
        1 / (1 - p) if p < 1 else 0.0,
        CHANNELS=channels,
        INNER=1 if is_channels_last(z) else z[0, 0].numel(),
        VEC=vec,
        WHOLE=z.numel() % vec == 0,
        LARGE=z.numel() >= 2**31 - 2**16,
        BLOCK=THREADS,
        num_warps=warps(THREADS),
    )
    return z
