"""What `fastalex tune` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastalex.devices import find_device
from fastalex.gpu.dispatch import table_path
from fastalex.gpu.tuning import Job
from fastalex.gpu.tuning import tune as measurements


def tune(
    variants: Sequence[str],
    dtypes: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    training: bool,
    sweep: bool,
    out: Path | None,
    device: str | None,
) -> None:
    """Measure into `out`, by default the user's table, and print what was found.

    Raises ValueError for a batch of no pictures, and where there is no GPU.
    """
    for size in batch_sizes:
        if size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {size}")
    where = find_device(device)
    if where.type != "cuda":
        raise ValueError(f"tune times kernels on a GPU, and the device here is {where}")
    path = out or table_path()
    for key, found in measurements(Job(variants, dtypes, batch_sizes, training, sweep), path):
        if isinstance(found, str):
            print(f"{key}: {found}")
            continue
        times = sorted(found.milliseconds.items(), key=lambda item: item[1])
        print(key)
        print("  " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in times) + f" -> {found.candidate}")
        for name, reason in found.refused.items():
            print(f"  {name}: {reason}")
    print(f"wrote {path}")
