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
        "machine": {key: machine.get(key) for key in ("processor", "gpu", "torch", "triton", "numba", "fastalex")},
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
    if gpu:
        others = f"cuDNN {gpu['cudnn']}, driver {gpu['driver']}"
    else:
        others = f"numba {known.get('numba') or 'not installed'}"
    return f"{device}, torch {known['torch']}, {others}, {result['date']}"


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


# What the summary shows of a result, by operation and pass
SUMMARY = {
    ("alexnet", "inference"): "AlexNet, inference",
    ("alexnet", "step"): "AlexNet, training step",
    ("lrn", "forward"): "LRN, forward",
    ("lrn", "both"): "LRN, forward + backward",
    ("lrn_max_pool", "both"): "LRN + max-pool, forward + backward",
    ("max_pool", "both"): "max-pool, forward + backward",
}


def summarised(result: Result) -> list[Result]:
    """fastalex's cases of the kinds in `SUMMARY`: of each layer and dtype the largest batch, of inference one more."""
    ours = [providers[OURS] for providers in groups(result).values()]
    found = []
    for kind in SUMMARY:
        batches: dict[tuple[str, str], list[Result]] = {}
        for case in ours:
            if (case["operation"], case["pass"]) == kind:
                batches.setdefault((case["layer"], case["dtype"]), []).append(case)
        for cases in batches.values():
            cases.sort(key=lambda case: case["shape"][0])
            found += [cases[0], cases[-1]] if kind == ("alexnet", "inference") and len(cases) > 1 else [cases[-1]]
    return found


def summary(result: Result) -> str:
    """The cases of `summarised`, one line each; of a provider with two layouts the faster one."""
    cases = summarised(result)
    faster: list[dict[str, float]] = []
    for case in cases:
        ratios: dict[str, float] = {}
        for provider, ratio in case.get("ratio", {}).items():
            name = provider.removesuffix("-nchw")
            ratios[name] = min(ratio, ratios.get(name, ratio))
        faster.append(ratios)
    others = [name for name in baselines(result) if name != OURS and any(name in ratios for ratios in faster)]
    lines = [
        f"{machine(result)}. Median time of fastalex, and the time of others divided by it: above 1, fastalex is "
        "faster; **bold** where it is not; - where it was not measured. `eager` is the faster of PyTorch's two "
        "layouts, `compile` is torch.compile.",
        "",
        f"| | layer or variant | dtype | batch | fastalex, ms | {' | '.join(others)} |",
        "|---|---|---|---:|" + "---:|" * (len(others) + 1),
    ]
    for case, ratios in zip(cases, faster, strict=True):
        kind = SUMMARY[case["operation"], case["pass"]]
        cells = [kind, case["layer"], case["dtype"], str(case["shape"][0]), _milliseconds(case["median"])]
        lines.append(f"| {' | '.join(cells + [_ratio(ratios.get(name)) for name in others])} |")
    return "\n".join(lines)


def replace_tables(readme: Path, result: Result) -> list[Path]:
    """Renew the summary in a checkout's README.md and the whole table in docs/benchmarks.md; returns their paths.

    Raises ValueError, before it writes, unless both have each marker of a table once.
    """
    kind = "gpu" if result["machine"]["gpu"] else "cpu"
    begin, end = f"<!-- {kind} results -->\n", f"<!-- end of {kind} results -->"
    texts = {}
    for path, table in ((readme, summary(result)), (readme.parent / "docs" / "benchmarks.md", markdown(result))):
        text = path.read_text()
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{path} must contain these two lines once each: {begin.strip()} and {end}")
        before, rest = text.split(begin)
        texts[path] = f"{before}{begin}{table}\n{end}{rest.split(end)[1]}"
    for path, text in texts.items():
        write_whole(path, text)
    return list(texts)
