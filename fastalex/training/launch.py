"""What `fastalex train` does: chooses recipe, device and data, trains, and says how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fastalex import distributed
from fastalex.checkpoint import STATE
from fastalex.data.choose import open_images, training_pictures
from fastalex.data.image_sets import FashionMNIST, ImageSet
from fastalex.data.preprocessing import Preprocessing
from fastalex.devices import find_device
from fastalex.training import recipes
from fastalex.training.loop import train
from fastalex.training.options import Options
from fastalex.training.prepare import Initial, build_model, load_initial
from fastalex.training.recipes import Recipe
from fastalex.training.settings import Flags, Settings
from fastalex.training.stopping import Stopped
from fastalex.variants import VARIANTS
from fastalex.visualize.console import ProgressBar, console, tell
from fastalex.words import counted

OPTIONS = [field.name for field in dataclasses.fields(Options)]


def choose_recipe(
    flags: Flags, *, own: tuple[int, int] | None = None, initial: Initial | None = None
) -> tuple[str, Recipe]:
    """(name, recipe) for the flags "recipe" and "variant", and what other flags change in it.

    own: number of pictures and classes of the user's own data, None for the sample that ships with the package;
    initial: a model to start from, whose variant is taken.
    By default the recipe is "fine-tune" for such a model of full size, else "demo" for the sample, and "photos" for own
    pictures, or "paper" from recipes.MANY_PICTURES of recipes.MANY_CLASSES on; a variant other than "demo" makes "demo"
    to "paper".
    Raises ValueError for a change that makes no recipe, and for a variant other than the initial model's.
    """
    variant: str | None = flags["variant"]
    if initial is not None and variant not in (None, initial.variant.name):
        raise ValueError(f'the weights {flags["init"]} are of variant "{initial.variant.name}", not "{variant}"')
    many = own is not None and own[0] >= recipes.MANY_PICTURES and own[1] >= recipes.MANY_CLASSES
    if flags["recipe"] is not None:
        name = flags["recipe"]
    elif initial is not None and initial.variant.name != "demo":
        name = "fine-tune"
    elif own is None:
        name = "demo" if variant in (None, "demo") else "paper"
    else:
        name = "paper" if many and variant != "demo" else "photos"
    recipe = recipes.RECIPES[name]
    if initial is not None:
        recipe = replace(recipe, variant=initial.variant)
    elif variant not in (None, "demo"):
        recipe = replace(recipe, variant=VARIANTS[variant])
    elif variant == "demo" or recipe.variant.name == "demo":
        recipe = replace(recipe, variant=recipes.demo_variant(1 if own is None else 3))
    if name == "photos" and own is not None:
        recipe = recipes.sized(recipe, own[0])
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"variant"}
    return name, replace(recipe, **{key: flags[key] for key in fields & flags.keys() if flags[key] is not None})


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


def choose_looks(data: Path | None, recipe: Recipe, initial: Initial | None) -> Preprocessing:
    """What is made of the pictures: as the initial model expects it, else as the sample or photographs need it."""
    if initial is not None:
        return initial.preprocessing
    make = FashionMNIST.preprocessing_for if data is None else Preprocessing.for_photos
    return make(recipe.variant.in_channels, recipe.variant.crop)


def choose_data(
    data: Path | None, looks: Preprocessing, *, workers: int | None, on_error: Literal["stop", "skip"]
) -> ImageSet:
    """Training and test images; the processes of a machine share its cores to read them.

    Raises ValueError for pictures of one class.
    """
    if distributed.launched() and workers is None:
        workers = max(1, min(8, (os.cpu_count() or 1) // distributed.local_size()))
    report = tell if distributed.rank() == 0 else silent
    images = open_images(data, looks, splits=("train", "test"), workers=workers, on_error=on_error, report=report)
    if len(images.classes) < 2:
        raise ValueError(f"{data} must hold pictures of two classes or more, got {', '.join(images.classes)}")
    return images


def silent(line: str) -> None: ...


def begin(flags: Flags, initial: Initial | None) -> Settings:
    """The settings of a new run."""
    data = flags["data"]
    own = None if data is None else training_pictures(Path(data))
    name, recipe = choose_recipe(flags, own=own, initial=initial)
    if recipe.freeze != "nothing" and initial is None:
        raise ValueError(f"--freeze {recipe.freeze} keeps weights that only --init brings")
    return Settings(name, recipe, choose_looks(data, recipe, initial), flags)


def launch(flags: Flags, out: Path, *, resume: bool) -> None:
    """Train in this process, and in those that torchrun started beside it; rank 0 speaks.

    flags: all arguments of `fastalex train` but `out` and `resume`; on a run that goes on they change its settings.
    Raises ValueError where `out` holds a run that nobody asked to resume, and as `fastalex.training.loop.train`;
    SystemExit with 128 and the signal's number where that ends with Stopped.
    """
    goes_on = resume or distributed.restarted()
    settings = Settings.load(out) if goes_on else None
    if settings is not None:
        settings = settings.continued(flags, out)
        flags = settings.flags
    if flags["deterministic"]:
        deterministic()
    device = choose_device(flags["device"])
    with distributed.process_group(device):
        first = distributed.rank() == 0
        exists = distributed.from_rank_0((out / STATE).exists())
        if exists and not goes_on:
            raise ValueError(f"{out} holds a run already: go on with --resume, or choose another folder with --out")
        settings = distributed.from_rank_0(settings)
        source = settings.flags["init"] if settings else flags["init"]
        # a run that goes on has its weights
        initial = None if source is None or (exists and settings) else load_initial(source)
        settings = settings or begin(flags, initial)
        flags, recipe = settings.flags, settings.recipe
        options = Options(**{name: flags[name] for name in OPTIONS if flags[name] is not None})
        data = None if flags["data"] is None else Path(flags["data"])
        images = choose_data(
            data, settings.preprocessing, workers=flags["workers"], on_error=flags["on_error"] or "stop"
        )
        if first:
            if resume and not exists:
                console.print(f"nothing to resume in {out}: starting from the beginning", soft_wrap=True)
            processes = f", {distributed.size()} processes" if distributed.size() > 1 else ""
            console.print(
                f"{images.count('train'):,} training pictures of {len(images.classes)} classes, on {device}{processes}"
            )
            tell(described(settings, images, initial))
        model = build_model(recipe, images.classes, device, initial)
        bar = ProgressBar(recipe.epochs, images.count("train")) if first else contextlib.nullcontext()
        try:
            with bar as callback:
                train(
                    model, images, recipe, out,
                    options=options, resume=exists, callback=callback, settings=settings.to_json(),
                )  # fmt: skip
        except Stopped as stopped:
            if first:
                console.print(f"{stopped}; fastalex train --resume --out {out} goes on with it", soft_wrap=True)
            raise SystemExit(128 + stopped.signal) from None
        if first:
            console.print(f"wrote {out}", soft_wrap=True)


def described(settings: Settings, images: ImageSet, initial: Initial | None) -> str:
    """One line: what is trained, and how."""
    recipe, looks = settings.recipe, settings.preprocessing
    parts = [
        f"recipe {settings.name}: variant {recipe.variant.name} at {looks.crop}x{looks.crop}",
        f"{counted(recipe.epochs, 'epoch')} of {counted(images.count('train'), 'picture')}, "
        f"{recipe.batch_size:,} a step",
    ]
    if initial is not None:
        kept = "all of" if initial.knows(images.classes) else "all but the last layer from"
        parts.append(f"{kept} {settings.flags['init']}")
    if recipe.freeze != "nothing":
        parts.append(f"{recipe.freeze} frozen")
    return ", ".join(parts)
