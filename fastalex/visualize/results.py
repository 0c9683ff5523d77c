"""Charts of measured results: speed-ups, rates against what the machine was measured to do, memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastalex import results
from fastalex.results import OURS, Result
from fastalex.visualize.figures import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, plain, plain_numbers, save

# one in all charts
COLOURS = {
    OURS: BLUE,
    "fastalex-nchw": SKY,
    "fastalex-graph": "#000000",
    "eager": ORANGE,
    "eager-nchw": VERMILION,
    "compile": GREEN,
    "compile-max-autotune": "#66c2a5",
    "tensorrt": "#999900",
    "onnxruntime": PURPLE,
    "openvino": "#7f6000",
    "torchvision": "#7f7f7f",
    "torchmetrics": "#a0522d",
    "lpips": "#4b0082",
}
OTHER = "#b0b0b0"
WHOLE_MODEL = ("inference", "step")


def report(file: Path, out: Path, *, keep: Path | None, readme: Path | None) -> None:
    """What `fastalex bench report` does: charts of a benchmark's results to `out`, and the Markdown table printed.

    keep: folder for the small dated file.  readme: its tables are renewed, see `fastalex.results.replace_tables`.
    """
    result = results.load(file)
    written = [] if readme is None else results.replace_tables(readme, result)
    if keep is not None:
        written.append(results.save(result, keep))
    for path in [*written, *charts(result, out)]:
        print(f"wrote {path}", file=sys.stderr)
    print(results.markdown(result))


def charts(result: Result, folder: Path) -> list[Path]:
    """Write the charts that the result has numbers for; returns their paths.

    speedup_operations.png, speedup_models.png: the other providers' time over fastalex's.  rates.png: percent of the
    measured copy and matrix rates.  memory.png: peak of allocated device memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compared = {group: found for group, found in results.groups(result).items() if len(found) > 1}
    models = {group: found for group, found in compared.items() if found[OURS]["pass"] in WHOLE_MODEL}
    operations = {group: found for group, found in compared.items() if group not in models}
    names = results.baselines(result)
    written = []

    def draw(name: str, figure: Figure | None) -> None:
        if figure is not None:
            save(figure, folder / name)
            written.append(folder / name)

    draw("speedup_operations.png", speedups(operations, names, f"Operations: {results.machine(result)}"))
    draw("speedup_models.png", speedups(models, names, f"Whole network: {results.machine(result)}"))
    draw("rates.png", rates(result, [OURS, *names]))
    draw("memory.png", memory(result, [OURS, *names]))
    return written


def speedups(groups: dict[str, dict[str, Result]], names: Sequence[str], title: str) -> Figure | None:
    """A line per case, a point per provider; left of 1 it is faster than fastalex."""
    if not groups:
        return None
    figure, axes = _lines(list(groups), title)
    for name in names:
        points = [(found[OURS]["ratio"][name], y) for y, found in enumerate(groups.values()) if name in found]
        if points:
            axes.plot(*zip(*points, strict=True), "o", markersize=5, color=COLOURS.get(name, OTHER), label=plain(name))
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set(xscale="log", xlabel="time / time of fastalex (right of 1, fastalex is faster)")
    plain_numbers(axes.xaxis)
    axes.legend(fontsize=8)
    return figure


def rates(result: Result, names: Sequence[str]) -> Figure | None:
    """Percent of the measured copy rate (bytes are counted) or matrix rate (FLOPs are), whichever is more."""
    cases = [case for case in result["cases"] if "percent_of_copy" in case or "percent_of_matrix_rate" in case]
    if not cases:
        return None
    groups = list(dict.fromkeys(case["group"] for case in cases))
    figure, axes = _lines(groups, f"Percent of the nearer measured bound: {results.machine(result)}")
    for name in names:
        points = [
            (max(case.get("percent_of_copy", 0), case.get("percent_of_matrix_rate", 0)), groups.index(case["group"]))
            for case in cases
            if case["provider"] == name
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", markersize=5, color=COLOURS.get(name, OTHER), label=plain(name))
    axes.axvline(100, color="#444444", linewidth=1)
    axes.set(xlim=(0, None), xlabel="percent of the measured copy rate or matrix rate, whichever is nearer")
    axes.legend(fontsize=8)
    return figure


def memory(result: Result, names: Sequence[str]) -> Figure | None:
    """The most device memory that each provider held, in GB; not of a graph, whose memory is there before it runs."""
    cases = [case for case in result["cases"] if "peak_bytes" in case and not case["provider"].endswith("-graph")]
    if not cases:
        return None
    groups = list(dict.fromkeys(case["group"] for case in cases))
    figure, axes = _lines(groups, f"Peak device memory: {results.machine(result)}")
    for name in names:
        points = [(case["peak_bytes"] / 1e9, groups.index(case["group"])) for case in cases if case["provider"] == name]
        if points:
            axes.plot(*zip(*points, strict=True), "o", markersize=5, color=COLOURS.get(name, OTHER), label=plain(name))
    axes.set(xscale="log", xlabel="GB: inputs, parameters, and what a run allocates")
    plain_numbers(axes.xaxis)
    axes.legend(fontsize=8)
    return figure


def _lines(labels: Sequence[str], title: str) -> tuple[Figure, Any]:
    """An empty figure with one labelled line per case."""
    figure = Figure(figsize=(10, 0.28 * len(labels) + 1.8), dpi=100, layout="constrained")
    figure.suptitle(plain(title), fontsize=10)
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), list(map(plain, labels)), fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return figure, axes
