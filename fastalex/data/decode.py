"""One encoded picture: from the bytes of a file to upright pixels in 8 bits."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's own limit for a picture that is no decompression bomb: 256 MB of RGB.
MAX_PIXELS = 89_478_485


def square(image: Image.Image, size: int) -> np.ndarray:
    """The short side resized to `size` and the middle square cut out: uint8 (size, size, 3).

    torchvision's Resize and CenterCrop in one step, which costs nothing for what is cut off, however long it is.  The
    same values, but for steps of 1 where Pillow, which holds the corners in float32, rounds to the other side.
    """
    width, height = image.size
    short = min(width, height)
    resized = size * width // short, size * height // short
    left, top = (round((side - size) / 2) for side in resized)
    across, down = width / resized[0], height / resized[1]
    box = (left * across, top * down, min((left + size) * across, width), min((top + size) * down, height))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def decode(content: bytes, size: int) -> np.ndarray:
    """An encoded picture, upright and in RGB, as uint8 (size, size, 3).

    Grey, palette and CMYK pictures are converted, transparency is dropped.  Raises ValueError with the reason for
    whatever is no picture, is cut or damaged, or has more than MAX_PIXELS pixels.
    """
    # a JPEG of many pixels is decoded at 1/2, 1/4 or 1/8, never to less than twice the size
    return square(decoded(content, 2 * size).convert("RGB"), size)


def decoded(content: bytes, draft: int | None = None) -> Image.Image:
    """An encoded picture, upright, in 8 bits a value, and where the format can, no larger than `draft` needs.

    Raises ValueError as `decode`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{width}x{height} pixels")
        if draft is not None:
            image.draft(image.mode, (draft, draft))
        image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"refused, more than {MAX_PIXELS:,} pixels: {error}") from None
    except UnidentifiedImageError:
        raise ValueError("cannot be decoded: no picture in a format that Pillow knows") from None
    except Exception as error:  # whatever a decoder trips over in foreign bytes
        raise ValueError(f"cannot be decoded: {error or type(error).__name__}") from None
    # many photographs have damaged EXIF data, which says nothing about their pixels
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    return in_8_bits(image)


def in_8_bits(image: Image.Image) -> Image.Image:
    """The high bytes of 16-bit values, which Pillow would clip.  Raises ValueError for wider ones."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"cannot be decoded: values of mode {image.mode}, whose range nobody knows")
    return image
