"""Pictures of a training run and of what a model sees, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

RIGHT, WRONG = "#1a7f37", "#c93c37"
DPI = 100


def learning_curve(epochs: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over the epochs, from the lines of metrics.jsonl."""
    numbers = [line["epoch"] for line in epochs]
    figure = Figure(figsize=(10, 4), dpi=DPI, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(numbers, [line["train_loss"] for line in epochs], "o-", markersize=3, label="training")
    loss.plot(numbers, [line["test_loss"] for line in epochs], "o-", markersize=3, label="test")
    loss.set(title="Cross-entropy", xlabel="epoch", ylabel="nats")
    accuracy.plot(numbers, [line["top1"] for line in epochs], "o-", markersize=3, label="top-1")
    accuracy.plot(numbers, [line["top5"] for line in epochs], "o-", markersize=3, label="top-5")
    accuracy.set(title=f"Test accuracy: {epochs[-1]['top1']:.1%} at the end", xlabel="epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def filters(weight: Tensor, path: Path) -> None:
    """The kernels of a first convolution (K, 1 or 3, R, S), each stretched to its own range."""
    kernels = weight.detach().float().cpu()
    low, high = kernels.amin((1, 2, 3), keepdim=True), kernels.amax((1, 2, 3), keepdim=True)
    kernels = (kernels - low) / (high - low).clamp_min(1e-12)
    columns = 16 if len(kernels) > 32 else 8
    rows = ceil(len(kernels) / columns)
    figure = Figure(figsize=(columns * 0.8, rows * 0.8 + 0.5), dpi=DPI, layout="constrained")
    figure.suptitle(f"The {len(kernels)} filters of the first convolution")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, kernel in zip(figure.axes, kernels, strict=False):
        axes.imshow(kernel.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
    figure.savefig(path)


def contact_sheet(
    images: Tensor, labels: Sequence[int], probabilities: Tensor, classes: Sequence[str], path: Path, columns: int = 4
) -> None:
    """Pictures with their three likeliest classes as bars, the true one in green.

    images: uint8 (N, C, H, W).  labels: N indices into `classes`.  probabilities: (N, classes).
    """
    rows = ceil(len(images) / columns)
    figure = Figure(figsize=(columns * 3.1, rows * 1.45 + 0.4), dpi=DPI, layout="constrained")
    right = int((probabilities.argmax(1) == torch.tensor(labels)).sum())
    figure.suptitle(
        f"Held-out pictures and the network's best guesses: {right} of {len(images)} right (green: the true class)"
    )
    cells = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.5] * columns)
    for axes in cells.flat:
        axes.axis("off")
    top = probabilities.topk(min(3, len(classes)))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(i, columns)
        picture, bars = cells[row, 2 * column], cells[row, 2 * column + 1]
        picture.imshow(image.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=255)
        for place, (share, index) in enumerate(zip(top.values[i].tolist(), top.indices[i].tolist(), strict=True)):
            colour = RIGHT if index == label else WRONG
            bars.barh(place, share, height=0.25, color=colour)
            bars.text(0, place - 0.22, f"{classes[index]}  {share:.0%}", fontsize=9, va="bottom")
        bars.set(xlim=(0, 1.05), ylim=(2.4, -0.8))
    figure.savefig(path)
