"""How numbers and shapes are said."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 picture", "1,000 pictures"; `many` where an s does not make the plural."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def by(shape: Sequence[int]) -> str:
    """(96, 55, 55) -> "96x55x55"."""
    return "x".join(map(str, shape))
