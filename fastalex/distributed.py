"""One process or many: the few questions that training and evaluation ask about the others.

Processes are started by `torchrun`, which tells each its rank in the environment.  Alone, every function here answers
without communication.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# the longest that the others may wait for rank 0 to write a checkpoint to a slow disk
TIMEOUT = timedelta(minutes=10)


def launched() -> bool:
    """Whether torchrun, or a scheduler that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun started this process in the place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_rank() -> int:
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, with NCCL between GPUs and Gloo between CPUs; alone, does nothing."""
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    except BaseException as error:
        drop_locals(error)
        raise
    finally:
        dist.destroy_process_group()


def drop_locals(error: BaseException) -> None:
    """Empties the frames that an error came through, and those of the errors that it was raised from.

    Such a frame may hold a DistributedDataParallel, which must not outlive its group: the last to let go of it waits
    for the group's threads with Python's lock, and one of them may wait for that lock (pytorch#56297).
    """
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__


def equal_shares(indices: Tensor, number: int) -> list[tuple[Tensor, int]]:
    """The indices cut into so many parts of one size, each with the number of its indices that count.

    What is missing for that size repeats the first index, behind those that count.
    """
    size = -(-len(indices) // number)
    parts = indices.tensor_split(number)
    return [(torch.cat([part, indices[:1].expand(size - len(part))]), len(part)) for part in parts]


def dealt(order: Tensor, shares: int, batch_size: int) -> Tensor:
    """An order in which part j of each batch, as `equal_shares` cuts it, comes from share j of the given one.

    Every batch takes as many from each share, in the share's order, and the last what is left.
    Raises ValueError where a batch cannot be cut into as many equal parts.
    """
    if batch_size % shares:
        raise ValueError(f"batch_size must be a multiple of the number of shares, {shares}, got {batch_size}")
    size = batch_size // shares
    cut = [share.split(size) for share in order.tensor_split(shares)]
    steps = -(-len(order) // batch_size)
    return torch.cat([parts[step] for step in range(steps) for parts in cut if step < len(parts)]) if steps else order


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of the tensor over all processes, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest_over_processes(tensor: Tensor) -> Tensor:
    """The elementwise maximum of the tensor over all processes, in place."""
    if size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def largest(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if size() == 1:
        return number
    return int(largest_over_processes(torch.tensor(number, device=device)))


def from_rank_0(thing: T) -> T:
    """Rank 0's object, which must be picklable, in every process."""
    things = [thing]
    if size() > 1:
        dist.broadcast_object_list(things, src=0)
    return things[0]


def copy_from_rank_0(tensor: Tensor) -> None:
    """Fills the tensor with rank 0's values."""
    if size() > 1:
        dist.broadcast(tensor, src=0)
