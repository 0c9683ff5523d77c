"""A CUDA device for the harness's tests: events, caches, streams and graphs over clocks that the tests advance.

Host and device have clocks of their own, as they do: a launch costs the host time, and the device begins it when it is
free and the launch has arrived.  A run is slower after the cache was cleared.
"""

import contextlib
from dataclasses import dataclass, field

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

    def run(self):
        """What is measured."""
        self.runs += 1
        if self.capturing and not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        if not self.capturing:
            self.execute(launches=self.kernels)
        return torch.ones(1)

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
        self.host = self.device = max(self.host, self.device)

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self)

    # ---- torch.cuda
    def CUDAGraph(self):
        return Graph(self)

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def Stream(self):
        return self

    current_stream = Stream

    def wait_stream(self, other):
        assert other is self

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    def reset_peak_memory_stats(self):
        self.runs_before = self.runs

    def memory_allocated(self):
        """1 MB that lay there before."""
        return 1_000_000

    def max_memory_allocated(self):
        """And 7 MB per run since the reset."""
        return 1_000_000 + 7_000_000 * (self.runs - self.runs_before)

    def empty_cache(self):
        pass

    def install(self, monkeypatch):
        """In the place of Triton's driver and of what the harness takes from torch.cuda."""
        from triton.runtime import driver

        monkeypatch.setattr(driver, "_active", self)
        for name in (
            "CUDAGraph", "graph", "Stream", "current_stream", "stream", "synchronize", "reset_peak_memory_stats",
            "memory_allocated", "max_memory_allocated", "empty_cache",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))


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
