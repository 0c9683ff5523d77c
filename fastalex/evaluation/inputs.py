"""Pictures as a command line names them: files, folders, addresses, and `-` for standard input."""

from __future__ import annotations

import http.client
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

import fastalex
from fastalex.checkpoint import ModelCard
from fastalex.data.image_sets import FashionMNIST
from fastalex.data.photos import default_photos
from fastalex.data.preprocessing import Preprocessing
from fastalex.data.sources import ENDINGS, pictures_below
from fastalex.evaluation.classifier import picture_in, prepared, read_picture

STANDARD_INPUT = "-"
MAX_BYTES = 100_000_000
# without a byte, and in all
SILENT_SECONDS, SECONDS = 20, 300
SAMPLE_SHOWN = (405, 510, 820, 977)  # a coat, a sandal, a bag, an ankle boot of the sample's test pictures


def expanded(names: Sequence[str]) -> list[str]:
    """The names, with the pictures below them, sorted, in the place of folders.

    A folder without any stays as it is, for `read` to refuse.
    """
    found: list[str] = []
    for name in names:
        below = pictures_below(Path(name), ".")[0] if Path(name).is_dir() else []
        found += [str(Path(name, picture)) for picture in below] or [name]
    return found


def read(name: str, preprocessing: Preprocessing) -> Tensor:
    """The picture behind a name, as `read_picture`.  Raises as it does, ValueError also for what cannot be fetched."""
    mode = "L" if preprocessing.channels == 1 else "RGB"
    if name == STANDARD_INPUT:
        return prepared(picture_in(standard_input(), "standard input", mode), preprocessing)
    if is_address(name):
        return prepared(picture_in(fetch(name), name, mode), preprocessing)
    if Path(name).is_dir():
        raise ValueError(f"no pictures in {name} (endings {', '.join(ENDINGS)})")
    return read_picture(Path(name), preprocessing)


def is_address(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def short(name: str) -> str:
    """The last part of a path or an address."""
    return "standard input" if name == STANDARD_INPUT else name.partition("?")[0].rstrip("/").rpartition("/")[2] or name


def standard_input() -> bytes:
    """Raises ValueError for a terminal, nothing, or more than MAX_BYTES."""
    if sys.stdin.isatty():
        raise ValueError("standard input is a terminal: send a picture into it, as in `fastalex predict - < cat.jpg`")
    return _limited(sys.stdin.buffer, "standard input")


def fetch(address: str) -> bytes:
    """What an http or https address answers.

    Raises ValueError, naming the address, for an error, for more than MAX_BYTES, for SILENT_SECONDS without a byte, and
    after SECONDS.
    """
    # some servers refuse programs that do not name themselves
    request = urllib.request.Request(address, headers={"User-Agent": f"fastalex/{fastalex.__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=SILENT_SECONDS) as answer:
            return _limited(answer, address)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{address} cannot be fetched: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{address} cannot be fetched: {getattr(error, 'reason', None) or error}") from None


def _limited(file: BinaryIO, name: str) -> bytes:
    end = time.monotonic() + SECONDS
    content = bytearray()
    while block := file.read1(1 << 20) if hasattr(file, "read1") else file.read(1 << 20):
        content += block
        if len(content) > MAX_BYTES:
            raise ValueError(f"{name} has more than {MAX_BYTES:,} bytes")
        if time.monotonic() > end:
            raise ValueError(f"{name} took more than {SECONDS} seconds")
    if not content:
        raise ValueError(f"{name} is empty")
    return bytes(content)


def default_pictures(card: ModelCard) -> Iterator[tuple[str, Tensor]]:
    """(name, picture as of `read`): of the sample's for a model of its classes, else photos of what ImageNet names.

    Raises FileNotFoundError without scikit-image, which carries the photos.
    """
    if card.classes == FashionMNIST.classes:
        images, labels = next(FashionMNIST(card.preprocessing).batches("test", [torch.tensor(SAMPLE_SHOWN)]))
        names = [f"{card.classes[label]} {place}" for label, place in zip(labels.tolist(), SAMPLE_SHOWN, strict=True)]
        yield from zip(names, images, strict=True)
    else:
        for photo in default_photos():
            yield photo.name, read_picture(photo, card.preprocessing)
