"""Four photographs of things that ImageNet has classes for; scikit-image carries them in its wheel."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

# a cat, a cup of coffee, a rocket, a motorcycle
NAMES = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def default_photos() -> tuple[Path, ...]:
    """Where they lie.  Looks for the files only: importing scikit-image would take a second, and its
    `skimage.data` functions may download.

    Raises FileNotFoundError, naming the remedy, without scikit-image or if it no longer carries one of them.
    """
    found = find_spec("skimage")
    folders = [Path(folder) / "data" for folder in (found.submodule_search_locations or [])] if found else []
    if not folders:
        raise FileNotFoundError(
            "the default photos come with scikit-image: pip install 'fastalex[photos]', or name pictures of your own"
        )
    photos = tuple(folders[0] / name for name in NAMES)
    for photo in photos:
        if not photo.is_file():
            raise FileNotFoundError(f"this scikit-image has no {photo}: name pictures of your own")
    return photos
