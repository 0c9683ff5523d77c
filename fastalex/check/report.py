"""What `check` found, as Markdown tables: what is wrong first, then what is gained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastalex.check.runner import Row, iterate_rows

# Of a row, what says where it comes from.
BOOKKEEPING = ("phase", "stage", "item", "process", "state", "seconds", "at")


def is_wrong(row: Row) -> bool:
    return row["state"] == "failed" or any(row.get(key) is False for key in ("ok", "repeats", "portable_equal"))


def wrong(lines: Sequence[Row]) -> list[Row]:
    """The rows that say that something is wrong: a failure, a wrong value, a run that did not repeat."""
    places = dict.fromkeys((line["phase"], line["stage"]) for line in lines if "stage" in line)
    return [row for phase, stage in places for row in iterate_rows(lines, phase, stage) if is_wrong(row)]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Markdown; numbers to the right."""
    texts = [[text(cell) for cell in row] for row in rows]
    numbers = [all(not isinstance(row[i], str) for row in rows) for i in range(len(head))]
    rule = ["---:" if number else "---" for number in numbers]
    return ["| " + " | ".join(cells) + " |" for cells in ([*head], rule, *texts)]


def text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def values(lines: Sequence[Row]) -> list[str]:
    """One row for each stage that compares values: how many, how many wrong, the largest share of its bound."""
    rows = []
    for stage in dict.fromkeys(line["stage"] for line in lines if line.get("phase") == "values"):
        found = list(iterate_rows(lines, "values", stage))
        ran = [row for row in found if "refused" not in row]
        shares = [float(row["of_bound"]) for row in ran if "of_bound" in row]

        def count(key: str, ran: list[Row] = ran) -> str:
            told = [row[key] for row in ran if key in row]
            return f"{sum(told)} of {len(told)}" if told else "-"

        rows.append(
            [
                stage,
                len(ran),
                sum(map(is_wrong, ran)),
                max(shares, default=None),
                count("repeats"),
                count("portable_equal"),
            ]
        )
    head = ["stage", "compared", "wrong", "largest error, of its bound", "repeat bit for bit", "PTX equals portable"]
    return table(head, rows) if rows else []


def bandwidth(lines: Sequence[Row]) -> list[str]:
    rows = []
    for row in iterate_rows(lines, "times", "bandwidth"):
        if row["state"] == "done":
            best = min((row[k] for k in ("eager_ms", "eager_nchw_ms") if k in row), default=None)
            rows.append(
                [row["item"], 1e3 * row["ms"], row["gb_s"], row["percent_of_copy"], 1e3 * row["portable_ms"]
                 if "portable_ms" in row else None, best and best / row["ms"]]
            )  # fmt: skip
    head = ["kernel", "us", "GB/s", "% of copy", "us without PTX", "eager / ours"]
    return table(head, rows) if rows else []


def models(lines: Sequence[Row]) -> list[str]:
    """A row for each case, a column for each provider, in images per second."""
    cases: dict[str, dict[str, int]] = {}
    for stage in ("speed", "speed-tuned", "compile"):
        for row in iterate_rows(lines, "times", stage):
            if row["state"] == "done":
                case, _, provider = row["item"].partition("/")
                column = f"{provider}, tuned" if stage == "speed-tuned" else provider
                cases.setdefault(case, {})[column] = row["images_per_s"]
    columns = list(dict.fromkeys(column for found in cases.values() for column in found))
    rows = [[case, *(found.get(column) for column in columns)] for case, found in cases.items()]
    return table(["images/s", *columns], rows) if rows else []


def convolutions(lines: Sequence[Row]) -> list[str]:
    """What each layer takes from now on, and what that gains over the default."""
    rows = []
    for row in iterate_rows(lines, "times", "candidates"):
        if row["state"] == "done":
            ms = row["ms"]
            best = sorted(ms, key=ms.__getitem__)[:4]
            rows.append(
                [row["item"], 1e3 * ms[row["default"]], row["chosen"], ms[row["default"]] / ms[row["chosen"]],
                 ", ".join(f"{name} {1e3 * ms[name]:.1f}" for name in best)]
            )  # fmt: skip
    head = ["layer", "default, us", "to take", "gain", "fastest, us"]
    return table(head, rows) if rows else []


def report(lines: Sequence[Row], identity: Row) -> str:
    """Everything, as Markdown."""
    out = ["# fastalex check", "", ", ".join(f"{key} {value}" for key, value in identity.items()), ""]
    for row in iterate_rows(lines, "times", "machine"):
        told = {key: value for key, value in row.items() if key not in BOOKKEEPING}
        out.append(f"- {row['item']}: " + ", ".join(f"{key} {value}" for key, value in told.items()))
    processes = [line for line in lines if line.get("state") == "kernels"]
    compiled, cached = (sum(line[key] for line in processes) for key in ("compiled", "cached"))
    out.append(f"- kernels: {compiled} compiled, {cached} out of the cache")
    for title, rows in (
        ("Values", values(lines)),
        ("Bandwidth", bandwidth(lines)),
        ("Models", models(lines)),
        ("Convolutions", convolutions(lines)),
    ):
        if rows:
            out += ["", f"## {title}", "", *rows]
    bad = wrong(lines)
    out += ["", f"## Wrong: {len(bad)}", ""]
    for row in bad:
        why = row.get("error") if row["state"] == "failed" else None
        told = {k: row[k] for k in ("error", "of_bound", "repeats", "portable_equal", "worst", "why") if k in row}
        out.append(f"- {row['stage']}: {row['item']}: {why or told}")
    return "\n".join(out) + "\n"
