"""Paired timing: peer and ours take turns in one process, so that a noisy machine slows both alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def paired(benchmark: Any) -> Callable[..., float]:
    """paired(ours, peer, rounds=7) -> the median of peer time / our time over rounds that run one after the other.

    The statistics of the benchmark are those of `ours`; ratio, medians and the machine go into `extra_info`.
    """

    def run(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = 7) -> float:
        ours()
        peer()
        peer_times: list[float] = []
        our_times: list[float] = []

        def time_peer() -> None:
            begin = time.perf_counter()
            peer()
            peer_times.append(time.perf_counter() - begin)

        def time_ours() -> None:
            begin = time.perf_counter()
            ours()
            our_times.append(time.perf_counter() - begin)

        load_before = os.getloadavg()[0]
        benchmark.pedantic(time_ours, setup=time_peer, rounds=rounds, iterations=1)
        ratio = statistics.median(p / o for p, o in zip(peer_times, our_times, strict=True))
        benchmark.extra_info.update(
            ratio=round(ratio, 3),
            ours_ms=round(1e3 * statistics.median(our_times), 3),
            peer_ms=round(1e3 * statistics.median(peer_times), 3),
            load_average=[round(load_before, 2), round(os.getloadavg()[0], 2)],
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            processor=processor(),
        )
        print(f"\n{benchmark.name}: peer / ours = {ratio:.2f}  {benchmark.extra_info}")
        return ratio

    return run
