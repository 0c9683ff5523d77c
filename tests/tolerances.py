"""`assert_matches`: a result against the float64 reference, within the bound of `fastalex.tolerances`."""

import torch

from fastalex.tolerances import SLACK, UNIT_ROUNDOFF, bound, errors, rounded

__all__ = ["SLACK", "UNIT_ROUNDOFF", "assert_matches"]


def assert_matches(actual, expected, *, terms=1, magnitude=None, compute_dtype=torch.float32, truncates=False):
    """Elementwise |actual - expected| within the bound; NaN and infinities must be where expected has them.

    `expected` is float64.  `truncates` doubles u: Triton's interpreter truncates to bf16 where hardware rounds.
    """
    assert expected.dtype == torch.float64
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    limit = bound(
        expected, actual.dtype, terms=terms, magnitude=magnitude, compute_dtype=compute_dtype, truncates=truncates
    )
    error = errors(actual, expected, limit)
    wrong = error > 1
    if wrong.any():
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements differ; the worst, at {worst}: "
            f"got {actual.double()[worst].item()!r}, expected {rounded(expected, actual.dtype)[worst].item()!r}, "
            f"{error[worst].item():.3g} times the bound {limit[worst].item():.3g}"
        )
