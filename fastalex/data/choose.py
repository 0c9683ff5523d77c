"""Which set of labelled pictures a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fastalex.data.image_sets import FashionMNIST, Folders, ImageSet, list_pictures
from fastalex.data.packed import PackedSet, is_packed, read_meta
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

    report: told of each picture that is left out, and of what is held out where the folder does not say that itself.
    Raises as `Folders` and `PackedSet` do.
    """
    if data is None:
        return FashionMNIST(preprocessing)
    if is_packed(data):
        return PackedSet(data, preprocessing, splits=splits, threads=workers)
    folders = Folders(data, preprocessing, splits=splits, workers=workers, on_error=on_error)
    for path, reason in folders.unreadable:
        report(f"skipped {path}: {reason}")
    if folders.split_here:
        held = folders.count("test")
        report(f"{data} has no train/ and val/: {held:,} pictures, a fifth of each class, are held out for testing")
    return folders


def training_pictures(data: Path) -> tuple[int, int]:
    """How many pictures a folder or a packed set has to train with, and of how many classes; none is read.

    Raises as `Folders` and `PackedSet` do.
    """
    if is_packed(data):
        meta = read_meta(data)
        return meta["splits"].get("train", {"slots": 0})["slots"], len(meta["classes"])
    listing = list_pictures(data, ("train",))
    return len(listing.samples["train"]), len(listing.classes)
