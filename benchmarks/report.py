"""From a benchmark's JSON to a small dated result and a table.

    pytest benchmarks/ --benchmark-only --benchmark-json=full.json
    python -m benchmarks.report full.json        # writes benchmarks/results/DATE-cpu.json and the README's table

pytest-benchmark's file keeps every round; what is worth keeping for years is the medians, their ratio, and the machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parents[1] / "README.md"
MARKERS = ("<!-- cpu results -->\n", "<!-- end of cpu results -->")


def reduced(full: dict[str, Any]) -> dict[str, Any]:
    """The date, the machine, and for each case its group, medians in ms, their paired ratio and the load average."""
    cases = full["benchmarks"]
    if not cases:
        raise ValueError("the file holds no benchmark")
    shared = {key: cases[0]["extra_info"][key] for key in ("processor", "threads", "torch")}
    kept = ("ratio", "ours_ms", "peer_ms", "load_average")
    return {
        "date": full["datetime"][:10],
        "commit": full["commit_info"]["id"],
        **shared,
        "cases": [
            {"name": c["name"], "group": c["group"], **{key: c["extra_info"][key] for key in kept}} for c in cases
        ],
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a table, one line per case, losing ones included."""
    lines = [
        f"{result['processor']}, {result['threads']} thread, torch {result['torch']}, {result['date']}: "
        "median of paired rounds against eager PyTorch in channels_last; more than 1 means that ours is faster.",
        "",
        "| case | eager / ours | ours, ms | eager, ms | load average |",
        "|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        name = case["name"].removeprefix("test_").replace("_", " ")
        load = max(case["load_average"])
        lines.append(f"| {name} | {case['ratio']:.2f} | {case['ours_ms']:.1f} | {case['peer_ms']:.1f} | {load:.1f} |")
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """The text with the table between the two markers in the place of what stood there."""
    before, rest = text.split(MARKERS[0])
    return f"{before}{MARKERS[0]}{table}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}"


def main(path: str) -> None:
    result = reduced(json.loads(Path(path).read_text()))
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{result['date']}-cpu.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    README.write_text(with_table(README.read_text(), markdown(result)))
    print(f"written: {target}, and the table in {README.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
