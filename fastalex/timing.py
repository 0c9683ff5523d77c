"""Device time: what the GPU needs for a piece of work, without the host that launches it.

A launch costs the host 36 to 107 us, most of our kernels take less, and events around a launch then tell the host's
time.  So the work is captured in a CUDA graph once and the replays are timed, each with the L2 cache cleared before it.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Run = Callable[[], Any]

WARM_UPS = 3
# More than any L2 cache: what is written before a replay to clear it.
CACHE_BYTES = 256 * 2**20


class CaptureError(RuntimeError):
    """The work cannot be captured in a CUDA graph.

    In PyTorch 2.11 the allocator of the process is of no use afterwards: end it.
    """


@contextlib.contextmanager
def side_stream() -> Iterator[torch.cuda.Stream]:
    """The current stream is one on which graphs can be captured, and everything in the block runs there.

    Autograd runs the backward of a node on the stream of its forward, so a backward can only be captured on the
    stream on which its forward ran: build, warm up, capture and replay inside one such block.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


def capture(run: Run, warm_ups: int = WARM_UPS) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of one run, and what that run returned: where each replay leaves its results.

    On the current stream, which must not be the default one: call it inside `side_stream`.
    Raises CaptureError where the work cannot be captured.
    """
    for _ in range(warm_ups):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            result = run()
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return graph, result


def replays(graph: torch.cuda.CUDAGraph, milliseconds: float = 60.0) -> list[float]:
    """Device milliseconds of replays of the graph, for about that long and at least ten, L2 cleared before each."""
    from triton.testing import do_bench

    found = do_bench(graph.replay, warmup=max(1, milliseconds / 4), rep=milliseconds, return_mode="all")
    if len(found) < 10:
        found += do_bench(graph.replay, warmup=1, rep=1.2 * (10 - len(found)) * max(found), return_mode="all")
    return found


def device_milliseconds(run: Run, milliseconds: float = 60.0) -> float:
    """The median device time of a run, in milliseconds, from replays of its graph.

    Inside `side_stream`, where whatever `run` uses was built.  Raises CaptureError.
    """
    graph, _ = capture(run)
    return statistics.median(replays(graph, milliseconds))


def interleaved(graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Device milliseconds of each graph: one replay each per round, so that a drifting clock slows all alike."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            graph.replay()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(stop) for start, stop in found] for name, found in events.items()}
