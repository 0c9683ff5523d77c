"""Fashion-MNIST, a balanced sample that ships with the package: 5,000 training and 1,000 test pictures.

Ten kinds of clothing, 28x28, 8-bit grey, white on black (Xiao, Rasul and Vollgraf 2017, MIT licence, notice beside
the file).  `fashion_mnist/pictures.xz` holds the pixels and nothing else: 500 pictures of each class in turn from the
original training set, then 100 of each from the original test set, row by row.

The sample can be made again, bit for bit, from the four original files (the folder that holds
`train-images-idx3-ubyte.gz` and its three siblings; Debian and Ubuntu: `apt install dataset-fashion-mnist`, then
`/usr/share/datasets/fashion-mnist`)::

    python -m fastalex.data.fashion_mnist /usr/share/datasets/fashion-mnist

Which pictures: those of each class whose SHA-256 of (`SEED`, pixels) is smallest.  A hash rather than a random
generator, because no library promises that its generator's stream stays the same.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

CLASSES: tuple[str, ...] = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PER_CLASS = {"train": 500, "test": 100}
SIZE = 28
SEED = b"fastalex 2012"
# of the pixels, not of the file: another liblzma may pack the same pixels differently
SHA256 = "32d812c3703ea54b90cc115e96325ed9d847a086b1f49ba2dcfbf47e85dbef39"

FILE = Path(__file__).with_name("fashion_mnist") / "pictures.xz"
ORIGINALS = {"train": "train", "test": "t10k"}


class Pictures(NamedTuple):
    """`images`: uint8 (N, 28, 28); `labels`: int64 (N,), indices into `CLASSES`."""

    images: np.ndarray
    labels: np.ndarray


def load(split: str) -> Pictures:
    """The sample's "train" (5,000) or "test" (1,000) pictures, sorted by class.

    Raises ValueError for another split.
    """
    if split not in PER_CLASS:
        raise ValueError(f"split must be one of {', '.join(PER_CLASS)}, got {split!r}")
    images = np.frombuffer(bytearray(lzma.decompress(FILE.read_bytes())), np.uint8).reshape(-1, SIZE, SIZE)
    cut = PER_CLASS["train"] * len(CLASSES)
    images = images[:cut] if split == "train" else images[cut:]
    return Pictures(images, np.arange(len(CLASSES)).repeat(PER_CLASS[split]))


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes: two zero bytes, type 8, the rank, big-endian 32-bit sizes, then the data.

    Raises ValueError for another format.
    """
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {content[:4].hex()}")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def draw(images: np.ndarray, labels: np.ndarray, per_class: int) -> np.ndarray:
    """`per_class` pictures of each class, (classes * per_class, 28, 28): smallest hash of seed and pixels first."""

    def rank(index: np.intp) -> tuple[bytes, np.intp]:
        return hashlib.sha256(SEED + images[index].tobytes()).digest(), index

    chosen = [sorted(np.flatnonzero(labels == label), key=rank)[:per_class] for label in range(len(CLASSES))]
    return images[np.concatenate(chosen)]


def sample(source: Path) -> bytes:
    """The pixels of the sample, drawn from the original files in the folder `source`."""
    return b"".join(
        draw(
            read_idx(source / f"{original}-images-idx3-ubyte.gz"),
            read_idx(source / f"{original}-labels-idx1-ubyte.gz"),
            PER_CLASS[split],
        ).tobytes()
        for split, original in ORIGINALS.items()
    )


def rebuild(source: Path) -> None:
    """Draw the sample from the folder `source` and write `FILE`; exits with a message if other pictures come out."""
    pixels = sample(source)
    digest = hashlib.sha256(pixels).hexdigest()
    if digest != SHA256:
        sys.exit(f"{source} does not hold the originals: the sample's sha256 is {digest}, expected {SHA256}")
    FILE.write_bytes(lzma.compress(pixels, preset=9))
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, pixels as expected")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fastalex.data.fashion_mnist FOLDER_WITH_THE_ORIGINAL_GZ_FILES")
    rebuild(Path(sys.argv[1]))
