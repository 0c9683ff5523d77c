"""What `fastalex inspect` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastalex.inspection import machine_code
from fastalex.visualize.console import WorkBar, tell_progress
from fastalex.words import counted


def rows(names: Sequence[str], targets: Sequence[str]) -> list[machine_code.Row]:
    """`machine_code.rows`, with what is to be done, and a bar over it, on stderr."""
    from fastalex.inspection import compiler

    missing = compiler.uncached(machine_code.requests(names, targets))
    traffic = sum(target == "traffic" for _, target in missing)
    tell_progress(
        f"{counted(len(names), 'entry', 'entries')} for {', '.join(targets)}: "
        f"{counted(len(missing) - traffic, 'compilation')} and {counted(traffic, 'count')} of DRAM bytes to do"
        + (f", about {duration(compiler.expected_seconds(missing))}" if missing else ", all of it is in the cache")
    )
    with WorkBar(len(missing)) as bar:
        return machine_code.rows(names, targets, bar.advance)


def duration(seconds: float) -> str:
    """Roughly, for a person."""
    return counted(round(seconds), "second") if seconds < 90 else counted(round(seconds / 60), "minute")


def print_chips() -> None:
    """The constants of the model and their sources."""
    print(machine_code.plain(machine_code.chip_table()), end="")


def inspect(
    targets: Sequence[str],
    dtypes: Sequence[str],
    kernel: str,
    *,
    every: bool,
    json: Path | None,
    chart: Path | None,
    markdown: Path | None,
    compare: Path | None,
) -> None:
    """Compile, print and write what is asked for.

    Raises ValueError for a kernel that is none, or a file that cannot be compared; SystemExit(1) if something does not
    compile or is worse than what `compare` holds.
    """
    old = None if compare is None else machine_code.load(compare)
    names = machine_code.names(dtypes, kernel, every)
    found = rows(names, targets)
    if json is not None:
        machine_code.save(json, found)
    if markdown is not None:
        machine_code.write_tables(markdown, found)
    if chart is not None:
        from fastalex.visualize.kernels import modelled_times

        modelled_times(found, chart)
    if old is None:
        print(machine_code.report(found), end="")
        worse = []
    else:
        print(machine_code.comparison(old, found), end="")
        worse = machine_code.regressions(old["rows"], found)
    if worse or any("error" in row for row in found):
        raise SystemExit(1)
