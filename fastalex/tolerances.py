"""How far a kernel may be from the float64 reference, derived and not tuned.

A kernel loads its input in the input's dtype, computes in fp32 and rounds once to the output's dtype.  With u the
unit roundoff of the output (half a unit in the last place) and e = 2**-24 that of fp32,

    |actual - expected| <= u * |expected| + e * (terms + SLACK) * magnitude + tiny

elementwise, where `terms` is the length of the longest sum behind one output, `magnitude` the sum of the absolute
values that were added (at least |expected|), and `tiny` the smallest subnormal of the output dtype.  SLACK = 24
covers the operations besides the sum: square, scale, the approximate reciprocal root and root (2 ulp each on
NVIDIA hardware), the power and the final products.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TINY = {torch.float64: 5e-324, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
SLACK = 24


def bound(
    expected: Tensor,
    dtype: torch.dtype,
    *,
    terms: int = 1,
    magnitude: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    truncates: bool = False,
) -> Tensor:
    """The largest error of each element of a result in `dtype`; `expected` is float64.

    truncates: doubles u, for Triton's interpreter, which truncates to bf16 where hardware rounds.
    """
    magnitude = expected.abs() if magnitude is None else torch.maximum(magnitude.double(), expected.abs())
    u = UNIT_ROUNDOFF[dtype] * (2 if truncates else 1)
    e = UNIT_ROUNDOFF[compute_dtype]
    return u * expected.abs() + e * (terms + SLACK) * magnitude + TINY[dtype]


def rounded(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The float64 values with infinities where `dtype` overflows."""
    largest = torch.finfo(dtype).max
    return torch.where(expected.abs() > largest * (1 + UNIT_ROUNDOFF[dtype]), expected.sign() * torch.inf, expected)


def errors(actual: Tensor, expected: Tensor, limit: Tensor) -> Tensor:
    """The error of each element in units of its bound; 0 where equal or both NaN, infinite where only one is NaN."""
    expected = rounded(expected, actual.dtype)
    wide = actual.double()
    same = (wide == expected) | (wide.isnan() & expected.isnan())
    return torch.where(same, 0.0, ((wide - expected).abs() / limit).nan_to_num(torch.inf, torch.inf))
