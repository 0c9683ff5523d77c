"""What `fastalex pack` and `fastalex verify` do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastalex.data.packed import verify as verify_packed
from fastalex.visualize.console import PackingBar, console, tell
from fastalex.words import counted


def pack(
    source: Path,
    target: Path,
    *,
    size: int | None,
    workers: int | None,
    on_error: Literal["stop", "skip"],
    val_labels: Path | None,
) -> None:
    """Pack with a bar, and say what came of it.  Raises as `fastalex.data.pack.pack`; SystemExit(130) on Ctrl-C."""
    # Pillow, which checking needs not
    from fastalex.data.pack import pack as pack_pictures

    try:
        with PackingBar() as bar:
            packed = pack_pictures(
                source, target, size=size, workers=workers, on_error=on_error, val_labels=val_labels, progress=bar
            )
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise SystemExit(130) from None
    counts = ", ".join(f"{count:,} {split}" for split, count in packed.pictures.items())
    skipped = f"; {len(packed.failures):,} could not be read" if packed.failures else ""
    ignored = f"; {counted(packed.ignored, 'file')} left out, no picture" if packed.ignored else ""
    before = packed.resumed == sum(packed.pictures.values()) + len(packed.failures)
    tell(f"{target} was packed before: {counts}{skipped}" if before else f"wrote {target}: {counts}{skipped}{ignored}")


def verify(data: Path) -> None:
    """Raises as `fastalex.data.packed.verify`."""
    tell(f"{data}: {verify_packed(data) / 1e9:.2f} GB as they were written")
