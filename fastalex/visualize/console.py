"""What a person sees in the terminal: progress of training, tables of predictions."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastalex.evaluation.metrics import Scores
from fastalex.training.loop import Epoch, Watcher

console = Console()


class ThroughputColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "- images/s", style="cyan")


class ProgressBar(Watcher):
    """A bar over the whole run with throughput and time left, and a line for every epoch."""

    def __init__(self, epochs: int, images_per_epoch: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
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
        self._task = self._progress.add_task("starting", total=epochs * images_per_epoch)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def epoch_begins(self, epoch: int) -> None:
        self._progress.update(
            self._task, completed=(epoch - 1) * self._per_epoch, description=f"epoch {epoch}/{self._epochs}"
        )

    def batch_done(self, images: int) -> None:
        self._progress.advance(self._task, images)

    def epoch_ends(self, metrics: Epoch) -> None:
        console.print(
            f"epoch {metrics['epoch']:3d}   training loss {metrics['train_loss']:.3f}   "
            f"test accuracy {metrics['top1']:6.1%}   {metrics['images_per_second']:,.0f} images/s",
            highlight=False,
        )


def print_scores(scores: Scores, pictures: int) -> None:
    console.print(
        f"[bold]top-1 {scores.top1:.1%}[/]   top-5 {scores.top5:.1%}   loss {scores.loss:.3f}   {pictures:,} pictures",
        highlight=False,
    )


def print_predictions(pictures: Sequence[str], probabilities: Tensor, classes: Sequence[str], count: int = 5) -> None:
    """One row a picture: its name and its likeliest classes.  probabilities: (N, classes)."""
    top = probabilities.topk(min(count, len(classes)))
    table = Table("picture", f"the {top.values.shape[1]} likeliest classes")
    for picture, shares, indices in zip(pictures, top.values.tolist(), top.indices.tolist(), strict=True):
        first, *others = (f"{classes[i]} {share:.1%}" for share, i in zip(shares, indices, strict=True))
        table.add_row(escape(picture), ", ".join([f"[bold]{escape(first)}[/]", *map(escape, others)]))
    console.print(table)
