"""The data path: reading a batch of photographs on the host, and augmenting it on the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import DTYPES, Case, Expected, Race, Run, device
from benchmarks.providers import TOLERANCE, entries

PICTURES, SIZE = 64, 256
READ = [Case("input", "read", "uint8", (PICTURES, 3, SIZE, SIZE))]
AUGMENT_CPU = [Case("input", "augment", "fp32", (PICTURES, 3, SIZE, SIZE))]
AUGMENT_CUDA = [
    Case("input", "augment", dtype, (batch, 3, SIZE, SIZE)) for batch in (128, 1024) for dtype in ("fp32", "fp16")
]


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


def prepare_reading(case: Case, names: list[str], root: Path) -> Race:
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
    contest(case, provider, functools.partial(prepare_reading, root=photographs))


def prepare_augmentation(case: Case, names: list[str]) -> Race:
    """Crop, mirror, change the colours, normalise.  Eager does it picture by picture; its random numbers are given."""
    from fastalex.cpu.augment import draw
    from fastalex.data.augmentation import JITTER, augment
    from fastalex.data.preprocessing import Colours, Preprocessing

    preprocessing = Preprocessing.for_photos(3, 224)
    colours = Colours((0.2, 0.02, 0.005), ((0.58, 0.58, 0.57), (0.74, -0.05, -0.67), (0.35, -0.81, 0.47)))
    crop, dtype = preprocessing.crop, DTYPES[case.dtype]
    images = torch.randint(256, case.shape, generator=torch.Generator().manual_seed(0)).byte().to(device())
    images = images.contiguous(memory_format=torch.channels_last)
    indices, seed = torch.arange(len(images), device=device()), torch.tensor([7], device=device())
    draws = draw(indices, seed, SIZE, SIZE, crop)
    corners = list(zip(draws.top.tolist(), draws.left.tolist(), draws.mirrored.tolist(), strict=True))
    axes = torch.tensor(colours.values)[:, None] * torch.tensor(colours.vectors) * JITTER
    mean, std = (torch.tensor(values, device=device()) for values in (preprocessing.mean, preprocessing.std))
    shift = draws.normals @ axes.to(device())

    def eager(wide: torch.dtype = torch.float32, narrow: torch.dtype = dtype) -> Tensor:
        pictures = []
        for picture, (top, left, mirrored) in zip(images, corners, strict=True):
            part = picture[:, top : top + crop, left : left + crop]
            pictures.append(part.flip(2) if mirrored else part)
        batch = torch.stack(pictures).to(wide) / 255 + shift.to(wide)[:, :, None, None]
        return ((batch - mean[:, None, None]) / std[:, None, None]).to(narrow)

    def ours() -> Tensor:
        return augment(images, indices, seed, preprocessing, colours=colours, dtype=dtype)

    runs: dict[str, Run] = {"fastalex": ours, "eager": eager}
    return Race(
        {name: functools.partial(lambda name: runs[name], name) for name in names},
        lambda: Expected((eager(torch.float64, torch.float64),), TOLERANCE[case.dtype]),
        bytes=len(images) * 3 * crop**2 * (1 + dtype.itemsize),
    )


def quick(case: Case) -> Sequence[str]:
    return ("fastalex", "eager") if (case.shape[0], case.dtype) == (128, "fp16") else ()


@entries(AUGMENT_CPU, AUGMENT_CUDA, ("fastalex", "eager"), cuda_quick=quick)
def test_augment(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare_augmentation)
