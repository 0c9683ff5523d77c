"""How a provider is timed on a GPU, in a process of its own.

The time is the device's: a run is captured in a CUDA graph and the replays are timed, each with the L2 cache cleared
before it.  What the host needs to launch a run, and what a caller waits for it, are recorded beside that.

An illegal access, or a capture that fails, leaves a process in which nothing works any more.  So pytest's process does
not touch the GPU: a `Worker` does, one provider after the other, and is replaced when one of them broke or hung it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import math
import multiprocessing
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import DTYPES, Case, Expected, Measured, NotApplicable, Race, Run, check, details
from fastalex import timing

Prepare = Callable[[Case, list[str]], Race]

EVENT_MILLISECONDS = 40
LEAST_ROUNDS = 10
CALLS, CALL_SECONDS = 20, 0.2  # for the times of single calls
START_SECONDS = 120  # for a process to import PyTorch and find its GPU


# ---------------------------------------------------------------------------------------------------- one provider
def device_seconds(run: Run, replayed: bool = False) -> tuple[list[float], str, str | None]:
    """Seconds of each run on the device, "graph" or "events" for how they were taken, and why it was not a graph.

    replayed: the run is the replay of a graph already.
    """
    by_events = between_events(run)
    if replayed:
        return by_events, "graph", None
    try:
        graph, _ = timing.capture(run)
    except timing.CaptureError as error:
        return by_events, "events", str(error)
    return [1e-3 * milliseconds for milliseconds in timing.replays(graph)], "graph", None


def between_events(run: Run) -> list[float]:
    """Seconds of each launched run: where the device is faster than the host, the host's."""
    from triton.testing import do_bench

    found = do_bench(run, warmup=EVENT_MILLISECONDS / 4, rep=EVENT_MILLISECONDS, return_mode="all")
    if len(found) < LEAST_ROUNDS:
        found = do_bench(run, warmup=1, rep=math.ceil(1.2 * LEAST_ROUNDS * max(found)), return_mode="all")
    return [1e-3 * milliseconds for milliseconds in found]


def call_seconds(run: Run) -> tuple[float, float]:
    """Of a call: until it returns, and until its work on the device has ended.  Medians."""
    returned: list[float] = []
    ended: list[float] = []
    while len(ended) < CALLS and sum(ended) < CALL_SECONDS:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        returned.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        ended.append(time.perf_counter() - begin)
    return statistics.median(returned), statistics.median(ended)


def peak_bytes(run: Run, before: int) -> int:
    """The most device memory during a run, above the `before` bytes that were there without its provider."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measured(race: Race, name: str, expected: Expected, timed: bool = True) -> Measured:
    """Build, check and time one provider, on the current stream.  Raises whatever the provider raised."""
    if "torch._dynamo" in sys.modules:
        # what was compiled last holds its model; importing the compiler takes seconds
        torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with race.within(name):
        run = race.builders[name]()
        check(race.observe(run()), expected)
        if not timed:
            return Measured([], "unmeasured")
        peak = peak_bytes(run, before)
        host, wall = call_seconds(run)
        seconds, how, uncaptured = device_seconds(run, name in race.replayed)
    return Measured(seconds, how, peak, {}, host, wall, uncaptured)


# ------------------------------------------------------------------------------------------- requests to a worker
@dataclass
class Prepared:
    """A case as its worker keeps it until the next one comes."""

    key: str
    race: Race
    expected: Expected | None
    # of a race for the host's time, whose providers take turns
    outcomes: dict[str, Measured | Exception]


_prepared: list[Prepared] = []


def prepared(key: str, prepare: Prepare, case: Case, names: list[str], timed: bool) -> Prepared:
    if not _prepared or _prepared[0].key != key:
        _prepared.clear()
        race = prepare(case, names)
        if race.host:
            _prepared.append(Prepared(key, race, None, harness.side_by_side(race, timed)))
        else:
            # all of cuDNN's algorithms are tried for those that are timed, not for the reference
            torch.backends.cudnn.benchmark = False
            try:
                _prepared.append(Prepared(key, race, race.expected(), {}))
            finally:
                torch.backends.cudnn.benchmark = True
    return _prepared[0]


def measure(key: str, prepare: Prepare, case: Case, names: list[str], name: str, timed: bool) -> dict[str, Any]:
    """Check and time one provider of a case: {"info": extra_info, "seconds": of each round, "measured": rates}."""
    with harness.tf32(case.dtype):
        known = prepared(key, prepare, case, names, timed)
        if known.expected is None:
            found = known.outcomes[name]
        else:
            found = measured(known.race, name, known.expected, timed)
    if isinstance(found, Exception):
        raise found
    if not timed:
        return {"info": {}, "seconds": [], "measured": None}
    return {"info": details(case, name, known.race, found, "cuda"), "seconds": found.seconds, "measured": rates(case)}


def rates(case: Case) -> dict[str, Any]:
    """What this GPU can do, measured now, and its clocks."""
    dtype = case.dtype
    return {
        "copy_gb_per_s": round(harness.copy_rate("cuda") / 1e9, 2),
        "matrix_tflop_per_s": {dtype: round(harness.matrix_rate("cuda", dtype) / 1e12, 3)} if dtype in DTYPES else {},
        "clocks": clocks(),
    }


def run_once(prepare: Prepare, case: Case, names: list[str]) -> None:
    """Build and run providers, so that their kernels lie in Triton's cache.  An exception waits for the timed run."""
    for name in names:
        with contextlib.suppress(Exception), harness.tf32(case.dtype):
            race = prepare(case, [name])
            with race.within(name):
                race.builders[name]()()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()


def machine() -> dict[str, Any]:
    """The GPU, its driver and libraries."""
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


@functools.cache
def clocks() -> str | None:
    """As they were when this process first timed something."""
    return nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,power.limit")


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


# ---------------------------------------------------------------------------------------------------- in the worker
@dataclass
class Answer:
    """What a request returned, or the name of the exception and its text.  broken: the process is of no use now."""

    value: Any = None
    kind: str = ""
    error: str = ""
    broken: bool = False


def answer(function: Callable[..., Any], arguments: Sequence[Any]) -> Answer:
    try:
        value = function(*arguments)
    except NotApplicable as error:
        return Answer(kind="NotApplicable", error=str(error))
    except Exception as error:
        traceback.print_exc()
        return Answer(None, type(error).__name__, str(error)[:2000], isinstance(error, timing.CaptureError) or lost())
    return Answer(value, broken=isinstance(value, dict) and bool(value.get("info", {}).get("uncaptured")))


def lost() -> bool:
    """Whether an error has made the GPU useless for this process, as an illegal access does."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def serve(pipe: Any, log: Path) -> None:
    """Answer requests (function, arguments) until the other end is closed or something broke this process.

    Everything runs on one stream, on which graphs can be captured.
    """
    with log.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    faulthandler.enable()
    torch.set_num_threads(1)
    # what is imported by now is never garbage: collecting takes milliseconds then
    gc.freeze()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        function, arguments = pipe.recv()
        with timing.side_stream():
            while True:
                found = answer(function, arguments)
                pipe.send(found)
                if found.broken:
                    break
                function, arguments = pipe.recv()
    sys.stdout.flush()
    sys.stderr.flush()
    # destructors of graphs and tensors would meet whatever broke it
    os._exit(0)


# ---------------------------------------------------------------------------------------------------- in pytest
class Worker:
    """A process that answers requests; another one takes its place when it broke, died or took too long."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: Any = None
        self.pipe: Any = None

    def ask(self, function: Callable[..., Any], *arguments: Any, limit: float) -> Answer:
        """What the function returned there, within `limit` seconds."""
        if self.process is None:
            limit += START_SECONDS
            self.start()
        try:
            self.pipe.send((function, arguments))
            if not self.pipe.poll(limit):
                self.stop()
                return Answer(kind="TimeoutError", error=f"stopped after {limit:.0f} s")
            found = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            self.stop()
            return Answer(kind="Died", error=f"its process ended with code {code}; what it said is in {self.log}")
        if found.broken:
            self.stop()
        return found

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.log), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.kill()
            self.process.join()
            self.process = None


def compile_first(requests: Sequence[tuple[Prepare, Case, list[str]]], log: Path, processes: int, limit: float) -> None:
    """Run each request once, several at the same time, so that nothing is compiled while something is timed."""
    waiting: queue.SimpleQueue[tuple[Prepare, Case, list[str]]] = queue.SimpleQueue()
    for request in requests:
        waiting.put(request)

    def drain() -> None:
        worker = Worker(log)
        with contextlib.suppress(queue.Empty):
            while True:
                worker.ask(run_once, *waiting.get_nowait(), limit=limit)
        worker.stop()

    threads = [threading.Thread(target=drain) for _ in range(min(processes, len(requests)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
