"""A CUDA device for the harness's tests: events, caches, streams and graphs over clocks that the tests advance.

Host and device have clocks of their own, as they do: a launch costs the host time, and the device begins it when it is
free and the launch has arrived.  A run is slower after the cache was cleared.

What ruins a process on a real device ruins it here: a capture that fails leaves an allocator of no use, an illegal
access leaves nothing.
"""

import contextlib
import types
from dataclasses import dataclass, field

import pytest
import torch


@dataclass
class StandIn:
    """cold, warm: a run on the device, in seconds.  launch: a launch on the host.  kernels: launches of a run."""

    cold: float = 100e-6
    warm: float = 40e-6
    launch: float = 5e-6
    kernels: int = 1
    capturable: bool = True
    clears: int = 0
    runs: int = 0
    replays: int = 0
    host: float = field(default=0.0, init=False)
    device: float = field(default=0.0, init=False)
    cleared: bool = field(default=False, init=False)
    capturing: bool = field(default=False, init=False)
    lost: bool = field(default=False, init=False)
    allocator: bool = field(default=True, init=False)

    def __post_init__(self):
        self.current = self.Stream()

    def run(self):
        """What is measured."""
        self.answer()
        self.runs += 1
        if self.capturing and not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        if not self.capturing:
            self.execute(launches=self.kernels)
        return torch.ones(1)

    def backward(self):
        """A run that is the backward of a forward which runs now: autograd launches it on the forward's stream."""
        stream = self.current

        def run():
            if self.capturing and self.current is not stream:
                raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")
            return self.run()

        return run

    def illegal(self):
        """A run whose kernel writes where it must not; whoever asks the device next is told."""
        self.lost = True
        return torch.ones(1)

    def answer(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def execute(self, launches):
        """A run's kernels, launched at once (a graph) or one by one."""
        seconds = (self.cold if self.cleared else self.warm) / self.kernels
        for number in range(self.kernels):
            self.host += self.launch if number < launches else 0
            self.device = max(self.device, self.host) + seconds
        self.cleared = False

    # ---- Triton's driver
    def get_device_interface(self):
        return self

    def get_empty_cache_for_benchmark(self):
        return self

    def clear_cache(self, cache):
        assert cache is self
        self.clears += 1
        self.cleared = True
        self.host += self.launch
        self.device = max(self.device, self.host) + 80e-6

    def synchronize(self):
        self.answer()
        self.host = self.device = max(self.host, self.device)

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self)

    # ---- torch.cuda
    def CUDAGraph(self):
        return Graph(self)

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        self.capturing = True
        try:
            with self.stream(stream or self.Stream()):
                yield
        except RuntimeError:
            self.allocator = False
            raise
        finally:
            self.capturing = False

    def Stream(self):
        return Stream()

    def current_stream(self):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def reset_peak_memory_stats(self):
        self.runs_before = self.runs

    def memory_allocated(self):
        """1 MB that lay there before."""
        return 1_000_000

    def max_memory_allocated(self):
        """And 7 MB per run since the reset."""
        return 1_000_000 + 7_000_000 * (self.runs - self.runs_before)

    def empty_cache(self):
        self.answer()
        if not self.allocator:
            raise RuntimeError("INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp")

    def current_device(self):
        self.answer()
        return 0

    def get_device_properties(self, device):
        self.answer()
        return types.SimpleNamespace(
            name="Stand-in", major=9, minor=0, multi_processor_count=132, total_memory=80e9, L2_cache_size=50e6
        )

    def install(self, monkeypatch):
        """In the place of Triton's driver and of what the harness takes from torch.cuda."""
        from triton.runtime import driver

        monkeypatch.setattr(driver, "_active", self)
        for name in (
            "CUDAGraph", "graph", "Stream", "current_stream", "stream", "synchronize", "reset_peak_memory_stats",
            "memory_allocated", "max_memory_allocated", "empty_cache", "current_device", "get_device_properties",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))


def in_this_process():
    """A stand-in for as long as the process lives."""
    device, patch = StandIn(), pytest.MonkeyPatch()
    device.install(patch)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    return device


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


@dataclass
class Event:
    owner: StandIn

    def record(self):
        self.at = self.owner.device = max(self.owner.device, self.owner.host)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@dataclass
class Graph:
    owner: StandIn

    def replay(self):
        self.owner.replays += 1
        self.owner.execute(launches=1)
