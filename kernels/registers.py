"""Building blocks that the kernels share: channel vectors as registers, window sums, powers.

A thread holds 16 bytes of consecutive channels (8 of fp16/bf16, 4 of fp32) as separate register tensors.
Windows over channels are then plain unrolled scalar code: no shared memory, no shuffles.
"""

import torch
import triton
import triton.language as tl

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Of a warp: 64 on AMD's datacentre GPUs (CDNA), whose warps are called waves.
LANES = 32 if torch.version.hip is None else 64


def interpreting():
    """Whether kernels run in Triton's interpreter; TRITON_INTERPRET was read when they were decorated."""
    return not isinstance(unpack, triton.runtime.jit.JITFunction)


def use_asm():
    """Whether kernels may contain PTX: compiled, and for NVIDIA."""
    return torch.version.hip is None and not interpreting()


def warps(threads):
    """num_warps for so many threads; more of them would split the vectors."""
    return threads // LANES


def vector_width(dtype):
    """Elements in the 16 bytes that a thread loads or stores at once."""
    return 16 // dtype.itemsize


@triton.constexpr_function
def next_power_of_2(n):
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def unpack(x, N: tl.constexpr):
    """Split the last dimension (N = 1, 2, 4, 8 or 16) into a tuple of N tensors, order kept."""
    if N == 1:
        return (tl.reshape(x, x.shape[:-1]),)
    elif N == 2:
        return tl.split(x)
    else:
        even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [N // 2, 2]))
        evens = unpack(even, N // 2)
        odds = unpack(odd, N // 2)
        out = ()
        for i in tl.static_range(N // 2):
            out = out + (evens[i], odds[i])
        return out


@triton.jit
def pack(t, N: tl.constexpr):
    """The inverse of `unpack`: N equal tensors become one with a last dimension of N."""
    if N == 1:
        return tl.expand_dims(t[0], -1)
    elif N == 2:
        return tl.join(t[0], t[1])
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(0, N, 2):
            evens = evens + (t[i],)
            odds = odds + (t[i + 1],)
        both = tl.join(pack(evens, N // 2), pack(odds, N // 2))
        return tl.reshape(both, t[0].shape + [N])


@triton.jit
def take(t, START: tl.constexpr, STOP: tl.constexpr):
    """t[START:STOP] of a tuple."""
    out = ()
    for i in tl.static_range(START, STOP):
        out = out + (t[i],)
    return out


@triton.jit
def window_sums(q, N: tl.constexpr, SIZE: tl.constexpr):
    """N sums of SIZE neighbours out of N + SIZE - 1 values.

    Size 5 lets two neighbouring sums share their middle four values: 17 additions per 8 sums, without the
    cancellation of a running difference.
    """
    out = ()
    if SIZE == 5 and N % 2 == 0:
        for i in tl.static_range(0, N, 2):
            middle = (q[i + 1] + q[i + 2]) + (q[i + 3] + q[i + 4])
            out = out + (q[i] + middle, middle + q[i + 5])
    else:
        for i in tl.static_range(N):
            total = q[i]
            for j in tl.static_range(1, SIZE):
                total = total + q[i + j]
            out = out + (total,)
    return out


@triton.jit
def inverse_power(d, BETA: tl.constexpr, ASM: tl.constexpr):
    """d ** -BETA for d > 0.

    The exponents in use cost two MUFU instructions.  Others go through lg2.approx/ex2.approx: `tl.log2` is
    a software routine on NVIDIA targets, 30 instructions more per element than this whole function.
    ASM = False (the interpreter and AMD) takes the portable form.
    """
    if BETA == 0.75:
        r = tl.rsqrt(d)
        out = r * tl.sqrt(r)
    elif BETA == 0.5:
        out = tl.rsqrt(d)
    elif BETA == 1.0:
        r = tl.rsqrt(d)
        out = r * r
    elif ASM:
        out = tl.inline_asm_elementwise(
            "{ .reg .f32 t; lg2.approx.ftz.f32 t, $1; mul.f32 t, t, $2; ex2.approx.ftz.f32 $0, t; }",
            "=f,f,f",
            [d, tl.full(d.shape, -BETA, tl.float32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        out = tl.exp2(-BETA * tl.log2(d))
    return out
