"""The training loop, in plain PyTorch, for one process or many.

The order of the images follows from the recipe's seed and the epoch, the crop and colours of an image from these and
its number.  A batch is cut into micro-batches, one for each process (and, with gradient accumulation, several); before
each the random generators start from a seed made of the recipe's, the step and its number, which fixes the dropout.
So nothing random needs saving: any step is a complete restart point, a run that was killed and resumed ends with the
same weights as one that was not, and N processes compute what one process computes that accumulates N micro-batches,
up to rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex import distributed
from fastalex.alexnet import AlexNet
from fastalex.data.augmentation import augment, moved
from fastalex.data.image_sets import ImageSet
from fastalex.data.resident import Held, held_on, keep, order_of_shares
from fastalex.evaluation.metrics import Scores, evaluate
from fastalex.files import write_whole
from fastalex.training.graphs import Replayed, is_one_graph
from fastalex.training.health import Health, Watch, check_health
from fastalex.training.optimizer import is_capturable, lr_at, lr_on_device, make_optimizer, set_lr
from fastalex.training.options import Options
from fastalex.training.prepare import AMP_DTYPES, prepare, train_mode
from fastalex.training.progress import Callback, Epoch, MetricsLog, peak_memory
from fastalex.training.recipes import Recipe
from fastalex.training.settings import SETTINGS
from fastalex.training.state import State
from fastalex.training.stopping import Stopped, Stopping

IGNORED = -100  # the label that cross_entropy leaves out

# Reading the loss makes the host wait for the device, so a diverging run goes on for at most this many steps.
CHECK_LOSS_EVERY = 100


def train(
    model: AlexNet,
    data: ImageSet,
    recipe: Recipe,
    folder: Path,
    *,
    options: Options | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    settings: str | None = None,
) -> list[Epoch]:
    """Train the model.  Writes model.safetensors and metrics.jsonl to `folder` after each epoch, state.pt more often.

    Returns the lines of metrics.jsonl.  With `resume` the run in `folder` goes on where its state was saved.
    settings: the content of settings.json, written as soon as it is clear that the run can go on.

    Raises FileNotFoundError if there is nothing to resume; ValueError if that was another recipe or set, or the file
    cannot be read; OSError if a file cannot be written; FloatingPointError when the loss is no longer a number, or,
    as DeadNetwork, when the network is dead; Stopped after SIGTERM or Ctrl-C, once the state is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(model, data, recipe, folder, options or Options(), callback or Callback())
    if resume:
        run.state.load()
    if settings is not None and run.rank == 0:
        write_whole(folder / SETTINGS, settings)
    with run.stopping.caught_signals():
        run.finish()
    return run.state.history


class MicroBatch(NamedTuple):
    """indices: int64 (N,), on the device, of which the first `counting` count; pictures: what lies there, or their
    images, uint8 (N, C, H, W), and labels."""

    indices: Tensor
    counting: int
    pictures: Held | tuple[Tensor, Tensor]


class Run:
    """A training run: how its state advances."""

    def __init__(
        self, model: AlexNet, data: ImageSet, recipe: Recipe, folder: Path, options: Options, callback: Callback
    ) -> None:
        self.model, self.recipe, self.folder = model, recipe, folder
        self.options, self.callback = options, callback
        self.device = next(model.parameters()).device
        self.data = keep(data, options.keep, self.device, micro_batches=options.accumulate, progress=callback.loading)
        self.rank, self.size = distributed.rank(), distributed.size()
        self.micro_batches = self.size * options.accumulate  # of each batch, in all processes together
        if recipe.batch_size < self.micro_batches:
            raise ValueError(
                f"batch_size must be at least the number of processes times accumulate, {self.micro_batches}, "
                f"got {recipe.batch_size}"
            )
        self.steps_per_epoch = recipe.steps_per_epoch(data.count("train"))
        # the pictures that `augment` reads where they lie
        self.held = held_on(self.data, "train", self.device)
        self.forward = prepare(model, data.preprocessing, recipe, options, self.device)
        self.optimizer = make_optimizer(model, recipe)  # of the parameters that are left in this process
        one_graph = is_one_graph(recipe, options, self.device) and is_capturable(self.optimizer)
        if one_graph:
            lr_on_device(self.optimizer, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.state = State(model, self.optimizer, self.scaler, self.data, recipe, folder, self.steps_per_epoch)
        self.stopping = Stopping(
            self.device,
            save_minutes=options.save_minutes,
            save_steps=options.save_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        self.seed = torch.zeros(1, dtype=torch.int64, device=self.device)  # of an epoch's crops, mirror images, colours
        self.replayed = Replayed(self.update_of) if one_graph else None
        self.mark = time.perf_counter()

    # -- epochs

    def finish(self) -> None:
        history = self.state.history
        log = MetricsLog(self.folder, history, tensorboard=self.options.tensorboard) if self.rank == 0 else None
        while len(history) < self.recipe.epochs:
            try:
                self.train_epoch()
                self.state.share_buffers()
                # with one process nothing changes during evaluation
                with self.stopping.at_once(), Watch(self.model) as watch:
                    scores = evaluate(self.model, self.data)
                    health = watch.health()
            except Stopped:
                # the others may be elsewhere, so many processes save together or not at all
                if self.size == 1 and not self.state.is_saved:
                    self.save()
                raise
            line = self.end_epoch(scores, health)
            if log is not None:
                log.write()
            self.callback.epoch_ends(line)
            check_health(history, self.recipe)
            if len(history) < self.recipe.epochs and self.stopping.agreed(self.state.step) == "stop":
                raise self.stopping.stopped()

    def train_epoch(self) -> None:
        """What is left of the epoch under way."""
        state = self.state
        epoch, done = len(state.history), state.steps_of_epoch
        batches = self.batches_of(epoch)
        own = slice(self.rank * self.options.accumulate, (self.rank + 1) * self.options.accumulate)
        shares = [share for b in batches[done:] for share in distributed.equal_shares(b, self.micro_batches)[own]]
        # in one copy, and from then on they lie where the step reads them
        order = torch.cat([torch.empty(0, dtype=torch.int64), *(indices for indices, _ in shares)])
        if self.held is not None:
            order = self.held.nearest(order)
        indices = moved(order, self.device).split([len(i) for i, _ in shares])
        self.seed.fill_(seed_of(self.recipe.seed, "pictures", epoch))
        self.callback.epoch_begins(epoch + 1, sum(map(len, batches[:done])))
        train_mode(self.model, self.recipe)
        self.mark = time.perf_counter()
        wanted = [] if self.held is not None else [indices for indices, _ in shares]
        loaded = iter(self.data.batches("train", wanted))
        placed = iter([(i, counting) for i, (_, counting) in zip(indices, shares, strict=True)])
        for batch in batches[done:]:
            self.take_step(loaded, placed, len(batch))
            self.callback.batch_done(len(batch))
            now = time.perf_counter()
            state.seconds += now - self.mark
            self.mark = now
            if state.step % CHECK_LOSS_EVERY == 0:
                state.check_loss(state.loss)
            what = self.stopping.agreed(state.step)
            if what != "go on":
                self.save()
            if what == "stop":
                raise self.stopping.stopped()

    def batches_of(self, epoch: int) -> list[Tensor]:
        """The indices of the images in each batch of the epoch, the same in every process."""
        shares, seed = self.state.shares, self.recipe.seed
        if shares == 1:
            order = self.data.order("train", seed, epoch)
        else:
            order = order_of_shares(self.data.count("train"), shares, seed, epoch)
        order = distributed.dealt(order, shares, self.recipe.batch_size)
        return list(order.split(self.recipe.batch_size)[: self.steps_per_epoch])

    def end_epoch(self, scores: Scores, health: Health) -> Epoch:
        state = self.state
        loss = distributed.sum_over_processes(state.loss)
        state.check_loss(loss)
        images = min(self.data.count("train"), self.steps_per_epoch * self.recipe.batch_size)
        line: Epoch = {
            "epoch": len(state.history) + 1,
            "train_loss": loss.item() / images,
            "test_loss": scores.loss,
            "top1": scores.top1,
            "top5": scores.top5,
            **health._asdict(),
            "lr": state.lr,
            "seconds": state.seconds,
            "images_per_second": images / state.seconds,
            "data_wait": state.waited / state.seconds,
            "peak_memory_bytes": peak_memory(self.device),
        }
        state.save_model()
        state.end_epoch(line)
        self.save()
        return line

    def save(self) -> None:
        self.state.save()
        self.stopping.saved()

    # -- a step

    def take_step(
        self, batches: Iterator[tuple[Tensor, Tensor]], shares: Iterator[tuple[Tensor, int]], batch_size: int
    ) -> None:
        """One update of the weights.

        batches: the images and labels of this process's micro-batches, none where they lie on the device; shares,
        their indices, there too, and how many of them count, as `distributed.equal_shares` has them; batch_size: images
        of the step in all processes together.
        """
        recipe, state = self.recipe, self.state
        state.lr = lr_at(recipe, state.step, self.steps_per_epoch, [1 - line["top1"] for line in state.history])
        set_lr(self.optimizer, state.lr, in_velocity=recipe.lr_in_velocity)
        micro_batches = self.micro_batches_of(batches, shares)
        if self.replayed is not None:  # batches are full: graphs need drop_last
            [(indices, _, pictures)] = micro_batches
            self.replayed(indices, *(() if isinstance(pictures, Held) else pictures))
        else:
            self.update(micro_batches, batch_size)
        state.step += 1

    def micro_batches_of(
        self, batches: Iterator[tuple[Tensor, Tensor]], shares: Iterator[tuple[Tensor, int]]
    ) -> Iterator[MicroBatch]:
        """Those of a step in this process; when one is handed out, the random generators start anew."""
        for i in range(self.options.accumulate):
            indices, counting = next(shares)
            pictures: Held | tuple[Tensor, Tensor] | None = self.held
            if pictures is None:
                images, labels = self.fetch(batches)
                pictures = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            micro_batch = self.rank * self.options.accumulate + i
            torch.manual_seed(seed_of(self.recipe.seed, "step", self.state.step, micro_batch))
            yield MicroBatch(indices, counting, pictures)

    def update(self, micro_batches: Iterable[MicroBatch], batch_size: int) -> None:
        """A step as a function of what lies on the device: nothing here reads it, so a CUDA graph may replay it all."""
        recipe, device = self.recipe, self.device
        amp = AMP_DTYPES[recipe.amp]
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros_like(self.state.loss)
        for i, micro_batch in enumerate(micro_batches):
            images, labels = self.augmented(micro_batch)
            if micro_batch.counting < len(labels):
                labels = torch.where(torch.arange(len(labels), device=device) < micro_batch.counting, labels, IGNORED)
            with self.no_sync(i < self.options.accumulate - 1):
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    logits = self.forward(images)
                    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=recipe.label_smoothing)
                # DistributedDataParallel divides the sum of gradients by the number of processes
                self.scaler.scale(loss * (self.size / batch_size)).backward()
            if recipe.label_smoothing:  # what is reported is comparable with the test loss
                loss = F.cross_entropy(logits.detach(), labels, reduction="sum")
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # summed on the device: reading it here would make the host wait for every step
        self.state.loss += total

    def update_of(self, indices: Tensor, *batch: Tensor) -> None:
        """The step of a full batch in one micro-batch."""
        pictures = (batch[0], batch[1]) if self.held is None else self.held
        self.update([MicroBatch(indices, len(indices), pictures)], self.recipe.batch_size)

    def fetch(self, micro_batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        try:
            return next(micro_batches)
        except RuntimeError:
            # a signal to all processes reaches those that read images too, and may end them
            if self.stopping.signal is None:
                raise
            raise Stopped(self.stopping.signal) from None
        finally:
            self.state.waited += time.perf_counter() - started

    def augmented(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The model's input (N, C, crop, crop), another for each image in each epoch, and the labels."""
        indices, _, pictures = micro_batch
        preprocessing, recipe = self.data.preprocessing, self.recipe
        if preprocessing.channels != 3:
            images, labels = pictures.take(indices) if isinstance(pictures, Held) else pictures
            return preprocessing.for_training(images), labels
        options: dict[str, Any] = {
            "colours": getattr(self.data, "colours", None) if recipe.colours else None,
            "dtype": AMP_DTYPES[recipe.amp] or torch.float32,
        }
        if isinstance(pictures, Held):
            options |= {"slots": pictures.slots_of(indices), "labels": pictures.labels}
            return augment(pictures.images, indices, self.seed, preprocessing, **options)
        images, labels = pictures
        return augment(images, indices, self.seed, preprocessing, **options), labels

    def no_sync(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Where wanted, leaves the gradients of a backward pass in this process, for a later one to average."""
        if wanted and isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return self.forward.no_sync()
        return contextlib.nullcontext()


def seed_of(*parts: int | str) -> int:
    """A seed in which every part counts; PyTorch's CPU generator looks at the low 32 bits of what it is given."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
