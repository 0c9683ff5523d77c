"""The data path: reading a batch of photographs on the host, from packed records and from JPEG files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Case, Expected, Race, Run
from benchmarks.providers import entries

PICTURES, SIZE = 64, 256
READ = [Case("input", "read", "uint8", (PICTURES, 3, SIZE, SIZE), "disk")]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEG files that compress as photographs do (some 25 KB each), and the same pictures packed."""
    from PIL import Image

    from fastalex.data.pack import pack

    root = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for number in range(PICTURES):
        coarse = torch.rand(1, 3, 24, 24, generator=generator) * 255
        picture = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic")[0]
        picture += 6 * torch.randn(picture.shape, generator=generator)
        folder = root / "jpeg" / ("val" if number % 2 else "train") / f"class{number % 4 // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = picture.clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg", quality=90)
    pack(root / "jpeg", root / "packed", workers=1)
    return root


def prepare(case: Case, names: list[str], root: Path) -> Race:
    from fastalex.data.image_sets import Folders
    from fastalex.data.packed import PackedSet
    from fastalex.data.preprocessing import Preprocessing

    batches = [torch.arange(PICTURES // 2)]
    preprocessing = Preprocessing.for_photos(3, 224)

    def read(pictures: Any) -> Tensor:
        (images, _), (more, _) = (next(iter(pictures.batches(split, batches))) for split in ("train", "test"))
        return torch.cat([images, more])

    def build(name: str) -> Run:
        if name == "fastalex":
            return functools.partial(read, PackedSet(root / "packed", preprocessing, threads=1))
        return functools.partial(read, Folders(root / "jpeg", preprocessing, workers=0))

    def brightness(images: Tensor) -> tuple[Tensor]:
        """Sorted, because packing shuffles the training pictures."""
        return (images.double().mean((1, 2, 3)).sort().values,)

    def expected() -> Expected:
        return Expected(brightness(read(Folders(root / "jpeg", preprocessing, workers=0))), 1e-6)

    return Race(
        {name: functools.partial(build, name) for name in names},
        expected,
        observe=brightness,
        bytes=PICTURES * 3 * SIZE * SIZE,
        host=True,
    )


@entries(READ, READ, ("fastalex", "torchvision"))
def test_read(case: Case, provider: str, photographs: Path, contest: Any) -> None:
    """fastalex's packed records against torchvision's folder of JPEGs, out of the page cache: no disk is measured."""
    contest(case, provider, functools.partial(prepare, root=photographs))
