"""What `fastalex lpips` does: two pictures, or two folders of equal names, in; distances, a table and maps out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fastalex.data.sources import ENDINGS
from fastalex.devices import find_device
from fastalex.evaluation.classifier import open_picture
from fastalex.files import write_whole
from fastalex.lpips.model import LPIPS
from fastalex.visualize import figures
from fastalex.visualize.console import print_distances, tell_written


def pairs_of(first: Path, second: Path) -> list[tuple[str, Path, Path]]:
    """(name, a picture, the one to compare it with): the two files, or those of equal names in two folders.

    Raises FileNotFoundError or ValueError, naming what is missing on which side.
    """
    for path in (first, second):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
    if first.is_dir() != second.is_dir():
        folder, file = (first, second) if first.is_dir() else (second, first)
        raise ValueError(f"{folder} is a folder and {file} is not: compare two pictures or two folders")
    if not first.is_dir():
        return [(first.name, first, second)]
    names = [{path.name for path in folder.iterdir() if path.suffix.lower() in ENDINGS} for folder in (first, second)]
    for folder, missing in ((second, names[0] - names[1]), (first, names[1] - names[0])):
        if missing:
            listed = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(f"{folder} lacks {len(missing)} of the other folder's pictures: {listed}")
    if not names[0]:
        raise ValueError(f"{first} holds no pictures ({', '.join(ENDINGS)})")
    return [(name, first / name, second / name) for name in sorted(names[0])]


def compare(
    first: Path,
    second: Path,
    net: str,
    *,
    trunk: Path | None,
    json_file: Path | None,
    maps: Path | None,
    device: str | None,
) -> None:
    """A table of the distances; on request the same as JSON, and maps."""
    pairs = pairs_of(first, second)
    loss = LPIPS(net=net, trunk=trunk).to(find_device(device))
    distances = list(distances_of(loss, pairs, maps))
    print_distances(distances)
    if json_file is not None:
        mean = sum(distance for _, distance in distances) / len(distances)
        found = {"net": net, "version": loss.version, "mean": mean, "distances": dict(distances)}
        write_whole(json_file, json.dumps(found, indent=2) + "\n")
    written = [path for path in (json_file, maps) if path is not None]
    if written:
        tell_written(written)


@torch.inference_mode()
def distances_of(
    loss: LPIPS, pairs: list[tuple[str, Path, Path]], maps: Path | None = None
) -> Iterator[tuple[str, float]]:
    """(name, distance) of each pair; with `maps` its map is drawn, into that file, or into that folder if there are
    several pairs.

    Raises ValueError for pictures of different sizes, or smaller than the network takes.
    """
    device = loss.scaling_layer.scale.device
    for name, *paths in pairs:
        pictures = [transforms.pil_to_tensor(open_picture(path, "RGB")) for path in paths]
        if pictures[0].shape != pictures[1].shape:
            sizes = " and ".join(
                f"{path} has {p.shape[2]}x{p.shape[1]}" for path, p in zip(paths, pictures, strict=True)
            )
            raise ValueError(f"pictures must have one size: {sizes} pixels")
        images = [picture[None].to(device).float() / 255 for picture in pictures]
        try:
            distance = loss(images[0], images[1], normalize=True).item()
            if maps is not None:
                target = maps if len(pairs) == 1 else maps / f"{Path(name).stem}.png"
                draw(loss, pictures, images, [path.name for path in paths], distance, target)
        except ValueError as error:
            raise ValueError(f"{paths[0]}: {error}") from None
        yield name, distance


def draw(
    loss: LPIPS, pictures: list[Tensor], images: list[Tensor], names: list[str], distance: float, path: Path
) -> None:
    loss.spatial = True
    try:
        found = loss(images[0], images[1], normalize=True)[0, 0].cpu()
    finally:
        loss.spatial = False
    figures.distance_map(pictures, names, found, distance, path)
