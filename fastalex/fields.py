"""Checks of values that come out of files, with messages that name the field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


def whole(name: str, value: Any, least: int = 1, most: int = 2**24) -> None:
    """Raises ValueError unless the value is an int in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def number(name: str, value: Any, least: float = -math.inf) -> None:
    """Raises ValueError unless the value is a finite number of at least `least`, and one that torch takes as an int."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not abs(value) < 2**63 or value < least:
        limit = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name} must be a finite number{limit}, got {value!r}")


def one_of(name: str, value: Any, *allowed: Any) -> None:
    """Raises ValueError unless the value is one of those allowed."""
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def listed(name: str, value: Any) -> tuple[Any, ...]:
    """The values of a list.  Raises ValueError for anything else."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return tuple(value)


def complete(name: str, cls: type, value: Any) -> dict[str, Any]:
    """The fields of a dataclass that JSON holds.  Raises ValueError unless they are all there, and no others."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object with fields, got {value!r}")
    known = [field.name for field in dataclasses.fields(cls)]
    for field in value:
        if field not in known:
            raise ValueError(f"{name} has a field {field!r}, which is none of {', '.join(known)}")
    for field in known:
        if field not in value:
            raise ValueError(f"{name} lacks the field {field!r}")
    return dict(value)
