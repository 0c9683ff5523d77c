"""Which of several implementations of one operation runs.

An operation (`conv2d_relu`, `conv2d_input_grad`, `conv2d_weight_grad`, `linear_relu`) has candidates: the library's
(cuDNN, cuBLAS) with our passes around it, and Triton kernels.  No rule knows which of them is fastest on a GPU that it
has not seen, so the choice is, in this order:

1. what `force` says, for tests and for looking into a problem;
2. what `tune` has measured here for the same geometry, dtype, batch bucket, GPU architecture and versions;
3. what was measured so for a GPU of this architecture, with whatever versions, and ships: fastalex/gpu/tables;
4. the operation's shipped default: the library's convolution wherever a faster one is unproven.

Measurements lie in one JSON file per user, `table_path()`, which can be read, edited and deleted.  It is read once per
process, and never while a CUDA graph is captured or a model is compiled: those calls take what is known by then.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalex import timing
from fastalex.files import write_whole

FORMAT = 1
# A batch belongs to the bucket of the largest of these that it reaches.
BUCKETS = (1, 32, 128, 256)
# A candidate replaces the default if it takes less than this share of its time: medians of 20 runs repeat within 3 %.
CLEARLY_FASTER = 0.97
ROUNDS = 20
# Largest difference from the library's result that `tune` accepts, as a share of the largest value.
TOLERANCES = {torch.float32: 2.0**-12, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
TF32_TOLERANCE = 2.0**-8

_log = logging.getLogger("fastalex")


class Flags(NamedTuple):
    """The settings of torch.backends.cudnn that decide which algorithms are allowed, and which are fast."""

    benchmark: bool
    deterministic: bool
    precision: str  # of fp32 convolutions: "tf32" or "ieee"

    @property
    def text(self) -> str:
        return "".join(f", {name}" for name in ("benchmark", "deterministic") if getattr(self, name))


def flags() -> Flags:
    """The settings in force.  Read through `fp32_precision`: `allow_tf32` raises once somebody has set the former."""
    cudnn: Any = torch.backends.cudnn
    return Flags(
        cudnn.benchmark,
        cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
        "tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee",
    )


@dataclass(frozen=True)
class Candidate:
    """One implementation.  `run`, `unsupported` and `configurations` take the operation's arguments.

    unsupported: why it cannot run with these, or None if it can.  configurations: what `tune` may try instead of the
    candidate's own tiles, as texts; configured: another `run` for such a text, ValueError for any other.
    """

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None]
    configurations: Callable[..., Sequence[str]] = lambda *args: ()
    configured: Callable[[str], Callable[..., Any]] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it runs no kernel of a library, whose settings then say nothing about it."""
        return "library" not in self.name and "cudnn" not in self.name and "cublas" not in self.name


@dataclass(frozen=True)
class Operation:
    """What can be chosen.  All functions take the operation's arguments, tensors and numbers, the batch first.

    defaults: names of candidates; the first one that can run is the shipped default.
    describe: the geometry without the batch, in words.
    library: the candidate that the others must agree with.
    """

    name: str
    candidates: Mapping[str, Candidate]
    defaults: Callable[..., Sequence[str]]
    describe: Callable[..., str]
    library: str

    def named(self, name: str) -> Candidate | None:
        """A candidate by its name, or by its name, a space and a configuration; None if there is none."""
        base, _, text = name.partition(" ")
        candidate = self.candidates.get(base)
        if candidate is None or not text:
            return candidate
        try:
            return replace(candidate, name=name, run=candidate.configured(text)) if candidate.configured else None
        except ValueError:
            return None


class Choice(NamedTuple):
    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Measurement:
    """What `tune` found for one key.

    candidate: the one to take.  milliseconds: medians.  refused: the reason of each that cannot run, is wrong or
    raised.  batch: the one that was timed.
    """

    candidate: str
    milliseconds: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)
    batch: int = 0


# ---------------------------------------------------------------------------------------------------- the choice
_forced: dict[str, tuple[str, ...]] = {}
_choices: dict[Any, Choice] = {}
_MOST_CHOICES = 4096


def choose(operation: Operation, *args: Any) -> Choice:
    """The candidate that a call with these arguments takes, and why.

    Raises RuntimeError if none of the forced candidates can run.
    """
    settings = flags()
    key = (operation.name, settings, *map(_fingerprint, args))
    choice = _choices.get(key)
    if choice is None:
        choice = _choose(operation, settings, args)
        # what is decided before the table could be read is decided again
        if _table.is_known():
            if len(_choices) >= _MOST_CHOICES:
                _choices.clear()
            _choices[key] = choice
    return choice


def _fingerprint(argument: Any) -> Any:
    """What a candidate's `unsupported` may look at."""
    if isinstance(argument, Tensor):
        aligned = argument.storage_offset() * argument.element_size() % 16
        return argument.shape, argument.stride(), argument.dtype, argument.device, aligned
    return tuple(argument) if isinstance(argument, list) else argument


def _choose(operation: Operation, settings: Flags, args: tuple[Any, ...]) -> Choice:
    forced = _forced.get(operation.name)
    if forced:
        candidate, reasons = _first_supported(operation, forced, args)
        if candidate is None:
            raise RuntimeError(f"fastalex.{operation.name}: no forced candidate can run: {'; '.join(reasons)}")
        return Choice(candidate, "forced" + "".join(f"; {reason}" for reason in reasons))
    key = table_key(operation, settings, args)
    why = _table.why_not(args[0])
    if why is None:
        where = environment(args[0].device)
        measured, source = _table.entries(where).get(key), "measured"
        if measured is None:
            measured, source = shipped_table(where.partition(",")[0]).get(key), "shipped measurement"
        if measured is None:
            why = f"not measured here: {key}"
        else:
            candidate, reasons = _first_supported(operation, [measured.candidate], args)
            if candidate is not None:
                times = ", ".join(f"{name} {ms:.4g}" for name, ms in measured.milliseconds.items())
                return Choice(candidate, f"{source} at batch {measured.batch}, in ms: {times}")
            why = f"{source} as fastest, but {reasons[0]}"
    candidate, reasons = _first_supported(operation, operation.defaults(*args), args)
    assert candidate is not None, reasons  # the last default runs anything
    return Choice(candidate, f"shipped default; {why}")


def _first_supported(
    operation: Operation, names: Sequence[str], args: tuple[Any, ...]
) -> tuple[Candidate | None, list[str]]:
    reasons: list[str] = []
    for name in names:
        candidate = operation.named(name)
        reason = "there is no such candidate" if candidate is None else candidate.unsupported(*args)
        if candidate is not None and reason is None:
            return candidate, reasons
        reasons.append(f"{name}: {reason}")
    return None, reasons


@contextlib.contextmanager
def force(operation: Operation | str, *names: str) -> Iterator[None]:
    """Within the block (of the whole process) the operation takes the first of these candidates that can run.

    A call that none of them can take raises RuntimeError with their reasons.  Applies where there is a choice: to
    CUDA tensors, and to CPU tensors in `fastalex.backend.use("triton")`.
    Raises ValueError for an operation or a candidate that does not exist.
    """
    found = find(operation)
    for name in names:
        if found.named(name) is None:
            raise ValueError(f"candidates of {found.name} are {', '.join(found.candidates)}; got {name!r}")
    if not names:
        raise ValueError(f"name at least one candidate of {found.name}: {', '.join(found.candidates)}")
    before = _forced.get(found.name)
    _forced[found.name] = names
    _choices.clear()
    try:
        yield
    finally:
        if before is None:
            del _forced[found.name]
        else:
            _forced[found.name] = before
        _choices.clear()


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    OPERATIONS[operation.name] = operation
    return operation


def find(operation: Operation | str) -> Operation:
    """Raises ValueError for a name that no operation has."""
    if isinstance(operation, Operation):
        return operation
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    return OPERATIONS[operation]


# ----------------------------------------------------------------------------------------------------- the table
def table_key(operation: Operation, settings: Flags, args: tuple[Any, ...]) -> str:
    """What a measurement depends on besides the environment, in words."""
    tensor = args[0]
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype == torch.float32:
        dtype += f" ({settings.precision})"
    bucket = max((b for b in BUCKETS if tensor.shape[0] >= b), default=0)
    return f"{operation.name}: {operation.describe(*args)}, {dtype}, batch {bucket}+{settings.text}"


@functools.cache
def environment(device: torch.device) -> str:
    """What a measurement holds for: the architecture of the device and the versions of the libraries."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_properties(device).gcnArchName if torch.version.hip else f"sm_{major}{minor}"
    else:
        name = device.type
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "unknown"
    return f"{name}, torch {torch.__version__}, triton {triton}, cuDNN {torch.backends.cudnn.version()}"


def table_path() -> Path:
    """The user's table: fastalex/dispatch.json in $XDG_CACHE_HOME, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastalex" / "dispatch.json"


@functools.cache
def shipped_table(architecture: str) -> dict[str, Measurement]:
    """{key: measurement} for GPUs of this architecture ("sm_90"), none where nobody has measured yet."""
    tables = read_table(Path(__file__).with_name("tables") / f"{architecture}.json")
    return {key: measurement for entries in tables.values() for key, measurement in entries.items()}


class _Table:
    """The file as this process has read it, and what it has measured itself."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.content: dict[str, dict[str, Measurement]] | None = None
        self.warned: set[str] = set()

    def is_known(self) -> bool:
        return self.content is not None

    def why_not(self, tensor: Tensor) -> str | None:
        """Why the table cannot be asked now, or None if it has been read."""
        if self.content is None:
            if is_capturing(tensor):
                return "the table is not read during a capture or a compilation"
            self.content = read_table(table_path())
        return None

    def entries(self, where: str) -> dict[str, Measurement]:
        assert self.content is not None
        if self.content and where not in self.content and where not in self.warned:
            self.warned.add(where)
            _log.warning("%s has no measurements for %s: `fastalex tune` makes them", table_path(), where)
        return self.content.get(where, {})

    def add(self, where: str, measured: Mapping[str, Measurement]) -> None:
        if self.content is None:
            self.content = read_table(table_path())
        self.content.setdefault(where, {}).update(measured)
        _choices.clear()


_table = _Table()


def forget() -> None:
    """Reads the table anew at the next call: after it was deleted, edited, or measured by another process."""
    _table.forget()
    _choices.clear()


def is_capturing(tensor: Tensor) -> bool:
    """Whether a compiler looks at this call, or a CUDA graph records it."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def read_table(path: Path) -> dict[str, dict[str, Measurement]]:
    """{environment: {key: measurement}}; nothing, with one logged line, from a file that cannot be used."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} instead of {FORMAT}")
        return {
            where: {key: Measurement(**entry) for key, entry in entries.items()}
            for where, entries in content["measurements"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        _log.warning("%s is ignored: %s: %s", path, type(error).__name__, " ".join(str(error).split()))
        return {}


def remember(where: str, measured: Mapping[str, Measurement]) -> None:
    """Merge measurements into this process's table, and not into the user's file."""
    _table.add(where, measured)


def save(where: str, measured: Mapping[str, Measurement]) -> None:
    """Merge measurements into this process's table and the user's file; a directory that is read-only is logged."""
    remember(where, measured)
    try:
        merge(table_path(), where, measured)
    except OSError as error:
        _log.warning("measurements last for this process only: %s", error)


def merge(path: Path, where: str, measured: Mapping[str, Measurement]) -> None:
    """Add measurements to a file, which other processes may do at the same time.  Raises OSError if it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name("dispatch.lock")):
        content = read_table(path)
        content.setdefault(where, {}).update(measured)
        entries = {w: {key: asdict(m) for key, m in sorted(e.items())} for w, e in sorted(content.items())}
        write_whole(path, json.dumps({"format": FORMAT, "measurements": entries}, indent=1) + "\n")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there the last of several writers wins
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------- measuring
def tune(
    operation: Operation | str,
    *args: Any,
    rounds: int = ROUNDS,
    known: Mapping[str, float] | None = None,
    sweep: bool = False,
) -> Measurement:
    """Time every candidate on these arguments, without saving: `save` does.

    known: milliseconds of candidates that were timed on these arguments before, and are not timed again.  sweep: then
    also the configurations of the fastest kernel of ours, a dozen or so to compile.

    Each is first compared with the library's result, and must keep a NaN; one that is refused, raises or differs is
    recorded with the reason and not timed.  Rounds go through all candidates in turn, so that a drifting clock hurts
    all alike.  On a GPU the times are the device's, of CUDA graphs, with the L2 cache cleared before each.
    Raises RuntimeError during a capture or a compilation, and BrokenDeviceError where a candidate took the GPU with it.
    """
    operation = find(operation)
    if is_capturing(args[0]):
        raise RuntimeError(f"fastalex.gpu.dispatch.tune({operation.name}) cannot run during a capture or a compilation")
    with timing.side_stream() if args[0].is_cuda else contextlib.nullcontext():
        return _tune(operation, args, rounds, known or {}, sweep)


def _tune(
    operation: Operation, args: tuple[Any, ...], rounds: int, known: Mapping[str, float], sweep: bool
) -> Measurement:
    expected = operation.candidates[operation.library].run(*args)
    refused: dict[str, str] = {}
    times = dict(known)

    def measure(candidates: Iterable[Candidate]) -> None:
        running: list[Candidate] = []
        for candidate in candidates:
            if candidate.name in times:
                continue
            reason = candidate.unsupported(*args) or _fault(operation, candidate, args, expected)
            if reason is None:
                running.append(candidate)
            else:
                refused[candidate.name] = reason
        seconds = _device_seconds(running, args, rounds) if args[0].is_cuda else _host_seconds(running, args, rounds)
        times.update({name: round(1e3 * statistics.median(found), 6) for name, found in seconds.items()})

    measure(operation.candidates.values())
    if sweep:
        ours = [c for c in operation.candidates.values() if c.configured and c.name in times]
        for candidate in sorted(ours, key=lambda c: times[c.name])[:1]:
            names = (f"{candidate.name} {text}" for text in candidate.configurations(*args))
            measure(c for name in names if (c := operation.named(name)))
    default = next(name for name in operation.defaults(*args) if name in times)
    best = min(times, key=times.__getitem__)
    chosen = best if times[best] < CLEARLY_FASTER * times[default] else default
    return Measurement(chosen, times, refused, args[0].shape[0])


def _fault(operation: Operation, candidate: Candidate, args: tuple[Any, ...], expected: Tensor) -> str | None:
    """What is wrong with a candidate on these arguments, or None."""
    try:
        reason = _difference(candidate.run(*args), expected)
        if reason is None and not keeps_nan(operation, candidate, args):
            reason = "makes a number of NaN"
    except Exception as error:  # a compiler's failure is a reason, whatever its class
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        _blame(candidate, args[0], reason)
    return reason


def keeps_nan(operation: Operation, candidate: Candidate, args: tuple[Any, ...]) -> bool:
    """Whether a NaN in the middle of the first argument reaches all that it reaches in the library's result.

    Some libraries' max(0, x) makes 0 of it.
    """
    first = args[0].clone()
    if first.numel():
        first[tuple(size // 2 for size in first.shape)] = torch.nan
    expected = operation.candidates[operation.library].run(first, *args[1:])
    return not bool((expected.isnan() & ~candidate.run(first, *args[1:]).isnan()).any())


def _difference(found: Tensor, expected: Tensor) -> str | None:
    """What is wrong with a result, or None."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"returns {found.dtype} {tuple(found.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if expected.numel() == 0:
        return None
    tolerance = TOLERANCES[expected.dtype]
    if expected.dtype == torch.float32 and flags().precision == "tf32":
        tolerance = TF32_TOLERANCE
    largest = expected.float().abs().max()
    error = (found.float() - expected.float()).abs().max()
    if not error <= tolerance * largest:
        return f"differs from the library by {error.item():.3g}, the largest value being {largest.item():.3g}"
    return None


class BrokenDeviceError(RuntimeError):
    """A candidate left the GPU in a state in which nothing runs on it any more: end the process."""


def _blame(candidate: Candidate, tensor: Tensor, reason: str) -> None:
    """Raises BrokenDeviceError if the GPU answers no more after what the candidate did."""
    if not tensor.is_cuda:
        return
    try:
        torch.cuda.synchronize(tensor.device)
    except RuntimeError as error:
        raise BrokenDeviceError(f"{candidate.name}: {reason}; the GPU answers no more") from error


def _device_seconds(running: Sequence[Candidate], args: tuple[Any, ...], rounds: int) -> dict[str, list[float]]:
    graphs = {}
    for candidate in running:
        try:
            graphs[candidate.name], _ = timing.capture(functools.partial(candidate.run, *args))
        except timing.CaptureError as error:
            raise BrokenDeviceError(f"{candidate.name} cannot be captured in a CUDA graph: {error}") from error
    return {name: [m / 1e3 for m in found] for name, found in timing.interleaved(graphs, rounds).items()}


def _host_seconds(running: Sequence[Candidate], args: tuple[Any, ...], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in running}
    for _ in range(rounds):
        for candidate in running:
            seconds[candidate.name].append(_seconds(candidate.run, args))
    return seconds


def _seconds(run: Callable[..., Any], args: tuple[Any, ...]) -> float:
    begin = time.perf_counter()
    run(*args)
    return time.perf_counter() - begin
