"""A step as one CUDA graph: augmentation, forward, loss, backward and the optimizer's update.

The host launches kernels one by one, and at batch 128 takes longer for a step than an H100 (12.6 ms against 2.8); one
graph launches them at once.  What changes from step to step lies in memory that the graph reads: the learning rates,
the indices of the batch, the seed of the crops.  The dropout's random numbers are those of the generator's seed, which
a graph reads when it is replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastalex import distributed
from fastalex.training.options import Options
from fastalex.training.recipes import Recipe

# Steps before the capture, in which libraries choose their algorithms and buffers come into being.
WARM_UP = 3


def is_one_graph(recipe: Recipe, options: Options, device: torch.device) -> bool:
    """Whether steps are replayed whole.

    One process with one micro-batch; the others have forward and backward in a graph at most (`prepare`).
    """
    alone = distributed.size() == 1 and options.accumulate == 1
    return recipe.cuda_graphs and device.type == "cuda" and alone and not options.compile


class Replayed:
    """A function of tensors on the device, always of the same shapes, that is captured once and replayed from then on.

    The first calls run it as it is, on a stream of their own as a capture asks for; they count like any other.  Nothing
    comes back: the function writes to memory that outlives it.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._calls = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> None:
        if not self._calls:
            self._inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        for own, tensor in zip(self._inputs, inputs, strict=True):
            own.copy_(tensor, non_blocking=True)
        self._calls += 1
        if self._calls <= WARM_UP:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                self._function(*self._inputs)
            torch.cuda.current_stream().wait_stream(beside)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # threads that read pictures pin memory meanwhile, which another mode would take for a part of the capture
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._function(*self._inputs)
        self._graph.replay()
