"""What a case is, how results are checked, how a CPU's providers are timed, and what is recorded beside the times.

On a CPU the providers take turns, one run each per round, so that a noisy machine slows all of them alike and their
ratios still mean something.  How a GPU is timed is in `benchmarks/gpu.py`.

pytest-benchmark stores, groups and compares; it is given the measured times through its `timer` option.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastalex import timing

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CPU_ROUNDS = (3, 51)
CPU_SECONDS = 2.0  # for the rounds of one case

Run = Callable[[], Any]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------------------------------------------- what is timed
@dataclass(frozen=True)
class Case:
    """What every provider does: one operation or model in one pass, dtype and shape.

    passes: "forward", "backward", "both", "inference" or "step".  dtype: a key of `DTYPES`; "tf32" is float32 with
    TF32 allowed in matrix products, "fp32" with TF32 forbidden, for all providers alike.
    """

    operation: str
    passes: str
    dtype: str
    shape: tuple[int, ...]
    layer: str = ""

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return "-".join(part for part in (self.layer, self.passes, self.dtype, shape) if part)


@dataclass(frozen=True)
class Expected:
    """What a correct provider returns, and the tensors of the result that are compared.

    An element may differ by `tolerance` times the largest expected magnitude of its tensor, and a share of
    `outliers` of the elements by more: where two cells of a pooling window are equal up to rounding, the gradient may
    go to either.
    """

    tensors: Sequence[Tensor]
    tolerance: float
    outliers: float = 0.0


def checked_while_building(expected: Callable[[], Expected]) -> Callable[[], Expected]:
    """For `Race.expected`, where the builders compare with `expected` and what a run returns is not looked at."""

    def nothing() -> Expected:
        expected()
        return Expected((), 0.0)

    return nothing


@dataclass
class Race:
    """The providers of one case, each as a function that builds what is run.

    observe: the tensors to check, out of what a run returns.  bytes, flops: that one run must move and compute.
    calls: a run repeats its work so often, for work that is shorter than a clock can tell.  host: time the host's part
    also on a GPU.  clock: `time.process_time` counts only what this process got of a shared machine.  replayed: the
    providers whose run on a GPU is the replay of a graph already.  within: what holds while a provider works on a GPU.
    """

    builders: Mapping[str, Callable[[], Run]]
    expected: Callable[[], Expected]
    observe: Callable[[Any], Sequence[Tensor]] = lambda out: out if isinstance(out, tuple) else (out,)
    bytes: int = 0
    flops: int = 0
    calls: int = 1
    host: bool = False
    clock: Callable[[], float] = time.perf_counter
    replayed: Sequence[str] = ()
    within: Callable[[str], contextlib.AbstractContextManager[Any]] = lambda name: contextlib.nullcontext()


@dataclass
class Measured:
    """The times of one provider in seconds, how they were taken, and the most device memory that it held, in bytes.

    That is inputs, parameters and whatever a run allocates, as PyTorch's allocator counts it.  On a GPU also what the
    host needs to launch a run, what passes until a run has ended, both medians, and why there is no graph of a run.
    """

    seconds: list[float]
    timing: str
    peak_bytes: int | None = None
    ratio: dict[str, float] = field(default_factory=dict)
    host_seconds: float | None = None
    wall_seconds: float | None = None
    uncaptured: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class WrongResult(AssertionError):
    """A provider that computes something else is not timed."""


class NotApplicable(Exception):
    """A provider that cannot do this case: no failure."""


def check(actual: Sequence[Tensor], expected: Expected) -> None:
    """Raises WrongResult unless every tensor is finite where expected and within its tolerance."""
    if len(actual) != len(expected.tensors):
        raise WrongResult(f"{len(actual)} results, expected {len(expected.tensors)}")
    for number, (a, e) in enumerate(zip(actual, expected.tensors, strict=True)):
        if a.shape != e.shape:
            raise WrongResult(f"result {number} has shape {tuple(a.shape)}, expected {tuple(e.shape)}")
        limit = expected.tolerance * e.abs().max().item()
        difference = (a.to(e.dtype) - e).abs()
        # NaN compares false; counted, since the mean of ones is not always 1 on a GPU
        share = int((~(difference <= limit)).sum()) / max(1, difference.numel())
        if share > expected.outliers:
            raise WrongResult(
                f"{share:.3%} of result {number} differ by more than {limit:.3g} ({expected.outliers:.3%} may), "
                f"the worst by {difference.max().item():.3g}"
            )


# ------------------------------------------------------------------------------------------------------- on a CPU
def seconds_of(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """What the host needs for a run.  On a GPU, its work is waited for before, and not measured."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = clock()
    run()
    return clock() - begin


def side_by_side(race: Race, timed: bool = True) -> dict[str, Measured | Exception]:
    """The providers side by side: one run each per round; a ratio is the median over the rounds."""
    expected = race.expected()
    out: dict[str, Measured | Exception] = {}
    runs: dict[str, Run] = {}
    for name, build in race.builders.items():
        try:
            run = build()
            check(race.observe(run()), expected)
            runs[name] = run
        except Exception as error:
            out[name] = error.with_traceback(None)
    del expected
    times: dict[str, list[float]] = {name: [] for name in runs}
    if timed and runs:
        once = sum(seconds_of(run) for run in runs.values())
        rounds = int(min(max(CPU_SECONDS / once, CPU_ROUNDS[0]), CPU_ROUNDS[1]))
        gc.collect()
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(seconds_of(run, race.clock) / race.calls)
    for name, mine in times.items():
        ratios = {
            other: statistics.median(theirs / ours for theirs, ours in zip(times[other], mine, strict=True))
            for other in times
            if other != name and mine
        }
        how = "paired" if race.clock is time.perf_counter else "paired, CPU time"
        out[name] = Measured(mine, how if timed else "unmeasured", ratio=ratios)
    return out


# ------------------------------------------------------------------------------------------------- for comparison
@functools.cache
def copy_rate(where: str) -> float:
    """Bytes per second, read and written, of a copy that fits into no cache, measured here and now."""
    elements = (1 << 28) if where == "cuda" else (1 << 25)
    source = torch.randn(elements, device=where)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_or_best(lambda: target.copy_(source), where)


@functools.cache
def matrix_rate(where: str, dtype: str) -> float:
    """FLOP per second of a square matrix product in this dtype, measured here and now.

    Of random numbers, as layers have them: products of ones need less power, and run up to 13 % faster on a GPU.
    """
    size = 8192 if where == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=where).to(DTYPES[dtype])
    with tf32(dtype):
        return 2 * size**3 / _median_or_best(lambda: a @ b, where)


def _median_or_best(run: Run, where: str) -> float:
    if where == "cuda":
        return timing.device_milliseconds(run) * 1e-3
    run()
    return min(seconds_of(run) for _ in range(7))


class tf32:
    """Within the block, products and convolutions of float32 use TF32 if the dtype is "tf32", and not otherwise."""

    def __init__(self, dtype: str) -> None:
        self.allowed = dtype == "tf32"

    def __enter__(self) -> None:
        self.before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        self._set(self.allowed, self.allowed)

    def __exit__(self, *exception: object) -> None:
        self._set(*self.before)

    def _set(self, matmul: bool, cudnn: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn


# ---------------------------------------------------------------------------------------------- into pytest-benchmark
class Replay:
    """A timer for pytest-benchmark: each pair of readings is one of the given durations apart."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, seconds: Sequence[float]) -> None:
        self._readings = (reading for duration in seconds for reading in (0.0, duration))

    def __call__(self) -> float:
        return next(self._readings)


REPLAY = Replay()


def feed(benchmark: Any, seconds: Sequence[float]) -> None:
    """Make the times the rounds of a benchmark whose timer is REPLAY."""
    REPLAY.load(seconds)
    benchmark.pedantic(lambda: None, rounds=max(1, len(seconds)), iterations=1)


def details(case: Case, provider: str, race: Race, measured: Measured, where: str) -> dict[str, Any]:
    """The extra_info of one benchmark."""
    info: dict[str, Any] = {
        "operation": case.operation,
        "provider": provider,
        "pass": case.passes,
        "dtype": case.dtype,
        "layout": "nchw" if provider.endswith("nchw") else "channels_last",
        "shape": list(case.shape),
        "layer": case.layer,
        "device": where,
        "timing": measured.timing,
        "uncaptured": measured.uncaptured,
        "host_ms": _milliseconds(measured.host_seconds),
        "wall_ms": _milliseconds(measured.wall_seconds),
        "bytes": race.bytes or None,
        "flops": race.flops or None,
        "peak_bytes": measured.peak_bytes,
        "ratio": {name: round(ratio, 3) for name, ratio in measured.ratio.items()},
    }
    if race.bytes:
        rate = race.bytes / measured.median
        info |= {"gb_per_s": round(rate / 1e9, 2), "percent_of_copy": round(100 * rate / copy_rate(where), 1)}
    if race.flops:
        rate = race.flops / measured.median
        percent = 100 * rate / matrix_rate(where, case.dtype)
        info |= {"tflop_per_s": round(rate / 1e12, 3), "percent_of_matrix_rate": round(percent, 1)}
    if where == "cpu":
        info |= {"threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 2)}
    return info


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{1e3 * seconds:.4g}")
