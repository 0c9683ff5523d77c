"""What `fastalex train` does: chooses recipe, device and data, trains, and says how it went."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastalex import distributed
from fastalex.checkpoint import STATE
from fastalex.data.choose import open_images
from fastalex.data.image_sets import FashionMNIST, ImageSet
from fastalex.data.preprocessing import Preprocessing
from fastalex.devices import find_device
from fastalex.training import recipes
from fastalex.training.loop import train
from fastalex.training.options import Options
from fastalex.training.prepare import build_model
from fastalex.training.recipes import Recipe
from fastalex.training.stopping import Stopped
from fastalex.variants import VARIANTS
from fastalex.visualize.console import ProgressBar, console, tell


def choose_recipe(name: str | None, variant: str | None, *, channels: int, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of this name for this variant, both out of what the command line lists.

    By default the variant is the recipe's, and the recipe "demo", or "paper" with another variant than "demo".
    channels: of the images, as far as the variant leaves them open.  changes: fields of the recipe; None changes
    nothing.  Raises ValueError for a change that makes no recipe.
    """
    recipe = recipes.RECIPES[name or ("demo" if variant in (None, "demo") else "paper")]
    if variant is not None and variant != "demo":
        recipe = replace(recipe, variant=VARIANTS[variant])
    elif variant == "demo" or recipe is recipes.DEMO_RECIPE:
        recipe = replace(recipe, variant=recipes.demo_variant(channels))
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})


def deterministic() -> None:
    """Lets PyTorch take only algorithms that give the same bits in every run, in this process from now on."""
    # cuBLAS reads it when it starts
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def choose_device(name: str | None) -> torch.device:
    """As `find_device`; of several processes on a machine with GPUs each gets one, unless a name is given."""
    device = find_device(name)
    if name is None and device.type == "cuda" and distributed.launched():
        return torch.device("cuda", distributed.local_rank())
    return device


def choose_data(
    data: Path | None, recipe: Recipe, *, workers: int | None, on_error: Literal["stop", "skip"]
) -> ImageSet:
    """Training and test images of the recipe's size; the processes of a machine share its cores to read them."""
    if distributed.launched() and workers is None:
        workers = max(1, min(8, (os.cpu_count() or 1) // distributed.local_size()))
    make = FashionMNIST.preprocessing_for if data is None else Preprocessing.for_photos
    preprocessing = make(recipe.variant.in_channels, recipe.variant.crop)
    return open_images(data, preprocessing, splits=("train", "test"), workers=workers, on_error=on_error, report=tell)


def launch(
    recipe: Recipe, images: ImageSet, device: torch.device, out: Path, *, options: Options, resume: bool
) -> None:
    """Train in this process, and in those that torchrun started beside it; rank 0 speaks.

    Raises ValueError where `out` holds a run that nobody asked to resume, and as `fastalex.training.loop.train`;
    SystemExit with 128 and the signal's number where that ends with Stopped.
    """
    with distributed.process_group(device):
        exists = distributed.from_rank_0((out / STATE).exists())
        if exists and not resume and not distributed.restarted():
            raise ValueError(f"{out} holds a run already: go on with --resume, or choose another folder with --out")
        first = distributed.rank() == 0
        if first:
            if resume and not exists:
                console.print(f"nothing to resume in {out}: starting from the beginning", soft_wrap=True)
            processes = f", {distributed.size()} processes" if distributed.size() > 1 else ""
            console.print(
                f"{images.count('train'):,} training pictures of {len(images.classes)} classes, on {device}{processes}"
            )
        model = build_model(recipe, len(images.classes), device)
        bar = ProgressBar(recipe.epochs, images.count("train")) if first else contextlib.nullcontext()
        try:
            with bar as callback:
                train(model, images, recipe, out, options=options, resume=exists, callback=callback)
        except Stopped as stopped:
            if first:
                console.print(f"{stopped}; the same command with --resume goes on with {out}", soft_wrap=True)
            raise SystemExit(128 + stopped.signal) from None
        if first:
            console.print(f"wrote {out}", soft_wrap=True)
