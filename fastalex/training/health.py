"""Whether a network is still alive: units that answer at all, and logits that depend on the picture.

A ReLU whose input is negative for every picture passes no gradient, and weight decay alone never wakes it.  Too large a
step can do that to a whole layer; then all logits are constants, and the loss stays at that of guessing without ever
being infinite.  What tells the two apart is read off an evaluation that takes place anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalex import distributed
from fastalex.alexnet import AlexNet
from fastalex.training.progress import Epoch
from fastalex.training.recipes import Recipe

# Below both of these the layers under fc7 get next to no gradient, and no picture is told from another.
FEWEST_ALIVE = 0.05
LEAST_SPREAD = 0.01


class DeadNetwork(FloatingPointError):
    """Training cannot go on: a hidden layer answers no picture any more."""


class Health(NamedTuple):
    """fc6_alive, fc7_alive: the share of units that are not zero for at least one test picture.

    logit_spread: the largest minus the smallest value of a logit over the test pictures, mean over the classes.
    """

    fc6_alive: float
    fc7_alive: float
    logit_spread: float

    @classmethod
    def of(cls, line: Epoch) -> Health:
        """As a line of metrics.jsonl has it."""
        return cls(*(line[name] for name in cls._fields))

    @property
    def is_dead(self) -> bool:
        return min(self.fc6_alive, self.fc7_alive) < FEWEST_ALIVE and self.logit_spread < LEAST_SPREAD


class Watch:
    """Within the block, looks at what fc6, fc7 and the last layer return; the device is asked once, by `health`."""

    def __init__(self, model: AlexNet) -> None:
        self._layers = [model.classifier[i] for i in (1, 4, 6)]
        self._extremes: dict[Any, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Watch:
        self._handles = [layer.register_forward_hook(self._look) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, layer: Any, inputs: Any, output: Tensor) -> None:
        # the smallest value by its opposite: then largest_over_processes serves both
        extremes = torch.stack([output.amax(0), -output.amin(0)]).float()
        known = self._extremes.get(layer)
        self._extremes[layer] = extremes if known is None else torch.maximum(known, extremes)

    def health(self) -> Health:
        """Of the whole set, in every process.  Every process must ask."""
        fc6, fc7, last = self._layers
        spread = distributed.largest_over_processes(self._extremes[last]).sum(0).mean()
        return Health(*torch.stack([self._alive(fc6), self._alive(fc7), spread]).tolist())

    def _alive(self, layer: Any) -> Tensor:
        alive = (self._extremes[layer][0] > 0).float()
        units = layer.weight.shape[0]
        if len(alive) == units:  # each process has seen pictures of its own
            return distributed.largest_over_processes(alive).mean()
        return distributed.sum_over_processes(alive.sum()) / units


def check_health(history: Sequence[Epoch], recipe: Recipe) -> None:
    """Raises DeadNetwork where the last two epochs ended with a dead network."""
    if len(history) < 2 or not all(Health.of(line).is_dead for line in history[-2:]):
        return
    health = Health.of(history[-1])
    raise DeadNetwork(
        f"the network is dead since epoch {history[-2]['epoch']}: {health.fc6_alive:.1%} of fc6's units and "
        f"{health.fc7_alive:.1%} of fc7's answer any test picture, and its logits differ by {health.logit_spread:.1g} "
        f"between pictures. It cannot learn from here: start anew with a lower learning rate (it was {recipe.lr:g}) or "
        "another recipe"
    )
