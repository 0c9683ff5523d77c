"""The `contest` fixture, and what the JSON says about the machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalex
from benchmarks import gpu, harness, plan
from benchmarks.gpu import Prepare
from benchmarks.harness import Case, Measured, Race, WrongResult
from benchmarks.lines import Lines, stats
from fastalex import results

Outcome = tuple[Race, dict[str, Measured | Exception]]
OUTCOMES = pytest.StashKey[dict[tuple[Any, Case], Outcome]]()
EXECUTED = pytest.StashKey[list[str]]()
ON_GPU = pytest.StashKey["OnGPU"]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[EXECUTED] = []
    config.stash[OUTCOMES] = {}
    config.stash[ON_GPU] = OnGPU(config)
    config.pluginmanager.register(Executed(config.stash[EXECUTED]))
    # one: with more, eager's many small regions wait for threads that a shared machine has descheduled
    torch.set_num_threads(1)


class Executed:
    """Keeps the names of the tests that ran."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            self.names.append(report.nodeid)


def pytest_report_header(config: pytest.Config) -> str:
    if harness.device() == "cuda":
        return f"benchmarks: on the GPU, device time, L2 cache cleared before each run; {lines_file(config)}"
    return (
        "benchmarks: NO GPU HERE. Providers for CPUs at small batches, one thread, paired rounds: "
        "no time below is the speed of a Triton kernel"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="on a CPU also batches of 32, with torch.compile: minutes more; on a GPU every case and provider: hours",
    )
    parser.addoption("--providers", help="only these, separated by commas")
    parser.addoption(
        "--lines",
        type=Path,
        help="on a GPU: the file that gets a JSON line per provider as it finishes, and whose providers are not "
        "measured again on the same machine with the same sources and versions (runs/bench/lines.jsonl)",
    )


def lines_file(config: pytest.Config) -> Path:
    return config.getoption("--lines") or Path("runs/bench/lines.jsonl")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = config.getoption("--providers")

    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            return False
        return names is None or not is_contest(item) or run_of(item)[1] in names.split(",")

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]
    for item in items:
        if is_contest(item):
            item.add_marker(pytest.mark.benchmark(timer=harness.REPLAY))
    if harness.device() == "cuda":
        # what compiles for long comes last: a run that is cut short has most results then
        items.sort(key=lambda item: plan.seconds(*run_of(item)) if is_contest(item) else 0)


def is_contest(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and "contest" in item.fixturenames


def run_of(item: pytest.Item) -> tuple[Case, str]:
    """Case and provider of a test."""
    parameters = item.callspec.params  # type: ignore[attr-defined]
    return parameters["case"], parameters["provider"]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    if harness.device() != "cuda":
        return []
    return plan.table([run_of(item) for item in items if is_contest(item) and not item.get_closest_marker("skip")])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which every case was skipped is no success, and leaves no JSON behind."""
    if (
        exitstatus == pytest.ExitCode.OK
        and not session.config.stash[EXECUTED]
        and not session.config.option.collectonly
    ):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_unconfigure(config: pytest.Config) -> None:
    # after pytest-benchmark's report, which asks for the machine
    if ON_GPU in config.stash:
        config.stash[ON_GPU].worker.stop()


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case, str, Prepare], None]:
    """contest(case, provider, prepare): check and time one provider of a case.

    prepare(case, names) -> Race, a function of a module, or a partial of one: on a GPU another process calls it.
    On a CPU the first provider of a case to come has all of them measured, those that this session selected; the
    others find their times there.  Raises what the provider raised.
    """
    outcomes = request.config.stash[OUTCOMES]
    function = request.function  # type: ignore[attr-defined]

    def on_a_cpu(case: Case, provider: str, prepare: Prepare) -> tuple[dict[str, Any], list[float]]:
        if (function, case) not in outcomes:
            with harness.tf32(case.dtype):
                race = prepare(case, selected(request.session.items, function, case))
                outcomes[function, case] = race, harness.side_by_side(race, timed=not benchmark.disabled)
        race, measured = outcomes[function, case]
        mine = measured[provider]
        if isinstance(mine, Exception):
            raise mine
        return {} if benchmark.disabled else harness.details(case, provider, race, mine, "cpu"), mine.seconds

    def run(case: Case, provider: str, prepare: Prepare) -> None:
        benchmark.group = group(function, case)
        if harness.device() == "cuda":
            info, seconds = request.config.stash[ON_GPU].measure(request.node, prepare, timed=not benchmark.disabled)
        else:
            info, seconds = on_a_cpu(case, provider, prepare)
        benchmark.extra_info.update(info)
        harness.feed(benchmark, seconds)

    return run


def group(function: Callable[..., Any], case: Case) -> str:
    name = function.__name__.removeprefix("test_")
    return f"{name}-{replace(case, passes='') if case.passes in name else case}"


def selected(items: list[pytest.Item], function: Callable[..., Any], case: Case) -> list[str]:
    """The providers of this case that will run."""
    return [
        run_of(item)[1]
        for item in items
        if isinstance(item, pytest.Function)
        and item.function is function
        and run_of(item)[0] == case
        and item.get_closest_marker("skip") is None
    ]


# --------------------------------------------------------------------------------------------------------- on a GPU
class OnGPU:
    """What a run on a GPU has: the process that measures, the file of lines, and the time that is left."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.worker = gpu.Worker(lines_file(config).with_suffix(".log"))
        self.lines: Lines | None = None
        self.waiting: list[pytest.Function] = []
        self.spent = 0.0
        self.modelled = 0.0
        self.found: dict[str, Any] | None = None
        self.measured: dict[str, Any] = {"copy_gb_per_s": None, "matrix_tflop_per_s": {}, "clocks": None}

    def machine(self) -> dict[str, Any]:
        """The GPU, asked once; its name alone where no process can use it."""
        if self.found is None:
            answer = self.worker.ask(gpu.machine, limit=60)
            self.found = answer.value or {"name": f"GPU that does not work: {answer.kind}: {answer.error}"}
        return self.found

    def begin(self, session: pytest.Session, timed: bool) -> Lines:
        """Read what has been measured already, and compile the kernels of the rest."""
        if self.lines is None:
            self.lines = Lines(lines_file(self.config), versions(self.machine()))
            if not timed:
                self.lines.done.clear()
            self.waiting = [
                item
                for item in session.items
                if isinstance(item, pytest.Function)
                and is_contest(item)
                and item.get_closest_marker("skip") is None
                and item.name not in self.lines.done
            ]
            requests = kernels_of(self.waiting)
            if len(requests) > 1:
                processes = min(plan.MOST_PROCESSES, os.cpu_count() or 1)
                self.say(f"compiling the kernels of {len(requests)} cases, {processes} at the same time")
                begin = time.monotonic()
                gpu.compile_first(requests, self.worker.log, processes, limit=180)
                self.say(f"compiled in {time.monotonic() - begin:.0f} s")
        return self.lines

    def measure(self, item: pytest.Function, prepare: Prepare, timed: bool) -> tuple[dict[str, Any], list[float]]:
        """extra_info and seconds of one test, from this run or an earlier one."""
        lines = self.begin(item.session, timed)
        known = lines.done.get(item.name)
        if known is not None:
            self.remember(known["measured"])
            return known["extra_info"], known["seconds"]
        case, provider = run_of(item)
        names = selected(item.session.items, item.function, case)
        key = f"{item.function.__module__} {item.function.__name__} {case}"
        begin = time.monotonic()
        answer = self.worker.ask(
            gpu.measure, key, prepare, case, names, provider, timed, limit=plan.limit(case, provider)
        )
        self.spent += time.monotonic() - begin
        self.modelled += plan.seconds(case, provider)
        self.waiting.remove(item)
        where = group(item.function, case)
        if answer.kind:
            self.say(f"{where} {provider}: {answer.kind}: {' '.join(answer.error.split())[:200]}")
            if timed:
                lines.add(item.name, where, provider=provider, error=f"{answer.kind}: {answer.error}")
            if answer.kind == "NotApplicable":
                pytest.skip(answer.error)
            raise (
                WrongResult(answer.error) if answer.kind == "WrongResult" else Failed(f"{answer.kind}: {answer.error}")
            )
        info, seconds = answer.value["info"], [float(f"{s:.5g}") for s in answer.value["seconds"]]
        if timed:
            self.remember(answer.value["measured"])
            lines.add(
                item.name,
                where,
                stats=stats(seconds),
                extra_info=info,
                measured=answer.value["measured"],
                seconds=seconds,
            )
            self.say(f"{where} {provider}: {told(info, stats(seconds)['median'])}")
        return info, seconds

    def remember(self, measured: dict[str, Any]) -> None:
        rates = {**self.measured["matrix_tflop_per_s"], **measured["matrix_tflop_per_s"]}
        self.measured = {**measured, "matrix_tflop_per_s": rates}

    def say(self, text: str) -> None:
        """A line on the terminal, with the time that is left."""
        left = sum(plan.seconds(*run_of(item)) for item in self.waiting)
        if self.modelled:
            left *= self.spent / self.modelled
        capture: Any = self.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n[{len(self.waiting)} to come, {left / 60:.1f} min] {text}", end="", flush=True)


class Failed(RuntimeError):
    """A provider that failed in the process that measures; its traceback is in that process's log."""


def told(info: dict[str, Any], median: float) -> str:
    """One provider's numbers for the terminal."""
    parts = [f"{1e3 * median:.4g} ms" + ("" if info["timing"] == "graph" else f" ({info['timing']})")]
    for rate, unit, percent, bound in (
        ("gb_per_s", "GB/s", "percent_of_copy", "copy"),
        ("tflop_per_s", "TFLOP/s", "percent_of_matrix_rate", "matmul"),
    ):
        if rate in info:
            parts.append(f"{info[rate]:.4g} {unit}, {info[percent]:.0f} % of {bound}")
    if info["host_ms"] is not None:
        parts.append(f"host {info['host_ms']:.3g} ms, call {info['wall_ms']:.3g} ms")
    return "; ".join(parts)


def kernels_of(items: list[pytest.Function]) -> list[tuple[Prepare, Case, list[str]]]:
    """What must run once so that all kernels of fastalex are compiled, what takes longest first."""
    found: dict[tuple[str, Case], tuple[Prepare, Case, list[str]]] = {}

    def ask(case: Case, provider: str, prepare: Prepare) -> None:
        found.setdefault((item.function.__name__, case), (prepare, case, []))[2].append(provider)

    for item in items:
        case, provider = run_of(item)
        # a graph has the same kernels; a test with fixtures of its own works on the host
        if (provider.startswith("fastalex") and provider != "fastalex-graph") and set(
            inspect.signature(item.function).parameters
        ) == set(CONTEST):
            item.function(case=case, provider=provider, contest=ask)
    order = {"lrn_max_pool": 0, "alexnet": 2, "lpips": 2}
    return sorted(found.values(), key=lambda request: order.get(request[1].operation, 1))


CONTEST = ("case", "provider", "contest")


# ------------------------------------------------------------------------------------------------------- the machine
def versions(found: dict[str, Any] | None) -> dict[str, Any]:
    """What a result depends on.  found: the GPU."""
    return {
        "processor": processor(),
        "gpu": found,
        "torch": torch.__version__,
        "triton": version("triton"),
        "numba": version("numba"),
        "fastalex": commit(),
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(versions(config.stash[ON_GPU].machine() if harness.device() == "cuda" else None))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Clocks and rates change while a machine works, so they do not belong to what identifies it."""
    if harness.device() == "cuda":
        output_json["measured"] = config.stash[ON_GPU].measured
        results.add_ratios(output_json["benchmarks"])
        return
    found = {b.extra_info["dtype"] for b in benchmarks if b.extra_info.get("dtype") in harness.DTYPES}
    output_json["measured"] = {
        "copy_gb_per_s": round(harness.copy_rate("cpu") / 1e9, 2),
        "matrix_tflop_per_s": {dtype: round(harness.matrix_rate("cpu", dtype) / 1e12, 3) for dtype in sorted(found)},
        "clocks": None,
    }


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The checkout that fastalex was imported from; `sources` tells apart what the commit does not."""
    root = Path(fastalex.__file__).resolve().parents[1]
    found = {"sources": sources(root)}
    try:
        answers = [
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None, **found}
    return {"commit": answers[0].strip(), "changed": bool(answers[1].strip()), **found}


def sources(root: Path) -> str:
    """A hash of the kernels, the library and the suites."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "fastalex"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
