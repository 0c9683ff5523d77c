"""The `contest` fixture, and what the JSON says about the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalex
from benchmarks import harness
from benchmarks.harness import Case, Measured, Race

Prepare = Callable[[Case, list[str]], Race]
Outcome = tuple[Race, dict[str, Measured | Exception]]
OUTCOMES = pytest.StashKey[dict[tuple[Any, Case], Outcome]]()
EXECUTED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[EXECUTED] = []
    config.stash[OUTCOMES] = {}
    config.pluginmanager.register(Executed(config.stash[EXECUTED]))
    # one: with more, eager's many small regions wait for threads that a shared machine has descheduled
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True


class Executed:
    """Keeps the names of the tests that ran."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            self.names.append(report.nodeid)


def pytest_report_header(config: pytest.Config) -> str:
    if harness.device() == "cuda":
        return f"benchmarks: {torch.cuda.get_device_name()}, device time, L2 cache cleared before each run"
    return (
        "benchmarks: NO GPU HERE. Providers for CPUs at small batches, one thread, paired rounds: "
        "no time below is the speed of a Triton kernel"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="on a CPU also batches of 32, with torch.compile: minutes more"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    for item in items:
        if "contest" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=harness.REPLAY))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which every case was skipped is no success, and leaves no JSON behind."""
    if (
        exitstatus == pytest.ExitCode.OK
        and not session.config.stash[EXECUTED]
        and not session.config.option.collectonly
    ):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case, str, Prepare], None]:
    """contest(case, provider, prepare): check and time one provider of a case.

    The first provider of a case to come has all of them measured, those that this session selected; the others find
    their times there.  prepare(case, names) -> Race.  Raises what the provider raised.
    """
    outcomes = request.config.stash[OUTCOMES]
    function = request.function  # type: ignore[attr-defined]

    def run(case: Case, provider: str, prepare: Prepare) -> None:
        if (function, case) not in outcomes:
            with harness.tf32(case.dtype):
                race = prepare(case, selected(request.session.items, function, case))
                outcomes[function, case] = race, harness.measure(race, harness.device(), timed=not benchmark.disabled)
        race, measured = outcomes[function, case]
        mine = measured[provider]
        if isinstance(mine, Exception):
            raise mine
        if not benchmark.disabled:
            name = function.__name__.removeprefix("test_")
            benchmark.group = f"{name}-{replace(case, passes='') if case.passes in name else case}"
            benchmark.extra_info.update(harness.details(case, provider, race, mine, harness.device()))
        harness.feed(benchmark, mine.seconds)

    return run


def selected(items: list[pytest.Item], function: Callable[..., Any], case: Case) -> list[str]:
    """The providers of this case that will run."""
    return [
        str(item.callspec.params["provider"])
        for item in items
        if isinstance(item, pytest.Function)
        and item.function is function
        and item.callspec.params.get("case") == case
        and item.get_closest_marker("skip") is None
    ]


# ------------------------------------------------------------------------------------------------------- the machine
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["processor"] = processor()
    machine_info["gpu"] = gpu() if harness.device() == "cuda" else None
    machine_info["torch"] = torch.__version__
    machine_info["triton"] = version("triton")
    machine_info["numba"] = version("numba")
    machine_info["fastalex"] = commit()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Clocks and rates change while a machine works, so they do not belong to what identifies it."""
    found = {b.extra_info["dtype"] for b in benchmarks if b.extra_info.get("dtype") in harness.DTYPES}
    where = harness.device()
    output_json["measured"] = {
        "copy_gb_per_s": round(harness.copy_rate(where) / 1e9, 2),
        "matrix_tflop_per_s": {dtype: round(harness.matrix_rate(where, dtype) / 1e12, 3) for dtype in sorted(found)},
        "clocks": nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit") if where == "cuda" else None,
    }


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": nvidia_smi("driver_version"),
    }


def nvidia_smi(fields: str) -> str | None:
    """The fields of the current GPU as nvidia-smi prints them, None where it cannot be asked."""
    index = str(torch.cuda.current_device())
    try:
        return subprocess.run(
            ["nvidia-smi", "-i", index, f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The checkout that fastalex was imported from."""
    root = Path(fastalex.__file__).resolve().parents[1]
    try:
        answers = [
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}
    return {"commit": answers[0].strip(), "changed": bool(answers[1].strip())}
