"""What a person may choose about a run beside its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """How a run is carried out, which is no part of the recipe.

    accumulate: micro-batches into which each process cuts its share of a batch, to save memory.
    compile: the model through torch.compile.
    parallel: of several processes: "data" gives each the whole model, "hybrid" a share of each fully connected layer
        (`fastalex.parallel.one_weird_trick`).
    keep: where the pictures lie, as `fastalex.data.resident.keep` has it.
    save_minutes, save_steps: how often the state is saved within an epoch.
    tensorboard: the lines of metrics.jsonl as curves too, in the folder's `tensorboard`.
    """

    accumulate: int = 1
    compile: bool = False
    parallel: Literal["data", "hybrid"] = "data"
    save_minutes: float = 10.0
    save_steps: int | None = None
    tensorboard: bool = False
    keep: Literal["auto", "on-device", "in-memory", "nothing"] = "auto"

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.save_steps is not None and self.save_steps < 1:
            raise ValueError(f"save_steps must be at least 1, got {self.save_steps}")
        if not self.save_minutes >= 0:
            raise ValueError(f"save_minutes must not be negative, got {self.save_minutes}")
