"""Which set of labelled pictures a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fastalex.data.image_sets import FashionMNIST, Folders, ImageSet
from fastalex.data.packed import PackedSet, is_packed
from fastalex.data.preprocessing import Preprocessing


def open_images(
    data: Path | None,
    preprocessing: Preprocessing,
    *,
    splits: tuple[str, ...],
    workers: int | None,
    on_error: Literal["stop", "skip"] = "stop",
    report: Callable[[str], None] = print,
) -> ImageSet:
    """A folder of pictures, a packed set, or (None) the sample that ships with the package.

    report: told of each picture that is left out.  Raises as `Folders` and `PackedSet` do.
    """
    if data is None:
        return FashionMNIST(preprocessing)
    if is_packed(data):
        return PackedSet(data, preprocessing, splits=splits, threads=workers)
    folders = Folders(data, preprocessing, splits=splits, workers=workers, on_error=on_error)
    for path, reason in folders.unreadable:
        report(f"skipped {path}: {reason}")
    return folders
