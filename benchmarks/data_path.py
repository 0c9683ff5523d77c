"""How fast pictures get to the model on this machine: `python -m benchmarks.data_path`.

Times are CPU seconds of one thread, which other programs on the machine disturb less than they do wall time; that of
reading is wall time too.  Pictures are generated: 500 x 375 pixels, JPEG of quality 90, about 110 KB, as ImageNet's.
"""

from __future__ import annotations

import functools
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastalex.data import sources
from fastalex.data.augmentation import augment
from fastalex.data.decode import decode
from fastalex.data.image_sets import Folders
from fastalex.data.pack import Chunk, moments, pack, pack_chunk
from fastalex.data.packed import PackedSet
from fastalex.data.preprocessing import Preprocessing

PICTURES, BATCH, ROUNDS = 512, 128, 5


def photograph(seed: int) -> bytes:
    """Noise with the spectrum of photographs, amplitude inverse to frequency, which JPEG compresses like them."""
    rng = np.random.default_rng(seed)
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency
        plane = np.fft.irfft2(spectrum, (height, width))
        planes.append(plane / plane.std())
    grey = planes[0]
    colours = np.stack([grey, 0.95 * grey + 0.15 * planes[1], 0.9 * grey + 0.2 * planes[2]], -1)
    pixels = (120 + 55 * colours).clip(0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=90)
    return content.getvalue()


def rates(work: Callable[[], object], pictures: int, clock: Callable[[], float] = time.process_time) -> str:
    """Pictures per second: the median of some rounds, and their range."""
    work()
    found = []
    for _ in range(ROUNDS):
        started = clock()
        work()
        found.append(pictures / (clock() - started))
    return f"{statistics.median(found):10,.0f}   ({min(found):,.0f} to {max(found):,.0f})"


def drain(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def evict(path: Path) -> None:
    """Drop a file's pages from the system's cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = []
        for i in range(PICTURES):
            path = root / f"in/train/class{i % 4}/{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            sizes.append(path.write_bytes(photograph(i)))
        print(f"{PICTURES} JPEGs of 500x375 pixels, {statistics.mean(sizes) / 1e3:.0f} KB each; pictures per second:")
        content = [path.read_bytes() for path in sorted((root / "in").rglob("*.jpg"))[:64]]
        squares = [decode(bytes_, 256) for bytes_ in content]
        print("pack: decode and resize     ", rates(lambda: [decode(bytes_, 256) for bytes_ in content], 64))
        print("pack: colour statistics     ", rates(lambda: [moments(square) for square in squares], 64))
        (root / "train.images").touch()
        items = sources.find(root / "in").splits["train"][:64]
        chunk = Chunk("folders", root / "in", root, "train", 0, items, 256, "stop", root / "entry.json")
        print("pack: all of it             ", rates(lambda: pack_chunk(chunk), 64))
        pack(root / "in", root / "out")

        looks = Preprocessing.for_photos(3, 224)
        indices = torch.arange(PICTURES)
        folders = Folders(root / "in", looks, splits=("train",), workers=0)
        some = indices[:64].split(64)
        print("read: JPEGs by torchvision  ", rates(lambda: drain(folders.batches("train", some)), 64))
        packed = PackedSet(root / "out", looks, splits=("train",), threads=1)
        order = packed.order("train", 0, 0).split(BATCH)
        print("read: packed, one thread    ", rates(lambda: drain(packed.batches("train", order)), PICTURES))
        print(
            "read: packed, wall          ",
            rates(lambda: drain(packed.batches("train", order)), PICTURES, time.perf_counter),
        )

        def cold() -> None:
            evict(root / "out/train.images")
            drain(packed.batches("train", order))

        if hasattr(os, "posix_fadvise"):
            print("read: packed, not in memory ", rates(cold, PICTURES, time.perf_counter))

        images, _ = next(packed.batches("train", order))
        outputs: dict[str, dict[str, Any]] = {
            "float32": {},
            "bfloat16": {"dtype": torch.bfloat16},
            "bfloat16 blocks": {"dtype": torch.bfloat16, "block": 4, "padding": ((2, 2), (2, 2))},
        }
        for name, options in outputs.items():
            work = functools.partial(augment, images, order[0], 0, looks, colours=packed.colours, **options)
            print(f"augment: {name:19}", rates(work, BATCH))
        print("augment: crops and flips only", rates(lambda: looks.for_training(images), BATCH))


if __name__ == "__main__":
    main()
