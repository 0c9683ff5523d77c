"""What each of the paper's ingredients is worth, in a narrow AlexNet for 28x28 or 32x32 pictures, one at a time.

Every run has the same budget of epochs and the same learning rates; a seed is used once with everything and once
without each ingredient, and what is reported is the difference within a seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from fastalex.alexnet import AlexNet
from fastalex.data.preprocessing import random_crop, random_flip
from fastalex.experiments.pictures import load_pictures
from fastalex.experiments.runs import Interval, Result, Store, interval
from fastalex.files import write_whole
from fastalex.functional import ResponseNorm
from fastalex.variants import Conv, Variant
from fastalex.visualize.figures import BLUE, DPI, ORANGE, save
from fastalex.words import counted

NAME = "ablation"
MARGIN = 2  # pixels around a picture that random crops use
DROPOUT = 0.5
EVERYTHING = "everything"


@dataclass(frozen=True)
class Change:
    """What a run does without: a name for the table, and the paper's gain in top-1 and top-5 points if it has one."""

    name: str
    paper: tuple[float, float] | None
    note: str = ""


CHANGES = {
    EVERYTHING: Change("everything", None),
    "no LRN": Change("LRN", (1.4, 1.2), "ILSVRC-2010; 2 points on CIFAR-10"),
    "pooling 2x2": Change("overlapping pooling (3x3, not 2x2)", (0.4, 0.3)),
    "one tower": Change("second tower (else half the kernels but conv5's)", (1.7, 1.2)),
    "joined towers": Change("separate towers (groups in conv2, 4, 5)", None, "not compared in the paper"),
    "no dropout": Change("dropout", None, '"substantial overfitting" without'),
    "no augmentation": Change("random crops and mirroring", None, '"substantial overfitting" without'),
}


@dataclass(frozen=True)
class Settings:
    pictures: str
    epochs: int
    seeds: int
    batch_size: int = 64
    rate: float = 0.02

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.seeds < 1:
            raise ValueError(f"--epochs and --seeds must be at least 1, got {self.epochs} and {self.seeds}")


def variant_for(change: str, channels: int, size: int) -> Variant:
    """The network of a change: 16-32-48-32-32 kernels in two towers, 128 hidden units; He's initialisation.

    No pooling behind conv2: pictures this small have no pixels left for it.
    """
    norm = None if change == "no LRN" else ResponseNorm(5, 5e-4, 0.75, 2.0)
    pool = 2 if change == "pooling 2x2" else 3
    groups = 1 if change in ("one tower", "joined towers") else 2
    widths = (8, 16, 24, 16, 32) if change == "one tower" else (16, 32, 48, 32, 32)
    convs = []
    inputs = channels
    for number, width in enumerate(widths, 1):
        kernel = 5 if number < 3 else 3
        split = groups if number in (2, 4, 5) else 1
        convs.append(
            Conv(
                width,
                kernel,
                stride=2 if number == 1 else 1,
                padding=kernel // 2,
                groups=split,
                norm=norm if number < 3 else None,
                pool=pool if number in (1, 5) else None,
                std=sqrt(2 * split / (inputs * kernel**2)),
            )
        )
        inputs = width
    return Variant(
        change,
        tuple(convs),
        crop=size,
        in_channels=channels,
        hidden=(128, 128),
        hidden_std=sqrt(2 / 128),
        features_size=2,
    )


@functools.lru_cache(maxsize=1)
def _data(data: Path | None, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return load_pictures(data).normalised(device)


def train(change: str, seed: int, settings: Settings, data: Path | None, device: str) -> Result:
    """One run: SGD with momentum and weight decay, the rate rising and falling once.  Returns the errors in percent."""
    images, labels, test, test_labels = _data(data, device)
    torch.manual_seed(seed)
    dropout = 0.0 if change == "no dropout" else DROPOUT
    model = AlexNet(10, dropout, variant=variant_for(change, images.shape[1], images.shape[2])).to(device)
    optimizer = torch.optim.SGD(model.parameters(), settings.rate, momentum=0.9, weight_decay=5e-4, fused=True)
    steps = -(-len(images) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.epochs * steps, cycle_momentum=False
    )
    losses = []
    for _ in range(settings.epochs):
        total = 0.0
        for indices in torch.randperm(len(images)).split(settings.batch_size):
            batch, wanted = images[indices.to(device)], labels[indices.to(device)]
            if change != "no augmentation":
                batch = random_flip(
                    random_crop(F.pad(batch, (MARGIN,) * 4, value=float(images.min())), images.shape[2])
                )
            loss = F.cross_entropy(model(batch), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(indices)
        losses.append(total / len(images))
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in test.split(500)])
    wrong = [100 * (1 - (logits.topk(k).indices == test_labels[:, None]).any(1).float().mean().item()) for k in (1, 5)]
    return {"top1_error": wrong[0], "top5_error": wrong[1], "losses": losses}


class Finding(NamedTuple):
    """Of one change: the top-1 error in percent, and what the ingredient gains in points (None for `everything`)."""

    change: str
    error: Interval
    gain: Interval | None
    gain_top5: Interval | None


def findings(runs: dict[str, Result], settings: Settings) -> list[Finding]:
    seeds = range(1, settings.seeds + 1)

    def errors(change: str, column: str) -> list[float]:
        return [runs[f"{change}, seed {seed}"][column] for seed in seeds]

    def gain(change: str, column: str) -> Interval | None:
        if change == EVERYTHING:
            return None
        pairs = zip(errors(change, column), errors(EVERYTHING, column), strict=True)
        return interval([without - with_it for without, with_it in pairs])

    return [
        Finding(change, interval(errors(change, "top1_error")), gain(change, "top1_error"), gain(change, "top5_error"))
        for change in CHANGES
    ]


def run(
    out: Path,
    data: Path | None = None,
    *,
    epochs: int | None = None,
    seeds: int = 5,
    device: str = "cpu",
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> list[Finding]:
    """The whole experiment.  Writes results.json, table.md and figure.png to `out`; goes on where it was stopped.

    epochs: of every run; by default 5 on the sample of Fashion-MNIST, 30 on CIFAR-10.
    report: told what has been done, a line at a time.
    Raises ValueError for settings out of range, or if `out` holds results of others.
    """
    pictures = load_pictures(data)
    settings = Settings(pictures.name, epochs if epochs is not None else 30 if pictures.is_cifar else 5, seeds)
    store = Store(out / "results.json", {"experiment": NAME, **asdict(settings)}, overwrite=overwrite)
    keys = {f"{change}, seed {seed}": (change, seed) for seed in range(1, seeds + 1) for change in CHANGES}
    store.complete(
        keys,
        train,
        lambda key: (*keys[key], settings, data, device),
        device=device,
        finished=lambda key: report(f"{key}: {store.runs[key]['top1_error']:.1f} % wrong"),
    )
    found = findings(store.runs, settings)
    store.write(findings=[finding._asdict() for finding in found])
    write_whole(out / "table.md", table(found, settings))
    draw(found, settings, out / "figure.png")
    return found


def table(found: list[Finding], settings: Settings) -> str:
    """Markdown."""
    lines = [
        f"A narrow AlexNet on {settings.pictures}, {counted(settings.epochs, 'epoch')}, "
        f"{counted(settings.seeds, 'seed')}; errors in percent, gains in points, "
        "95 % confidence intervals. An interval that contains 0 shows no effect.",
        "",
        "| ingredient | top-1 error without it | gain, top-1 | gain, top-5 | paper's gain, top-1 / top-5 |",
        "|---|---|---|---|---|",
    ]
    for change, error, gain, gain_top5 in found:
        about = CHANGES[change]
        if gain is None or gain_top5 is None:
            lines.append(f"| everything in place | {plus_minus(error)} | | | |")
            continue
        paper = " / ".join(f"{points}" for points in about.paper) if about.paper else "no number"
        paper += f" ({about.note})" if about.note else ""
        lines.append(
            f"| {about.name} | {plus_minus(error)} | {plus_minus(gain, '+')} | {plus_minus(gain_top5, '+')} | {paper} |"
        )
    return "\n".join([*lines, "", conclusion(found)]) + "\n"


def conclusion(found: list[Finding]) -> str:
    """What the runs say, in sentences: which gains are shown, and which so many seeds could not have shown."""
    gains = [(CHANGES[finding.change], finding.gain) for finding in found if finding.gain is not None]
    if any(not math.isfinite(gain.half_width) for _, gain in gains):
        return "Nothing is shown: one seed has no interval."
    lists = {
        "Shown to help": [about.name for about, gain in gains if gain.mean > 0 and not gain.covers(0)],
        "shown to cost accuracy": [about.name for about, gain in gains if gain.mean < 0 and not gain.covers(0)],
        "not shown": [about.name for about, gain in gains if gain.covers(0)],
    }
    sentences = ["; ".join(f"{kind}: {', '.join(names) or 'nothing'}" for kind, names in lists.items()) + "."]
    blind = [
        f"{about.name} ({about.paper[0]} in the paper, ± {gain.half_width:.2f} here)"
        for about, gain in gains
        if about.paper and gain.half_width > about.paper[0]
    ]
    if blind:
        sentences.append(f"Too few seeds to see gains as small as the paper's: {', '.join(blind)}.")
    return " ".join(sentences)


def plus_minus(value: Interval, sign: str = "") -> str:
    text = f"{value.mean:{sign}.2f}"
    return text + (f" ± {value.half_width:.2f}" if math.isfinite(value.half_width) else "")


def draw(found: list[Finding], settings: Settings, path: Path) -> None:
    """The gain of each ingredient with its interval, the paper's beside it where there is one."""
    rows = [(CHANGES[finding.change], finding.gain) for finding in found if finding.gain is not None]
    figure = Figure(figsize=(10, 0.55 * len(rows) + 1.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    figure.suptitle(
        f"What each ingredient is worth: ours on {settings.pictures}, {counted(settings.epochs, 'epoch')}, "
        f"{counted(settings.seeds, 'seed')};\nthe paper's on ILSVRC-2010, about 90 epochs",
        fontsize=11,
    )
    for place, (about, gain) in enumerate(rows):
        bar = None if not math.isfinite(gain.half_width) else gain.half_width
        label = "ours, 95 % interval" if place == 0 else None
        axes.errorbar(gain.mean, place - 0.12, xerr=bar, fmt="o", color=BLUE, capsize=4, label=label)
        if about.paper:
            axes.plot(about.paper[0], place + 0.16, "D", color=ORANGE, label="paper" if place == 0 else None)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(rows)), [about.name for about, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("gain: points of top-1 error (right of 0: the ingredient helps)")
    axes.legend(loc="best")
    save(figure, path)
