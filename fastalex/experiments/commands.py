"""What `fastalex experiment` does: an experiment whose results a person sees, and that Ctrl-C only interrupts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markdown import Markdown

from fastalex.devices import find_device
from fastalex.visualize.console import console, tell, tell_written


def run(experiment: Callable[..., Any], out: Path, data: Path | None, *, device: str | None, **options: Any) -> None:
    """Run it and print its table.

    experiment: `run` of one of `fastalex.experiments`, with its options.  Raises as it does; SystemExit(130) on Ctrl-C.
    """
    where = str(find_device(device))
    try:
        experiment(out, data, device=where, **options)
    except KeyboardInterrupt:
        tell("stopped; the same command, without --overwrite, goes on after the last finished run")
        raise SystemExit(130) from None
    console.print(Markdown((out / "table.md").read_text()))
    tell_written([out / name for name in ("results.json", "table.md", "figure.png")])
