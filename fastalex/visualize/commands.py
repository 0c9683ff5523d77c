"""What `fastalex visualize` does: a model and pictures in, PNG files and a page out."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from fastalex.devices import find_device
from fastalex.evaluation.classifier import load_classifier, read_picture
from fastalex.evaluation.inputs import default_pictures
from fastalex.visualize import figures, similar
from fastalex.visualize.activations import activations
from fastalex.visualize.console import tell, tell_written
from fastalex.visualize.page import Section, Tile, write_page
from fastalex.words import by, counted


def filters(weights: str, out: Path) -> None:
    """filters.png and filters.html: the kernels of the first convolution."""
    model, card = load_classifier(weights)
    weight = next(model.features.parameters())
    drawing, page = out / "filters.png", out / "filters.html"
    figures.filters(weight, drawing)
    ranges = [(kernel.min().item(), kernel.max().item()) for kernel in weight.detach().float().cpu()]
    tiles = [
        Tile(picture, f"{number}: {low:.2f}, {high:.2f}")
        for number, (picture, (low, high)) in enumerate(zip(figures.filter_tiles(weight), ranges, strict=True))
    ]
    meaning = "" if weight.shape[1] == 3 else "; red answers to bright, blue to dark"
    note = f"{by(weight.shape)} weights, variant {card.variant.name}; each kernel at its own contrast{meaning}."
    write_page(
        page,
        "Filters of the first convolution",
        note,
        [Section("conv1", "With its number, its least and its greatest weight.", tiles, 88)],
    )
    tell_written([drawing, page])


def maps(weights: str, paths: Sequence[Path], layer: str, out: Path, *, device: str | None) -> None:
    """activations-LAYER-PICTURE.png for each picture, and activations-LAYER.html with all."""
    model, card = load_classifier(weights)
    where = find_device(device)
    model = model.to(where)
    images = [(path.name, read_picture(path, card.preprocessing)) for path in paths] or [*default_pictures(card)]
    drawings: list[Path] = []
    sections = []
    for name, image in images:
        found = as_maps(activations(model, card.preprocessing.for_evaluation(image[None].to(where)), layer)[0])
        drawing = out / f"activations-{layer}-{Path(name).stem}.png"
        if drawing in drawings:
            raise ValueError(f"two pictures are called {Path(name).stem}: their files would overwrite each other")
        figures.activation_maps(image, found, name, layer, drawing)
        drawings.append(drawing)
        tiles = [
            Tile(tile, f"{number}: {peak:.2f}")
            for number, (tile, peak) in enumerate(
                zip(figures.coloured(found), found.flatten(1).amax(1).tolist(), strict=True)
            )
        ]
        width = min(256, max(72, found.shape[2]))
        sections.append(
            Section(
                name,
                f"{layer}: {by(found.shape)}, each map from its least (dark) to its greatest value (below it).",
                [Tile(image, name), *tiles],
                width,
                lead=True,
            )
        )
    page = out / f"activations-{layer}.html"
    write_page(page, f"Activations of {layer}", f"Variant {card.variant.name}.", sections)
    tell_written([*drawings, page])


def as_maps(output: Tensor) -> Tensor:
    """One picture's (K, H, W) as it is; (units,) of a fully connected layer as one map, row by row, 0 at its end."""
    if output.dim() == 3:
        return output
    width = ceil(len(output) ** 0.5)
    height = ceil(len(output) / width)
    return torch.nn.functional.pad(output, (0, width * height - len(output))).view(1, height, width)


def similar_pictures(
    weights: str,
    queries: Sequence[Path],
    data: Path | None,
    count: int,
    out: Path,
    *,
    index: Path | None,
    device: str | None,
) -> None:
    """similar.png and similar.html: queries, each with its nearest neighbours of a collection; and the index."""
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    model, card = load_classifier(weights)
    index_file = index or out / "index.safetensors"
    model = model.to(find_device(device))
    collection = similar.open_collection(data, card.preprocessing)
    built = similar.build(index_file, model, card, collection, tell)
    tell(
        f"{counted(len(built.places), 'picture')}, {counted(built.features.shape[1], 'feature')} each: "
        f"{built.computed:,} computed, {len(built.places) - built.computed:,} from {index_file}"
    )
    sheets = similar.find_similar(model, card, collection, built, queries, count)
    drawing, page = out / "similar.png", out / "similar.html"
    figures.neighbours(sheets, drawing)
    sections = [
        Section(
            sheet.name,
            "Nearest first, with the Euclidean distance.",
            [
                Tile(sheet.picture, sheet.name),
                *(Tile(match.picture, f"{match.distance:.2f} {match.name}") for match in sheet.matches),
            ],
            128,
            lead=True,
        )
        for sheet in sheets
    ]
    where = "the Fashion-MNIST sample" if data is None else str(data)
    note = f"Neighbours in the {built.features.shape[1]:,} features of the last hidden layer, out of {where}."
    write_page(page, "Similar pictures", note, sections)
    tell_written([drawing, page, index_file])
