"""Results of `pytest benchmarks/`: what is worth keeping of them for years, and tables.

They come as pytest-benchmark's file or, from a GPU, as JSON lines, one per case and provider.  Both keep every round.
A result here is one case and provider per line: median and quartiles, the ratios to the other providers, rates, and
once the machine that it was measured on.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from fastalex.files import write_whole

Result = dict[str, Any]
SCHEMA = 2
OURS = "fastalex"
EAGER = ("eager", "eager-nchw")
KEPT = (
    "operation", "provider", "pass", "dtype", "layout", "shape", "layer", "timing", "gb_per_s", "percent_of_copy",
    "tflop_per_s", "percent_of_matrix_rate", "host_ms", "wall_ms", "peak_bytes", "ratio", "load_average",
)  # fmt: skip


def load(path: Path) -> Result:
    """A result from a file of pytest-benchmark, from JSON lines, or from one that `save` wrote.

    Raises ValueError for anything else, and for a run without a measured case.
    """
    text = path.read_text()
    try:
        content = json.loads(text)
    except ValueError:
        lines = _lines(text)
        if not lines:
            raise ValueError(f"{path} is not JSON") from None
        return reduced(joined(lines))
    if isinstance(content, dict) and "machine_info" in content and "benchmarks" not in content:
        return reduced(joined([content]))
    if isinstance(content, dict) and content.get("schema") == SCHEMA:
        return content
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ValueError(f"{path} was written neither by pytest --benchmark-json nor by fastalex bench report")
    return reduced(content)


def _lines(text: str) -> list[dict[str, Any]]:
    """The JSON lines of a text that are whole: a run may have been stopped while it wrote one."""
    found = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and "machine_info" in content:
            found.append(content)
    return found


def joined(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What pytest-benchmark would have written: of each test the last line, of the machine and sources of the last.

    Lines of failures have no numbers, and do not count.
    """
    last = next((line for line in reversed(lines) if "stats" in line), lines[-1])
    mine = {line["name"]: line for line in lines if line["machine_info"] == last["machine_info"] and "stats" in line}
    rates: dict[str, float] = {}
    measured: dict[str, Any] = {}
    for line in mine.values():
        rates |= line["measured"]["matrix_tflop_per_s"]
        measured = {**line["measured"], "matrix_tflop_per_s": rates}
    add_ratios(list(mine.values()))
    return {
        "datetime": last["datetime"],
        "machine_info": last["machine_info"],
        "measured": measured,
        "benchmarks": list(mine.values()),
    }


def add_ratios(cases: list[dict[str, Any]]) -> None:
    """The ratio of each provider's median to the others' of its case, where the run did not measure them in pairs."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        if "provider" in case["extra_info"]:
            groups.setdefault(case["group"], []).append(case)
    for found in groups.values():
        medians = {case["extra_info"]["provider"]: case["stats"]["median"] for case in found}
        for case in found:
            info = case["extra_info"]
            mine = medians[info["provider"]]
            others = {name: round(median / mine, 3) for name, median in medians.items() if name != info["provider"]}
            info["ratio"] = others | info.get("ratio", {})


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
        others = f"cuDNN {gpu.get('cudnn')}, driver {gpu.get('driver')}"
    else:
        others = f"numba {known.get('numba') or 'not installed'}"
    return f"{device}, torch {known['torch']}, {others}, {result['date']}"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" if round(ratio, 2) >= 1 else f"**{ratio:.2f}**"


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# Columns behind the ratios, each with the key of a case and a format; on a GPU device time is not all there is
LAST = {"load average": ("load_average", ".1f")}
LAST_ON_GPU = {
    "GB/s": ("gb_per_s", ".0f"),
    "% of copy": ("percent_of_copy", ".0f"),
    "TFLOP/s": ("tflop_per_s", ".1f"),
    "% of matmul": ("percent_of_matrix_rate", ".0f"),
    "host, ms": ("host_ms", ".3g"),
    "call, ms": ("wall_ms", ".3g"),
}


def markdown(result: Result) -> str:
    """One line per case, losing ones included: time of fastalex, and of the others over it."""
    others = baselines(result)
    on_gpu = bool(result["machine"]["gpu"])
    last = LAST_ON_GPU if on_gpu else LAST
    head = (
        f"{machine(result)}. Median time of fastalex in channels_last, and the time of each other provider divided by "
        "it: above 1, fastalex is faster; **bold** where it is not. Providers without a suffix have channels_last."
    )
    if on_gpu:
        head += (
            f" Triton {result['machine']['triton']}. Times are the device's, of replays of a CUDA graph with a cold "
            "L2 cache; the last columns are fastalex's: bytes that must be moved and FLOPs per second, in percent of a "
            "measured copy and matrix product, the host's time to launch a run without a graph, and from a call to "
            "its end. `(events)` stands where no graph could be captured, and the host's time may be in it."
        )
    columns = ["case", "fastalex, ms", *(f"{name} / fastalex" for name in others), *last]
    lines = [head, "", f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for group, providers in groups(result).items():
        ours = providers[OURS]
        # between events, what the host needs may be in it
        note = " (events)" if ours.get("timing") == "events" else ""
        cells = [
            group,
            _milliseconds(ours["median"]) + note,
            *(_ratio(ours.get("ratio", {}).get(name)) for name in others),
        ]
        cells += ["-" if key not in ours else format(ours[key], form) for key, form in last.values()]
        lines.append(f"| {' | '.join(cells)} |")
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


def layer(case: Result) -> str:
    """The layer or variant of a case; the name of a published workload that is neither."""
    return case.get("layer") or case["group"].partition("-")[0]


def summarised(result: Result) -> list[Result]:
    """fastalex's cases of the kinds in `SUMMARY`: of each layer and dtype the largest batch, of inference one more."""
    ours = [providers[OURS] for providers in groups(result).values()]
    found = []
    for kind in SUMMARY:
        batches: dict[tuple[str, str], list[Result]] = {}
        for case in ours:
            if (case["operation"], case["pass"]) == kind:
                batches.setdefault((layer(case), case["dtype"]), []).append(case)
        for cases in batches.values():
            cases.sort(key=lambda case: case["shape"][0])
            found += [cases[0], cases[-1]] if kind == ("alexnet", "inference") and len(cases) > 1 else [cases[-1]]
    return found


def summary(result: Result) -> str:
    """The cases of `summarised`, one line each; of a provider with two layouts the faster one."""
    cases = summarised(result)
    on_gpu = bool(result["machine"]["gpu"])
    faster: list[dict[str, float]] = []
    for case in cases:
        ratios: dict[str, float] = {}
        for provider, ratio in case.get("ratio", {}).items():
            name = provider.removesuffix("-nchw")
            ratios[name] = min(ratio, ratios.get(name, ratio))
        faster.append(ratios)
    # a graph's replay takes the device as long as what it was captured from: told by the column of a loop
    others = [
        name
        for name in baselines(result)
        if name not in (OURS, f"{OURS}-graph") and any(name in ratios for ratios in faster)
    ]
    head = (
        f"{machine(result)}. Median time of fastalex, and the time of others divided by it: above 1, fastalex is "
        "faster; **bold** where it is not; - where it was not measured. `eager` is the faster of PyTorch's two "
        "layouts, `compile` is torch.compile."
    )
    columns = ["layer or variant", "dtype", "batch", "fastalex, ms", *others]
    if on_gpu:
        head += (
            " These are times of the device, as a CUDA graph replays the work. `loop`: from a call in Python, without "
            "a graph, until its work has ended, which at small batches is the host's time."
        )
        columns += ["loop, ms", "eager, loop"]
    lines = [head, "", f"| | {' | '.join(columns)} |", "|---|---|---|---:|" + "---:|" * (len(columns) - 3)]
    providers = groups(result)
    for case, ratios in zip(cases, faster, strict=True):
        kind = SUMMARY[case["operation"], case["pass"]]
        cells = [kind, layer(case), case["dtype"], str(case["shape"][0]), _milliseconds(case["median"])]
        cells += [_ratio(ratios.get(name)) for name in others]
        if on_gpu:
            loop = case.get("wall_ms")
            eager = [c["wall_ms"] for name, c in providers[case["group"]].items() if name in EAGER and "wall_ms" in c]
            cells += [
                "-" if loop is None else _milliseconds(loop),
                _ratio(min(eager) / loop if loop and eager else None),
            ]
        lines.append(f"| {' | '.join(cells)} |")
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


if __name__ == "__main__":  # where the command line's packages are missing
    print(markdown(load(Path(sys.argv[1]))))
