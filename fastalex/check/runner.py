"""Stages in processes of their own, their results as lines of JSON while they come.

A stage is a list of named items.  Before an item begins, and when it has ended, a line is written; so an item that
takes its process with it (a broken CUDA context, a crash, a hang) is known by name, costs itself alone, and a second
run goes on behind it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastalex import timing

Row = dict[str, Any]
BROKEN = 77  # the exit code of a stage whose CUDA context is of no use any more
POLL_SECONDS = 0.2
# Starting Python, importing torch and the first CUDA call, before an item's own seconds count.
START_SECONDS = 60.0


@dataclass(frozen=True)
class Context:
    """Where a stage runs.

    timed: False while everything is compiled and run once.  small: shapes for a CPU.
    """

    device: str
    timed: bool = True

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    def milliseconds(self, run: Callable[[], Any]) -> float | None:
        """Median time of a run: of the device from a CUDA graph, on a CPU of the host; None if nothing is timed."""
        if not self.timed:
            run()
            return None
        if self.device == "cuda":
            return timing.device_milliseconds(run)
        run()
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)


Item = Callable[[], Row]


@dataclass(frozen=True)
class Stage:
    """items(context): what is done, by name.  Names with the same text before their first "/" share a process.

    seconds: what one item may take, compilation included.  needed: seconds that must be left for the stage to begin.
    times: the stage measures time, so nothing runs beside it; its items run once, untimed, before all timed stages,
    so that everything is compiled by then, unless `warm` is False.
    processes: among how many its items are divided at most, where it measures no time.
    interpreted: on a CPU its kernels run in Triton's interpreter.
    """

    name: str
    items: Callable[[Context], Mapping[str, Item]]
    seconds: float = 60.0
    needed: float = 5.0
    times: bool = False
    warm: bool = True
    processes: int = 1
    interpreted: bool = False


@dataclass
class Log:
    """The lines of one file, which several processes append to."""

    path: Path
    lines: list[Row] = field(default_factory=list)
    _read: int = 0

    def read(self) -> list[Row]:
        """All lines so far; one that a killed process left unfinished is passed over."""
        if self.path.exists():
            with self.path.open() as file:
                file.seek(self._read)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            self._read += len(whole.encode())
            for line in whole.splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    self.lines.append(json.loads(line))
        return self.lines

    def put(self, **row: Any) -> None:
        """Appends one line, whole: one write to a file that is open for appending."""
        # JSON has no NaN and no infinity
        told = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        text = json.dumps({**told, "at": round(time.time(), 2)}, default=str) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)

    def ended(self, phase: str, stage: str) -> dict[str, Row]:
        """The last line of each item of a stage that has ended, well or badly."""
        return {row["item"]: row for row in iterate_rows(self.read(), phase, stage)}

    def begun(self, phase: str, stage: str, process: int) -> str | None:
        """The item that a process has begun and not ended."""
        open_item = None
        for line in self.read():
            if (line.get("phase"), line.get("stage"), line.get("process")) == (phase, stage, process):
                open_item = line["item"] if line["state"] == "started" else None
        return open_item


# ------------------------------------------------------------------------------------------------- in the process
def share(names: Sequence[str], process: int, processes: int) -> list[str]:
    """The names that one of several processes takes: by turns, those with the same beginning together."""
    groups = list(dict.fromkeys(name.partition("/")[0] for name in names))
    return [name for name in names if groups.index(name.partition("/")[0]) % processes == process]


def run_stage(stage: Stage, log: Log, context: Context, phase: str, process: int = 0, processes: int = 1) -> None:
    """The items of a stage that have not ended yet, one after the other.  Ends the process if CUDA is broken."""
    items = stage.items(context)
    # each capture of a graph collects garbage, and looks at nothing that was imported
    gc.freeze()
    ended = log.ended(phase, stage.name)
    for name in share(list(items), process, processes):
        if name in ended:
            continue
        where = {"phase": phase, "stage": stage.name, "item": name, "process": process}
        log.put(**where, state="started")
        begin = time.perf_counter()
        try:
            with timing.side_stream() if context.device == "cuda" else contextlib.nullcontext():
                row = items[name]()
            if context.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            log.put(**where, state="failed", error=one_line(error), trace=traceback.format_exc()[-1500:])
            if isinstance(error, timing.CaptureError) or is_broken(context):
                # without clean-up, which would fail in the same way
                os._exit(BROKEN)
            continue
        log.put(**where, state="done", seconds=round(time.perf_counter() - begin, 2), **row)
        if context.device == "cuda" and not context.timed:
            # other processes use the same memory
            torch.cuda.empty_cache()


def end() -> NoReturn:
    """Ends a stage's process at once: all that it found is in the log, and libraries' threads may fail to stop."""
    os._exit(0)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def is_broken(context: Context) -> bool:
    """Whether the device answers no more."""
    if context.device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


# ------------------------------------------------------------------------------------------------- around processes
@dataclass
class Child:
    """One process of a stage, watched through the log."""

    stage: Stage
    phase: str
    process: int
    processes: int
    device: str
    command: list[str]
    log: Log
    environment: dict[str, str]

    def start(self) -> None:
        self.since = time.monotonic()
        self.item: str | None = None
        output = self.log.path.with_name("output.txt").open("ab")
        with output:
            self.handle = subprocess.Popen(
                [*self.command, self.stage.name, self.phase, str(self.process), str(self.processes), self.device],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def ended(self) -> bool:
        """Whether nothing is left to do here.  A process that died or hangs is blamed on its item and begun again."""
        code = self.handle.poll()
        item = self.log.begun(self.phase, self.stage.name, self.process)
        if item != self.item:
            self.item, self.since = item, time.monotonic()
        if code == 0:
            return True
        allowed = self.stage.seconds if item is not None else START_SECONDS
        if code is None and time.monotonic() - self.since < allowed:
            return False
        if code is None:
            self.stop()
        why = f"took longer than {allowed:.0f} s" if code is None else f"its process ended with code {code}"
        if item is None and code != BROKEN:
            self.log.put(
                phase=self.phase, stage=self.stage.name, item="start", process=self.process, state="failed", error=why
            )
            return True
        if item is not None:
            self.log.put(
                phase=self.phase, stage=self.stage.name, item=item, process=self.process, state="failed", error=why
            )
        self.start()
        return False

    def stop(self) -> None:
        self.handle.kill()
        self.handle.wait()


def watch(children: Sequence[Child], most: int, stop_at: float) -> bool:
    """Run the processes, `most` at a time; False if the time was over before all had ended."""
    waiting = list(children)
    running: list[Child] = []
    while waiting or running:
        if time.monotonic() > stop_at:
            for child in running:
                child.stop()
            return False
        while waiting and len(running) < most:
            child = waiting.pop(0)
            child.start()
            running.append(child)
        running = [child for child in running if not child.ended()]
        time.sleep(POLL_SECONDS)
    return True


def run(
    stages: Sequence[Stage],
    log: Log,
    *,
    device: str,
    minutes: float,
    command: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """All stages: first, side by side, what measures no time and one untimed run of what does; then the times.

    command: starts a process of a stage, with the stage's name, the phase and the process's share behind it.
    say: is given a line of progress.
    """
    stop_at = time.monotonic() + 60 * minutes
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def child(stage: Stage, phase: str, process: int, processes: int) -> Child:
        environment = {**os.environ, "OMP_NUM_THREADS": "1" if phase != "times" else str(cores)}
        if device == "cpu":
            environment["TRITON_INTERPRET"] = str(int(stage.interpreted))
        return Child(stage, phase, process, processes, device, list(command), log, environment)

    side_by_side = []
    for stage in stages:
        phase = "warm" if stage.times else "values"
        if stage.times and (not stage.warm or device == "cpu"):
            continue
        processes = min(stage.processes, cores)
        side_by_side += [child(stage, phase, i, processes) for i in range(processes)]
    say(f"{len(side_by_side)} processes compile the kernels and compare their results, {cores} at a time")
    done = watch(side_by_side, cores, stop_at)
    for stage in stages:
        left = stop_at - time.monotonic()
        if not stage.times:
            continue
        if not done or left < stage.needed:
            say(f"{stage.name}: left out, {max(0.0, left):.0f} s were left and it needs {stage.needed:.0f} s")
            continue
        say(f"{stage.name}: timing, {left:.0f} s left")
        watch([child(stage, "times", 0, 1)], 1, stop_at)


def iterate_rows(lines: Sequence[Row], phase: str, stage: str) -> Iterator[Row]:
    """The rows of a stage in the order of the file, each item's last."""
    last: dict[str, Row] = {}
    for line in lines:
        if (line.get("phase"), line.get("stage")) == (phase, stage) and line.get("state") in ("done", "failed"):
            last[line["item"]] = line
    yield from last.values()
