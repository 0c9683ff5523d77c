"""What a person sees in the terminal: progress of training, tables of predictions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastalex.describe import Description
from fastalex.evaluation.metrics import Scores
from fastalex.evaluation.report import per_class
from fastalex.training.progress import Callback, Epoch
from fastalex.words import by, counted

# names of files and classes are no markup: tables get them as Text, which is none either
console = Console(markup=False, emoji=False)
# progress of what prints its result on stdout
errors = Console(markup=False, emoji=False, stderr=True)


def tell(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)


def tell_progress(line: str) -> None:
    errors.print(line, soft_wrap=True, highlight=False)


def tell_written(paths: Sequence[Path]) -> None:
    tell("wrote " + ", ".join(map(str, paths)))


class ThroughputColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "- images/s", style="cyan")


class ProgressBar(Callback):
    """A bar over the whole run with throughput and time left, and a line for every epoch."""

    def __init__(self, epochs: int, images_per_epoch: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            ThroughputColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            speed_estimate_period=20,
        )
        self._epochs = epochs
        self._per_epoch = images_per_epoch
        self._started = time.perf_counter()
        self._task = self._progress.add_task("starting", total=epochs * images_per_epoch)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def loading(self, done: int, total: int) -> None:
        seconds = time.perf_counter() - self._started
        rate = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB of pictures, {done / 1e6 / seconds:,.0f} MB/s"
        self._progress.update(self._task, description=f"loading {rate}")
        if done == total and total > 1e9:
            tell(f"loaded {rate}")

    def epoch_begins(self, epoch: int, images_done: int) -> None:
        done = (epoch - 1) * self._per_epoch + images_done
        self._progress.update(self._task, completed=done, description=f"epoch {epoch}/{self._epochs}")

    def batch_done(self, images: int) -> None:
        self._progress.advance(self._task, images)

    def epoch_ends(self, metrics: Epoch) -> None:
        wait, alive = metrics["data_wait"], {name: metrics[f"{name}_alive"] for name in ("fc6", "fc7")}
        console.print(
            f"epoch {metrics['epoch']:3d}   training loss {metrics['train_loss']:.3f}   "
            f"test accuracy {metrics['top1']:6.1%}   {metrics['images_per_second']:,.0f} images/s"
            + (f", {wait:.0%} of the time waiting for them" if wait >= 0.1 else "")
            + "".join(f", {share:.1%} of {name}'s units alive" for name, share in alive.items() if share < 0.5),
            highlight=False,
        )


class PackingBar:
    """A bar over the pictures to pack, and a line for every one that cannot be read; called as `pack` reports."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("packing"),
            BarColumn(),
            MofNCompleteColumn(),
            ThroughputColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=60,
        )
        self._task = self._progress.add_task("packing", total=None)
        self._begun = False

    def __enter__(self) -> PackingBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._begun:
            self._progress.stop()

    def __call__(self, done: int, total: int, failures: Sequence[tuple[str, str]]) -> None:
        if not self._begun:  # an error before that needs no bar
            self._begun = True
            if done:
                console.print(f"{counted(done, 'picture')} packed before", highlight=False)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)
        for picture, reason in failures:
            console.print(f"skipped {picture}: {reason}", highlight=False, soft_wrap=True)


class WorkBar:
    """A bar on stderr over `total` pieces of work, gone at its end."""

    def __init__(self, total: int) -> None:
        self._progress = Progress(
            BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left"),
            console=errors, transient=True, speed_estimate_period=120,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> WorkBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        self._progress.advance(self._task)


def print_scores(scores: Scores, pictures: int) -> None:
    top1 = Text(f"top-1 {scores.top1:.1%}", style="bold")
    console.print(
        top1, f"  top-5 {scores.top5:.1%}   loss {scores.loss:.3f}   {counted(pictures, 'picture')}", highlight=False
    )


def print_classes(confusion: Tensor, classes: tuple[str, ...], most: int = 20) -> None:
    """A row for each class, the worst first, `most` rows at most.  confusion: [true, predicted], int64."""
    rows = sorted(
        (row for row in per_class(confusion, classes) if row.recall is not None), key=lambda row: row.recall or 0
    )
    title = f"the {most} worst of {len(rows)} classes" if len(rows) > most else None
    table = Table("class", "pictures", "recognised", "precision", "most often taken for", title=title)
    for row in rows[:most]:
        precision = "-" if row.precision is None else f"{row.precision:.1%}"
        taken = f"{row.taken_for[0]} ({row.taken_for[1]:,})" if row.taken_for else "-"
        table.add_row(Text(row.name), f"{row.pictures:,}", f"{row.recall:.1%}", precision, Text(taken))
    console.print(table)


def print_predictions(pictures: Sequence[str], probabilities: Tensor, classes: Sequence[str], count: int = 5) -> None:
    """One row a picture: its name and its likeliest classes.  probabilities: (N, classes)."""
    top = probabilities.topk(min(count, len(classes)))
    shown = top.values.shape[1]
    table = Table("picture", "the likeliest class" if shown == 1 else f"the {shown} likeliest classes")
    for picture, shares, indices in zip(pictures, top.values.tolist(), top.indices.tolist(), strict=True):
        first, *others = (f"{classes[i]} {share:.1%}" for share, i in zip(shares, indices, strict=True))
        table.add_row(Text(picture), Text(first, style="bold") + Text("".join(f", {other}" for other in others)))
    console.print(table)


def print_distances(distances: Sequence[tuple[str, float]]) -> None:
    """A row for each pair of pictures, and their mean."""
    table = Table("picture", "LPIPS")
    table.columns[1].justify = "right"
    for name, distance in distances:
        table.add_row(Text(name), f"{distance:.4f}")
    if len(distances) > 1:
        mean = sum(distance for _, distance in distances) / len(distances)
        table.add_section()
        table.add_row(Text(f"mean of {len(distances):,}", style="bold"), Text(f"{mean:.4f}", style="bold"))
    console.print(table)


def print_description(description: Description) -> None:
    """The layers of a variant, and what is worth noticing about them."""
    table = Table(
        "layer",
        title=Text(f"AlexNet, variant {description.variant}, for pictures of {by(description.input)}"),
        box=SIMPLE_HEAD,
        padding=0,
        collapse_padding=True,
    )
    for heading in ("output", "neurons", "parameters", "share", "MFLOP", "kept, MB:\ntorch.nn", "kept, MB:\nfastalex"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in description.layers:
        table.add_row(
            layer.name,
            by(layer.shape),
            f"{layer.neurons:,}" if layer.neurons else "",
            f"{layer.parameters:,}" if layer.neurons else "",
            f"{layer.parameters / description.total('parameters'):.1%}" if layer.neurons else "",
            f"{layer.flops / 1e6:,.1f}" if layer.neurons else "",
            f"{layer.eager_bytes / 1e6:.3f}",
            "" if layer.fused_bytes is None else f"{layer.fused_bytes / 1e6:.3f}",
        )
    eager, fused = description.total("eager_bytes"), description.total("fused_bytes")
    table.add_section()
    table.add_row(
        "all",
        "",
        f"{description.total('neurons'):,}",
        f"{description.total('parameters'):,}",
        "100%",
        f"{description.total('flops') / 1e6:,.1f}",
        f"{eager / 1e6:.3f}",
        f"{fused / 1e6:.3f}",
    )
    console.print(table)
    console.print(
        "Per picture.  MFLOP counts two operations per multiply-add.  Kept is what autograd holds for the backward "
        f"pass in fp32, measured; fastalex's is one number from each convolution to the next: {fused / eager:.0%} of "
        f"torch.nn's.\nfc6 holds {description.share('parameters', 'fc6'):.1%} of the parameters; the convolutions hold "
        f"{description.share('parameters', 'conv'):.1%} and do {description.share('flops', 'conv'):.1%} of the work.",
        highlight=False,
    )
