"""A chart of what the model says about the kernels' times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {
    "issue": "#444444",
    "fma": "#0969da",
    "alu": "#1a7f37",
    "xu": "#c93c37",
    "lsu": "#bf8700",
    "matrix": "#8250df",
}


def modelled_times(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per chip, one line per launch: each resource's modelled time over that of DRAM.

    rows: of `fastalex.inspection.machine_code.rows`.  Right of 1, the resource and not DRAM sets the pace.
    Raises ValueError if no row has a model.
    """
    chips = list(dict.fromkeys(chip for row in rows for chip in row.get("modelled_us", {})))
    if not chips:
        raise ValueError("nothing to draw: no launch with a modelled time")
    panels = {chip: [row for row in rows if chip in row.get("modelled_us", {})] for chip in chips}
    height = max(map(len, panels.values())) * 0.22 + 1.6
    figure = Figure(figsize=(5.5 * len(chips) + 1, height), dpi=100, layout="constrained")
    figure.suptitle("Modelled, not measured: time of each resource over the time of DRAM")
    for axes, (chip, launches) in zip(figure.subplots(1, len(chips), squeeze=False).flat, panels.items(), strict=True):
        for resource, colour in COLOURS.items():
            points = [
                (row["modelled_us"][chip][resource] / row["modelled_us"][chip]["DRAM"], line)
                for line, row in enumerate(launches)
                if row["modelled_us"][chip].get(resource)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "o", markersize=4, color=colour, label=resource)
        axes.axvline(1, color="#888888", linewidth=1)
        names = [f"{row['layer']} {row['kernel'].removesuffix('_kernel')} {row['dtype']}" for row in launches]
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set(title=f"{chip} ({launches[0]['target']})", xlim=(0, None), ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path)
