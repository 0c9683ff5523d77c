"""Pictures of a training run and of what a model sees, as PNG files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from fastalex.describe import Description
from fastalex.files import replacing
from fastalex.words import by, counted

if TYPE_CHECKING:
    from fastalex.visualize.similar import Sheet

# Okabe and Ito's colours: told apart with every common kind of colour blindness, and in grey
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
GREY = "#8c8c8c"
RIGHT, WRONG = BLUE, ORANGE
DPI = 100


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, warnings.catch_warnings():
        # names in scripts that the font lacks: their boxes say it
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(temporary, format="png")


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
    save(figure, path)


def stretch(maps: Tensor) -> Tensor:
    """Each of (K, ...) from its own minimum to its own maximum, as uint8 from 0 to 255; constant ones become 0."""
    flat = maps.flatten(1)
    low, high = (end.view(-1, *[1] * (maps.dim() - 1)) for end in (flat.amin(1), flat.amax(1)))
    return ((maps - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)


def coloured(maps: Tensor) -> Tensor:
    """`stretch`ed maps (K, H, W) in a scale from dark blue to yellow that every eye reads alike: uint8 (K, 3, H, W)."""
    scale = torch.from_numpy(colormaps["cividis"](range(256), bytes=True)[:, :3].copy())
    return scale[stretch(maps).long()].permute(0, 3, 1, 2)


def mosaic(tiles: Tensor, columns: int, gap: int = 1) -> Tensor:
    """uint8 (K, C, H, W) -> (C, rows * (H + gap) - gap, columns * (W + gap) - gap), white between the tiles."""
    count, channels, height, width = tiles.shape
    rows = ceil(count / columns)
    sheet = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        top, left = row * (height + gap), column * (width + gap)
        sheet[:, top : top + height, left : left + width] = tile
    return sheet


def filter_tiles(weight: Tensor) -> Tensor:
    """Kernels (K, C, R, S) of a convolution as uint8 (K, 3, R, S).

    Of three channels in their colours, each stretched to its own range.  Of others, the mean over the channels, from
    blue (least) over white (zero) to red (greatest), as far each way as the kernel's largest magnitude.
    """
    kernels = weight.detach().float().cpu()
    if kernels.shape[1] == 3:
        return stretch(kernels)
    means = kernels.mean(1)
    signed = means / means.abs().amax((1, 2), keepdim=True).clamp_min(1e-12)
    scale = torch.from_numpy(colormaps["RdBu_r"](range(256), bytes=True)[:, :3].copy())
    return scale[((signed + 1) * 127.5).round().long()].permute(0, 3, 1, 2)


def filters(weight: Tensor, path: Path) -> None:
    """The kernels of a first convolution (K, C, R, S) as `filter_tiles`, whole pixels of the file a weight."""
    tiles = filter_tiles(weight)
    sheet = pixels(mosaic(tiles, min(len(tiles), 16 if len(tiles) > 32 else 8)))
    per_weight = max(1, round(72 / weight.shape[3]))
    sheet = sheet.repeat(per_weight, 0).repeat(per_weight, 1)
    margin, head = 10, 62
    width, height = max(sheet.shape[1], 560) + 2 * margin, head + sheet.shape[0] + margin
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(sheet, xo=(width - sheet.shape[1]) // 2, yo=margin)
    meaning = "in their colours" if weight.shape[1] == 3 else "red answers to bright, blue to dark"
    figure.text(
        0.5, 1 - 10 / height,
        f"{counted(len(tiles), 'filter')} of the first convolution, {weight.shape[3]}x{weight.shape[2]} pixels\n"
        f"each at its own contrast, {meaning}",
        ha="center", va="top", fontsize=11,
    )  # fmt: skip
    save(figure, path)


def activation_maps(picture: Tensor, maps: Tensor, name: str, layer: str, path: Path) -> None:
    """A picture beside a layer's maps, each stretched to its own range.

    picture: uint8 (C, H, W).  maps: (K, H, W), one picture's.
    """
    squarest = ceil(len(maps) ** 0.5)
    # a full last row where a sheet of up to twice that width has one: 8x4 of 32 maps, 12x8 of 96
    columns = next((c for c in range(squarest, 2 * squarest) if len(maps) % c == 0), squarest)
    rows = ceil(len(maps) / columns)
    figure = Figure(
        figsize=(11, 8.0 * rows * maps.shape[1] / (columns * maps.shape[2]) + 0.6), dpi=DPI, layout="constrained"
    )
    photo, sheet = figure.subplots(1, 2, width_ratios=[3, 8])
    photo.imshow(pixels(picture), cmap="gray", vmin=0, vmax=255)
    photo.set_anchor("N")
    photo.set_title(shortened(name), fontsize=10)
    sheet.imshow(pixels(mosaic(coloured(maps), columns)), interpolation="nearest")
    silent = int((maps.flatten(1).amax(1) <= 0).sum())
    sheet.set_title(
        f"{layer}: {by(maps.shape)}, each map from its least (dark) to its greatest value (bright)"
        + (f"; {silent} {'answers' if silent == 1 else 'answer'} nothing" if silent else ""),
        fontsize=10,
    )
    for axes in (photo, sheet):
        axes.axis("off")
    save(figure, path)


def neighbours(sheets: Sequence[Sheet], path: Path) -> None:
    """One row a query: the picture, then those like it with their distances, the nearest first."""
    columns = 1 + max(len(sheet.matches) for sheet in sheets)
    figure = Figure(figsize=(1.75 * columns + 0.3, 2.05 * len(sheets) + 0.5), dpi=DPI, layout="constrained")
    figure.suptitle("The picture asked for, and its nearest neighbours by distance in the last hidden layer")
    cells = figure.subplots(len(sheets), columns, squeeze=False)
    for axes in cells.flat:
        axes.axis("off")
    for row, sheet in zip(cells, sheets, strict=True):
        row[0].imshow(pixels(sheet.picture), cmap="gray", vmin=0, vmax=255)
        row[0].set_title(shortened(sheet.name, 20), fontsize=9, fontweight="bold", color=BLUE)
        for axes, match in zip(row[1:], sheet.matches, strict=False):
            axes.imshow(pixels(match.picture), cmap="gray", vmin=0, vmax=255)
            axes.set_title(f"{shortened(match.name, 20)}\n{match.distance:.2f}", fontsize=8)
    save(figure, path)


def shortened(text: str, length: int = 32) -> str:
    """The end of a long text, which tells paths apart better than their beginning."""
    return plain(text if len(text) <= length else f"...{text[3 - length :]}")


def plain(text: str) -> str:
    """A name as it is: matplotlib takes what stands between two dollars for a formula."""
    return text.replace("$", r"\$")


def plain_numbers(axis: Axis) -> None:
    """Ticks of a logarithmic axis as 0.5, 1, 2 and 1,000, not as powers of ten."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain_number(value)))
    axis.set_minor_formatter(NullFormatter())


def _plain_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 and value == round(value) else np.format_float_positional(value, 3, trim="-")


def pixels(picture: Tensor) -> np.ndarray:
    """(C, H, W) -> (H, W, 3), or (H, W) for one channel, as matplotlib wants it."""
    return picture.permute(1, 2, 0).squeeze(-1).numpy()


def predictions(
    pictures: Sequence[Tensor],
    names: Sequence[str],
    probabilities: Tensor,
    classes: Sequence[str],
    path: Path,
    top: int = 5,
) -> None:
    """Pictures with their likeliest classes as bars beside them, two pictures a row, as in the paper's figure 4.

    pictures: uint8 (C, H, W), of any sizes.  probabilities: (N, classes).
    """
    top = min(top, len(classes))
    columns = min(2, len(pictures))
    rows = ceil(len(pictures) / columns)
    figure = Figure(figsize=(6 * columns, rows * max(2.5, 0.42 * top + 0.6)), dpi=DPI, layout="constrained")
    cells = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.3] * columns)
    for axes in cells.flat:
        axes.axis("off")
    best = probabilities.topk(top)
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        row, column = divmod(i, columns)
        photo, bars = cells[row, 2 * column], cells[row, 2 * column + 1]
        photo.imshow(pixels(picture), cmap="gray", vmin=0, vmax=255)
        photo.set_title(shortened(name), fontsize=9)
        for place, (share, index) in enumerate(zip(best.values[i].tolist(), best.indices[i].tolist(), strict=True)):
            bars.barh(place, share, height=0.3, color=BLUE if place == 0 else SKY)
            bars.text(0, place - 0.22, f"{plain(classes[index])}  {share:.1%}", fontsize=10, va="bottom")
        bars.set(xlim=(0, 1), ylim=(top - 0.6, -0.9))
    save(figure, path)


def distance_map(pictures: Sequence[Tensor], names: Sequence[str], distances: Tensor, mean: float, path: Path) -> None:
    """Two pictures, and where they differ: a map with a bar that says what its colours mean.

    pictures: uint8 (3, H, W).  distances: (H, W).  mean: the distance of the whole pictures.
    """
    height, width = distances.shape
    figure = Figure(figsize=(13, 1 + 4 * min(2.0, height / width)), dpi=DPI, layout="constrained")
    *photos, axes = figure.subplots(1, 3)
    for photo, picture, name in zip(photos, pictures, names, strict=True):
        photo.imshow(pixels(picture))
        photo.set_title(shortened(name), fontsize=9)
        photo.axis("off")
    image = axes.imshow(distances.numpy(), cmap="magma", vmin=0)
    axes.set_title(f"LPIPS {mean:.4f}", fontsize=9)
    axes.axis("off")
    figure.colorbar(image, ax=axes, label="distance", shrink=0.8)
    save(figure, path)


def contact_sheet(
    images: Tensor, labels: Sequence[int], probabilities: Tensor, classes: Sequence[str], path: Path, columns: int = 4
) -> None:
    """Pictures with their three likeliest classes as bars, the true one in blue.

    images: uint8 (N, C, H, W).  labels: N indices into `classes`.  probabilities: (N, classes).
    """
    rows = ceil(len(images) / columns)
    figure = Figure(figsize=(columns * 3.1, rows * 1.45 + 0.4), dpi=DPI, layout="constrained")
    right = int((probabilities.argmax(1) == torch.tensor(labels)).sum())
    figure.suptitle(
        f"Held-out pictures and the network's best guesses: {right} of {len(images)} right (blue: the true class)"
    )
    cells = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.5] * columns)
    for axes in cells.flat:
        axes.axis("off")
    top = probabilities.topk(min(3, len(classes)))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(i, columns)
        picture, bars = cells[row, 2 * column], cells[row, 2 * column + 1]
        picture.imshow(pixels(image), cmap="gray", vmin=0, vmax=255)
        for place, (share, index) in enumerate(zip(top.values[i].tolist(), top.indices[i].tolist(), strict=True)):
            colour = RIGHT if index == label else WRONG
            bars.barh(place, share, height=0.25, color=colour)
            bars.text(0, place - 0.22, f"{plain(classes[index])}  {share:.0%}", fontsize=9, va="bottom")
        bars.set(xlim=(0, 1.05), ylim=(2.4, -0.8))
    save(figure, path)


def confusion_matrix(confusion: Tensor, classes: Sequence[str], path: Path, labelled: int = 30) -> None:
    """How often each class was taken for which, as shares of its pictures.

    confusion: int64 (classes, classes), [true, predicted].  Up to `labelled` classes are named, and their cells say the
    counts; of more, only the colours are shown, on a logarithmic scale, so that rare confusions can be seen.
    """
    shares = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    few = len(classes) <= labelled
    size = 3.5 + 0.5 * len(classes) if few else 11
    figure = Figure(figsize=(size + 1.2, size), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    right = confusion.diagonal().sum() / confusion.sum().clamp_min(1)
    norm = None if few else LogNorm(1e-3, 1, clip=True)
    # a colour map without a dark and a bright end of equal meaning: from nothing (white) to all (dark blue)
    picture = axes.imshow(shares.numpy(), cmap="Blues", **({"vmin": 0, "vmax": 1} if few else {"norm": norm}))
    axes.set(
        title=f"{right:.1%} of {counted(int(confusion.sum()), 'picture')} recognised", xlabel="taken for", ylabel="is"
    )
    bar = figure.colorbar(picture, label="share of the class's pictures", shrink=0.8)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    if few:
        axes.set_xticks(range(len(classes)), list(map(plain, classes)), rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(classes)), list(map(plain, classes)))
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            count = int(confusion[row, column])
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    save(figure, path)


def layers(description: Description, path: Path) -> None:
    """Where a network's parameters, arithmetic and memory are: three rows of bars, one bar a stage."""
    stages = description.stages()
    names = [" + ".join(layer.name for layer in rows) for rows in stages.values()]
    places = range(len(names))

    def sums(column: str, unit: float) -> list[float]:
        return [sum(getattr(layer, column) or 0 for layer in rows) / unit for rows in stages.values()]

    figure = Figure(figsize=(12, 4.2), dpi=DPI, layout="constrained")
    figure.suptitle(
        f"AlexNet, variant {description.variant}: {description.total('neurons'):,} neurons, "
        f"{description.total('parameters'):,} parameters, of which fc6 holds "
        f"{description.share('parameters', 'fc6'):.1%}"
    )
    parameters, flops, memory = figure.subplots(1, 3, sharey=True)
    for axes, column, unit, colour, title in (
        (parameters, "parameters", 1e6, GREY, "Parameters, millions"),
        (flops, "flops", 1e6, GREY, "Arithmetic, MFLOP per picture"),
    ):
        bars = axes.barh(places, sums(column, unit), color=colour)
        axes.bar_label(bars, fmt="{:,.2f}" if column == "parameters" else "{:,.0f}", padding=3, fontsize=8)
        axes.set_title(title, fontsize=11)
    for offset, column, colour, label in (
        (-0.2, "eager_bytes", ORANGE, "torch.nn"),
        (0.2, "fused_bytes", BLUE, "fastalex"),
    ):
        total = description.total(column) / 1e6
        bars = memory.barh(
            [place + offset for place in places],
            sums(column, 1e6),
            height=0.4,
            color=colour,
            label=f"{label}: {total:.2f} MB",
        )
        memory.bar_label(bars, fmt="{:,.2f}", padding=3, fontsize=8)
    memory.set_title("Kept for backward, MB per picture (fp32)", fontsize=11)
    memory.legend(loc="lower right")
    parameters.set_yticks(places, names)
    parameters.invert_yaxis()
    for axes in (parameters, flops, memory):
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
