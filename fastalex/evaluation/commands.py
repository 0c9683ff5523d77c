"""What `fastalex eval` and `fastalex predict` do: a model and pictures in, tables and files out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastalex.checkpoint import save_model
from fastalex.data.choose import open_images
from fastalex.devices import find_device
from fastalex.evaluation import inputs
from fastalex.evaluation.classifier import check_classes, classify, load_classifier
from fastalex.evaluation.metrics import evaluate as scores_of
from fastalex.evaluation.report import as_json
from fastalex.files import write_whole
from fastalex.visualize import figures
from fastalex.visualize.console import print_classes, print_predictions, print_scores, tell, tell_progress
from fastalex.words import counted

BATCH = 32
SHOWN = 24  # in the figure


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
        tell(f"wrote {out / 'scores.json'} and {out / 'confusion.png'}")


def predict(
    names: Sequence[str],
    weights: str,
    *,
    top: int,
    ten_crop: bool,
    out: Path,
    json_file: Path | None,
    device: str | None,
) -> None:
    """Print the likeliest classes of pictures (by default, of four), draw the first SHOWN, write all as JSON.

    names: as of `fastalex.evaluation.inputs`.  Pictures that cannot be read are named on stderr, and the others go on.
    Raises SystemExit(1) at the end if there were some, and what was wrong with it, or ValueError, if there was nothing
    else.
    """
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    model, card = load_classifier(weights)
    model = model.to(find_device(device))
    tell(f"{weights}: variant {card.variant.name}, {counted(len(card.classes), 'class', 'classes')}")
    wanted = inputs.expanded(names)
    failures: dict[str, Exception] = {}

    def pictures() -> Iterator[tuple[str, Tensor]]:
        if not names:
            yield from inputs.default_pictures(card)
        for name in wanted:
            try:
                yield name, inputs.read(name, card.preprocessing)
            except (OSError, ValueError) as error:
                failures[name] = error
                if len(wanted) > 1:
                    tell_progress(f"fastalex: left out: {error}")

    found: list[str] = []
    shown: list[Tensor] = []
    parts: list[Tensor] = []
    left = pictures()
    while batch := list(islice(left, BATCH)):
        found += [name for name, _ in batch]
        parts.append(classify(model, [image for _, image in batch], card.preprocessing, ten_crop=ten_crop))
        shown += [image for _, image in batch][: SHOWN - len(shown)]
        if len(found) % (10 * BATCH) == 0:
            tell_progress(f"{len(found):,} of {counted(len(wanted), 'picture')}")
    if not found:
        if len(wanted) == 1:
            raise failures[wanted[0]]
        raise ValueError(f"none of {len(wanted):,} pictures can be read")
    probabilities = torch.cat(parts)
    print_predictions(found, probabilities, card.classes, top)
    figures.predictions(shown, list(map(inputs.short, found[:SHOWN])), probabilities[:SHOWN], card.classes, out, top)
    if json_file is not None:
        best = probabilities.topk(min(top, len(card.classes)))
        report = {
            "weights": weights,
            "pictures": [
                {
                    "picture": name,
                    "classes": [{"class": card.classes[i], "probability": p} for p, i in zip(*row, strict=True)],
                }
                for name, *row in zip(found, best.values.tolist(), best.indices.tolist(), strict=True)
            ],
            "left_out": [{"picture": name, "reason": str(error)} for name, error in failures.items()],
        }
        write_whole(json_file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    drawn = f" (the first {SHOWN} of {len(found):,} pictures)" if len(found) > SHOWN else ""
    tell(f"wrote {out}{drawn}" + (f" and {json_file}" if json_file is not None else ""))
    if failures:
        tell_progress(
            f"fastalex: error: {len(failures):,} of {counted(len(wanted), 'picture')} left out: "
            + ", ".join([*failures][:3])
            + (", ..." if len(failures) > 3 else "")
        )
        raise SystemExit(1)


def convert(source: str, target: Path, *, names: Path | None, overwrite: bool) -> None:
    """Write weights from elsewhere as a file that describes itself."""
    if target.suffix != ".safetensors":
        raise ValueError(f"the file to write must be called .safetensors, got {target}")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: --overwrite replaces it")
    lines = [] if names is None else names.read_text(encoding="utf-8-sig").splitlines()
    model, card = load_classifier(source, tuple(line.strip() for line in lines if line.strip()))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(target, model, card)
    parameters = sum(value.numel() for value in model.parameters())
    size = f"{parameters:,} parameters, {counted(len(card.classes), 'class', 'classes')}"
    tell(f"wrote {target}: variant {card.variant.name}, {size}")
