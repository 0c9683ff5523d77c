"""How far a kernel may be from the float64 reference, derived and not tuned.

A kernel loads its input in the input's dtype, computes in fp32 and rounds once to the output's dtype.  With u the
unit roundoff of the output (half a unit in the last place) and e = 2**-24 that of fp32,

    |actual - expected| <= u * |expected| + e * (terms + SLACK) * magnitude + tiny

elementwise, where `terms` is the length of the longest sum behind one output, `magnitude` the sum of the absolute
values that were added (at least |expected|), and `tiny` the smallest subnormal of the output dtype.  SLACK = 24
covers the operations besides the sum: square, scale, the approximate reciprocal root and root (2 ulp each on
NVIDIA hardware), the power and the final products.
"""

import torch

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TINY = {torch.float64: 5e-324, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
SLACK = 24


def assert_matches(actual, expected, *, terms=1, magnitude=None, compute_dtype=torch.float32, truncates=False):
    """Elementwise |actual - expected| within the bound above; NaN and infinities must be where expected has them.

    `expected` is float64.  `truncates` doubles u: Triton's interpreter truncates to bf16 where hardware rounds.
    """
    assert expected.dtype == torch.float64
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    magnitude = expected.abs() if magnitude is None else torch.maximum(magnitude.double(), expected.abs())
    u = UNIT_ROUNDOFF[actual.dtype] * (2 if truncates else 1)
    e = UNIT_ROUNDOFF[compute_dtype]
    bound = u * expected.abs() + e * (terms + SLACK) * magnitude + TINY[actual.dtype]
    # what overflows the output dtype becomes infinite there
    largest = torch.finfo(actual.dtype).max
    rounded = torch.where(
        expected.abs() > largest * (1 + UNIT_ROUNDOFF[actual.dtype]), expected.sign() * torch.inf, expected
    )
    wide = actual.double()
    same = (wide == rounded) | (wide.isnan() & rounded.isnan())
    wrong = ~(same | ((wide - rounded).abs() <= bound))
    if wrong.any():
        error = torch.where(wrong, ((wide - rounded).abs() / bound).nan_to_num(torch.inf, torch.inf), 0)
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements differ; the worst, at {worst}: "
            f"got {wide[worst].item()!r}, expected {expected[worst].item()!r}, "
            f"{error[worst].item():.3g} times the bound {bound[worst].item():.3g}"
        )
