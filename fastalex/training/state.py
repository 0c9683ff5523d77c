"""A run's state: what it consists of between two steps, written whole and read back by any number of processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD

from fastalex import distributed
from fastalex.alexnet import AlexNet
from fastalex.checkpoint import MODEL, STATE, ModelCard, load_state, save_state, save_weights
from fastalex.data.image_sets import ImageSet
from fastalex.training.optimizer import set_lr, whole
from fastalex.training.progress import Epoch
from fastalex.training.recipes import Recipe


class State:
    """Model, optimizer, and how far they have come: all that the next step needs of those before it.

    step: of the whole run, the next one to take.  lr: of the step before.  history: the epochs that are done.
    Of the epoch under way: loss, the sum over this process's images; seconds; waited, those of them that went by
    waiting for images; shares, into which its order cuts the images (`fastalex.data.resident`).
    """

    def __init__(
        self,
        model: AlexNet,
        optimizer: SGD,
        scaler: torch.amp.GradScaler,
        data: ImageSet,
        recipe: Recipe,
        folder: Path,
        steps_per_epoch: int,
    ) -> None:
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._data, self._recipe, self._folder = data, recipe, folder
        self._steps_per_epoch = steps_per_epoch
        self.step = 0
        self.lr = recipe.lr
        self.history: list[Epoch] = []
        self.loss = torch.zeros((), device=next(model.parameters()).device)
        self.seconds = self.waited = 0.0
        self.shares: int = getattr(data, "shares", 1)
        self._saved_step = -1

    @property
    def steps_of_epoch(self) -> int:
        """The steps that the epoch under way has taken."""
        return self.step - len(self.history) * self._steps_per_epoch

    @property
    def is_saved(self) -> bool:
        """Whether this process has saved the state as it is."""
        return self._saved_step == self.step

    def end_epoch(self, line: Epoch) -> None:
        self.history.append(line)
        self.shares = getattr(self._data, "shares", 1)
        self.loss.zero_()  # where it lies, as a CUDA graph adds to it
        self.seconds = self.waited = 0.0

    # -- out

    def save(self) -> None:
        """Write state.pt, after every process has contributed.  Raises FloatingPointError for a ruined state."""
        loss = distributed.sum_over_processes(self.loss.clone())
        self.check_loss(loss)
        weights = self._whole_weights()
        momentum_buffers = {
            name: whole(state["momentum_buffer"])
            for name, p in self._parameters().items()
            if (state := self._optimizer.state.get(p))  # none where the layer is frozen, or no step was taken
        }
        if distributed.rank() == 0:
            save_state(
                self._folder / STATE,
                recipe=self._plain_recipe(),
                classes=list(self._data.classes),
                pictures=self._data.count("train"),
                shares=self.shares,
                step=self.step,
                weights=weights,
                velocity=momentum_buffers,
                rate=self.lr,
                scaler=self._scaler.state_dict(),
                history=self.history,
                loss=loss,
                seconds=self.seconds,
                waited=self.waited,
            )
        self._saved_step = self.step

    def share_buffers(self) -> None:
        """Gives every process rank 0's running statistics, as DistributedDataParallel does before each step."""
        for buffer in self._buffers().values():
            distributed.copy_from_rank_0(buffer)

    def save_model(self) -> None:
        """Write model.safetensors, as `save`."""
        weights = self._whole_weights()
        if distributed.rank() == 0:
            data = self._data
            card = ModelCard(self._model.variant, data.classes, data.preprocessing, self._recipe.dropout)
            save_weights(self._folder / MODEL, weights, card)

    def check_loss(self, loss: Tensor) -> None:
        """Raises FloatingPointError for one that is no longer a number."""
        if not torch.isfinite(loss):
            raise self._diverged()

    def _whole_weights(self) -> dict[str, Tensor]:
        """The model's, of one process; every process must ask.  Raises FloatingPointError if they are ruined."""
        weights = {name: whole(tensor.detach()) for name, tensor in (self._parameters() | self._buffers()).items()}
        # an infinite gradient ruins them a step before the loss shows it
        if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
            raise self._diverged()
        return weights

    def _diverged(self) -> FloatingPointError:
        state = self._folder / STATE
        saved = f"; {state} holds an earlier step" if state.exists() else ""
        return FloatingPointError(
            f"the loss was not a number by step {self.steps_of_epoch} of epoch "
            f"{len(self.history) + 1}: lower the learning rate (now {self.lr:g}){saved}"
        )

    # -- in

    def load(self) -> None:
        """Go on from the state.pt that rank 0 sees.

        Raises FileNotFoundError if there is none; ValueError if it is damaged or of another recipe or set.
        """
        state: dict[str, Any] = {}
        problem: Exception | None = None
        if distributed.rank() == 0:
            try:
                state = self._fitting_file()
            except (OSError, ValueError) as error:
                problem = error
        # in every process, so that none waits for another that has ended
        if (problem := distributed.from_rank_0(problem)) is not None:
            raise problem
        weights, momentum_buffers = state.pop("weights", {}), state.pop("velocity", {})
        state = distributed.from_rank_0(state)
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                fill_from_rank_0(buffer, weights.get(name))
            for name, parameter in self._parameters().items():
                fill_from_rank_0(parameter, weights.get(name))
                if state["step"] > 0 and parameter.requires_grad:
                    buffer = torch.zeros_like(parameter)
                    fill_from_rank_0(buffer, momentum_buffers.get(name))
                    self._optimizer.state[parameter]["momentum_buffer"] = buffer
        self.lr = state["rate"]
        set_lr(self._optimizer, self.lr, in_velocity=False)
        self._scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        if self.steps_of_epoch:
            self.shares = state.get("shares", 1)
        if distributed.rank() == 0:  # the others' shares are in it
            self.loss.copy_(state["loss"])
        self.seconds, self.waited = state["seconds"], state["waited"]

    def _fitting_file(self) -> dict[str, Any]:
        """What state.pt holds, if it belongs to this recipe and this set."""
        folder, count = self._folder, self._data.count("train")
        state = load_state(folder / STATE)
        # a run may become longer or shorter
        state["recipe"]["epochs"] = self._recipe.epochs
        for name, now in (("recipe", self._plain_recipe()), ("classes", list(self._data.classes))):
            if state[name] != now:
                raise ValueError(f"{folder} was trained with another {difference(name, state[name], now)}")
        if state["pictures"] != count:
            raise ValueError(f"{folder} was trained with {state['pictures']:,} pictures, not {count:,}")
        own = getattr(self._data, "shares", 1)
        if state["step"] > len(state["history"]) * self._steps_per_epoch and own not in (1, state.get("shares", 1)):
            raise ValueError(
                f"{folder} stopped within an epoch whose order is not that of {own} shares of the pictures: go on with "
                "as many processes as before, or with --keep nothing"
            )
        return state

    # -- both

    def _parameters(self) -> dict[str, nn.Parameter]:
        """By the names that they have in an AlexNet of one process."""
        return {name.replace("features.module.", "features."): p for name, p in self._model.named_parameters()}

    def _buffers(self) -> dict[str, Tensor]:
        """Batch normalisation's running statistics, by their names."""
        return {name.replace("features.module.", "features."): b for name, b in self._model.named_buffers()}

    def _plain_recipe(self) -> dict[str, Any]:
        """The recipe in the plain types that torch.load(weights_only=True) accepts."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self._recipe)))
        return plain


def fill_from_rank_0(target: Tensor, values: Tensor | None) -> None:
    """Gives every process rank 0's values, or its part of them."""
    plain = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    if values is not None:
        plain.copy_(values)
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(plain, target.device_mesh, target.placements))  # takes those of its rank 0
    else:
        distributed.copy_from_rank_0(plain)
        target.copy_(plain)


def difference(name: str, before: Any, now: Any) -> str:
    """What differs between two recipes, or two lists of classes, in a few words."""
    if name != "recipe":
        return f"set of classes: {len(before)} ({before[0]}, ...), not {len(now)} ({now[0]}, ...)"
    fields = [f"{key} was {before.get(key)!r}, not {now[key]!r}" for key in now if before.get(key) != now[key]]
    return f"recipe: {'; '.join(fields) or 'it has other fields'}"
