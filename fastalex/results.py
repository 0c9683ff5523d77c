"""Results of `pytest benchmarks/ --benchmark-json`: what is worth keeping of them for years, and tables.

pytest-benchmark's file keeps every round.  A result here is one case and provider per line: median and quartiles, the
ratios to the other providers, rates, and once the machine that it was measured on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastalex.files import write_whole

Result = dict[str, Any]
SCHEMA = 2
OURS = "fastalex"
KEPT = (
    "operation", "provider", "pass", "dtype", "layout", "shape", "layer", "timing", "gb_per_s", "percent_of_copy",
    "tflop_per_s", "percent_of_matrix_rate", "peak_bytes", "ratio", "load_average",
)  # fmt: skip


def load(path: Path) -> Result:
    """A result from a file of pytest-benchmark, or from one that `save` wrote.

    Raises ValueError for anything else, and for a run without a measured case.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    if isinstance(content, dict) and content.get("schema") == SCHEMA:
        return content
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ValueError(f"{path} was written neither by pytest --benchmark-json nor by fastalex bench report")
    return reduced(content)


def reduced(full: dict[str, Any]) -> Result:
    """The date, the machine, and for each case and provider what is worth keeping."""
    measured = [case for case in full["benchmarks"] if "provider" in case["extra_info"]]
    if not measured:
        raise ValueError("the file holds no case of the fastalex suites")
    machine = full["machine_info"]
    info = measured[0]["extra_info"]
    return {
        "schema": SCHEMA,
        "date": full["datetime"][:10],
        "device": info["device"],
        "machine": {key: machine.get(key) for key in ("processor", "gpu", "torch", "triton", "fastalex")},
        "threads": info.get("threads"),
        "measured": full.get("measured"),
        "cases": [_case(case) for case in measured],
    }


def _case(case: dict[str, Any]) -> Result:
    stats, info = case["stats"], case["extra_info"]
    milliseconds = {name: float(f"{1e3 * stats[name]:.4g}") for name in ("median", "q1", "q3")}
    known = {key: info[key] for key in KEPT if info.get(key) not in (None, {}, "")}
    return {"group": case["group"], **known, **milliseconds, "rounds": stats["rounds"]}


def save(result: Result, folder: Path) -> Path:
    """Write DATE-DEVICE.json, one case a line; returns where."""
    gpu = result["machine"]["gpu"]
    device = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-") if gpu else "cpu"
    path = folder / f"{result['date']}-{device}.json"
    head = json.dumps({key: value for key, value in result.items() if key != "cases"})
    lines = ",\n".join(json.dumps(case) for case in result["cases"])
    write_whole(path, f'{head[:-1]}, "cases": [\n{lines}\n]}}\n')
    return path


def groups(result: Result) -> dict[str, dict[str, Result]]:
    """{case: {provider: its numbers}} for the cases in which fastalex took part."""
    found: dict[str, dict[str, Result]] = {}
    for case in result["cases"]:
        found.setdefault(case["group"], {})[case["provider"]] = case
    return {group: providers for group, providers in found.items() if OURS in providers}


def baselines(result: Result) -> list[str]:
    """The other providers, in the order of their appearance."""
    return list(dict.fromkeys(case["provider"] for case in result["cases"] if case["provider"] != OURS))


def machine(result: Result) -> str:
    """One line: the device, versions and date."""
    known = result["machine"]
    gpu = known["gpu"]
    device = gpu["name"] if gpu else f"{known['processor']}, {result['threads']} thread"
    versions = f"torch {known['torch']}" + (f", cuDNN {gpu['cudnn']}, driver {gpu['driver']}" if gpu else "")
    return f"{device}, {versions}, {result['date']}"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" if round(ratio, 2) >= 1 else f"**{ratio:.2f}**"


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(result: Result) -> str:
    """One line per case, losing ones included: time of fastalex, and of the others over it."""
    others = baselines(result)
    lines = [
        f"{machine(result)}. Median time of fastalex in channels_last, and the time of each other provider divided by "
        "it: above 1, fastalex is faster; **bold** where it is not. Providers without a suffix have channels_last.",
        "",
        f"| case | fastalex, ms | {' | '.join(f'{name} / fastalex' for name in others)} | load average |",
        "|---|---:|" + "---:|" * (len(others) + 1),
    ]
    for group, providers in groups(result).items():
        ours = providers[OURS]
        ratios = [ours.get("ratio", {}).get(name) for name in others]
        cells = [_ratio(ratio) for ratio in ratios]
        load_average = ours.get("load_average")
        last = "-" if load_average is None else f"{load_average:.1f}"
        lines.append(f"| {group} | {_milliseconds(ours['median'])} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


def replace_table(path: Path, result: Result) -> None:
    """Put the table between the markers of a Markdown file.  Raises ValueError unless each stands there once."""
    kind = "gpu" if result["machine"]["gpu"] else "cpu"
    begin, end = f"<!-- {kind} results -->\n", f"<!-- end of {kind} results -->"
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path} must contain these two lines once each: {begin.strip()} and {end}")
    before, rest = text.split(begin)
    write_whole(path, f"{before}{begin}{markdown(result)}\n{end}{rest.split(end)[1]}")
