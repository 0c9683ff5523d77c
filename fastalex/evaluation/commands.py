"""What `fastalex eval` and `fastalex predict` do: a model and pictures in, tables and files out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from fastalex.checkpoint import save_model
from fastalex.data.choose import open_images
from fastalex.data.photos import default_photos
from fastalex.devices import find_device
from fastalex.evaluation.classifier import check_classes, classify, load_classifier, read_picture
from fastalex.evaluation.metrics import evaluate as scores_of
from fastalex.evaluation.report import as_json
from fastalex.files import write_whole
from fastalex.visualize import figures
from fastalex.visualize.console import console, print_classes, print_predictions, print_scores, tell


def evaluate(
    weights: str,
    data: Path | None,
    *,
    crops: Literal["centre", "ten"],
    out: Path | None,
    batch_size: int,
    device: str | None,
    workers: int | None,
    on_error: Literal["stop", "skip"],
) -> None:
    """Print the scores of a model, and write scores.json and confusion.png to `out`."""
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    model, card = load_classifier(weights)
    images = open_images(data, card.preprocessing, splits=("test",), workers=workers, on_error=on_error, report=tell)
    check_classes(card, images.classes)
    where = find_device(device)
    confusion = torch.zeros(len(card.classes), len(card.classes), dtype=torch.int64, device=where)
    scores = scores_of(model.to(where), images, batch_size=batch_size, ten_crop=crops == "ten", confusion=confusion)
    confusion = confusion.cpu()
    print_classes(confusion, card.classes)
    print_scores(scores, images.count("test"))
    if out is not None:
        report = as_json(scores, confusion, card.classes, weights=weights, data=str(data or "sample"), crops=crops)
        write_whole(out / "scores.json", json.dumps(report))
        figures.confusion_matrix(confusion, card.classes, out / "confusion.png")
        console.print(f"wrote {out / 'scores.json'} and {out / 'confusion.png'}", soft_wrap=True)


def predict(paths: Sequence[Path], weights: str, *, top: int, ten_crop: bool, out: Path, device: str | None) -> None:
    """Print the likeliest classes of pictures (by default, of the photos that come with scikit-image) and draw them."""
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    files = paths or default_photos()
    model, card = load_classifier(weights)
    images = [read_picture(path, card.preprocessing) for path in files]
    probabilities = classify(model.to(find_device(device)), images, card.preprocessing, ten_crop=ten_crop)
    print_predictions([str(path) for path in paths] or [path.name for path in files], probabilities, card.classes, top)
    figures.predictions(images, [path.name for path in files], probabilities, card.classes, out, top)
    console.print(f"wrote {out}", soft_wrap=True)


def convert(source: str, target: Path, *, classes: Path | None, overwrite: bool) -> None:
    """Write weights from elsewhere as a file that describes itself."""
    if target.suffix != ".safetensors":
        raise ValueError(f"the file to write must be called .safetensors, got {target}")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: --overwrite replaces it")
    names = () if classes is None else tuple(line.strip() for line in classes.read_text().splitlines() if line.strip())
    model, card = load_classifier(source, names)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(target, model, card)
    parameters = sum(value.numel() for value in model.parameters())
    tell(f"wrote {target}: variant {card.variant.name}, {parameters:,} parameters, {len(card.classes)} classes")
