"""A tensor in pieces that stay in a core's cache, on one thread or on several.

A chain of elementwise operations over a whole tensor is bound by memory: each operation reads and writes it.
Here a piece goes through the whole chain before the next one starts, in buffers that are reused, so memory is
read once and written once.

Threads.  PyTorch splits each operation over its threads and waits for all of them.  On two quiet cores of a
Sapphire Rapids that gave 1.7 times the speed.  When another program holds a core, every one of a thousand small
operations can wait a scheduler's time slice for the thread that is not running: 20 ms of work then took 0.5 to
2.4 seconds.  So parallel pieces are timed against serial ones of the same call, and the first that is slower
than one thread would have been ends the attempt.  The next attempt has to wait until `PATIENCE` times the lost
time has passed: what a busy machine can cost is bounded by 1 / PATIENCE of the time, plus one piece.
A serial piece has too few elements for PyTorch to split an operation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Elements per operation.  On one thread, LRN forward took 9 to 22 % longer with 32768 and 48 to 98 % longer with 8192,
# because an operation costs 2 us for its call.
ONE_THREAD = 98304
# at::internal::GRAIN_SIZE is 32768: an elementwise operation on fewer elements runs on the calling thread.
SERIAL = 32000
PER_THREAD = 65536

PATIENCE = 20
# Larger buffers are not kept between calls.  The weight of AlexNet's fc6 takes 72 MiB in half precision.
KEEP_BYTES = 80 * 2**20


class _Local(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.resume = 0.0  # time.perf_counter() after which several threads may be tried again


_local = _Local()


def scratch(name: str, elements: int, dtype: torch.dtype) -> Tensor:
    """A flat buffer of this thread, whose contents last until the next call with the same name and dtype."""
    buffer = _local.buffers.get((name, dtype))
    if buffer is None or buffer.numel() < elements:
        # a buffer made in inference mode could not be written outside it
        with torch.inference_mode(False):
            buffer = torch.empty(elements, dtype=dtype)
        if buffer.nbytes <= KEEP_BYTES:
            _local.buffers[name, dtype] = buffer
    return buffer[:elements]


def pieces(items: int, per_piece: Callable[[int], int]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, limit): ranges of items, and how many elements an operation on them may have.

    `per_piece(limit)` says how many items to take when operations may have `limit` elements.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from _ranges(0, items, per_piece(ONE_THREAD), ONE_THREAD)
        return
    step = per_piece(SERIAL)
    done = min(items, 2 * step)
    seconds_per_item = torch.inf
    for start, stop, limit in _ranges(0, done, step, SERIAL):
        begin = time.perf_counter()
        yield start, stop, limit
        # the smaller of two, because one may have been interrupted
        seconds_per_item = min(seconds_per_item, (time.perf_counter() - begin) / (stop - start))
    if time.perf_counter() >= _local.resume:
        limit = threads * PER_THREAD
        for start, stop, _ in _ranges(done, items, per_piece(limit), limit):
            begin = time.perf_counter()
            yield start, stop, limit
            end = time.perf_counter()
            done = stop
            lost = end - begin - seconds_per_item * (stop - start)
            if lost > 0:
                _local.resume = end + PATIENCE * lost
                break
    yield from _ranges(done, items, step, SERIAL)


def _ranges(start: int, stop: int, step: int, limit: int) -> Iterator[tuple[int, int, int]]:
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop), limit


def channel_blocks(x: Tensor, groups: int = 1) -> Tensor:
    """A dense x as a view (rows, channels of a group, pixels): one pixel per row for channels last, else one image.

    One channel is channels last.
    """
    channels = x.shape[1] // groups
    if x.movedim(1, -1).is_contiguous():
        return x.movedim(1, -1).view(-1, channels, 1)
    return x.view(x.shape[0] * groups, channels, -1)
