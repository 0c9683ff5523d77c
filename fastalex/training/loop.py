"""The training loop, in plain PyTorch, for one process or many.

The order of the pictures follows from the recipe's seed and the epoch, the crop and colours of a picture from these and
its number.  A batch is cut into pieces, one for each process (and, with gradient accumulation, several); before each
piece the random generators start from a seed made of the recipe's, the step and the piece, which fixes the dropout.
So nothing random needs saving: any step is a complete restart point, a run that was killed and resumed ends with the
same weights as one that was not, and N processes compute what one process computes that accumulates N pieces, up to
rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from fastalex import distributed
from fastalex.alexnet import AlexNet
from fastalex.checkpoint import MODEL, STATE, ModelCard, load_state, save_state, save_weights
from fastalex.data.augmentation import augment
from fastalex.data.image_sets import ImageSet
from fastalex.evaluation.metrics import Scores, evaluate
from fastalex.files import write_whole
from fastalex.parallel import one_weird_trick
from fastalex.training.optimizer import make_optimizer, rate_at, set_rate, whole
from fastalex.training.recipes import Recipe

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
METRICS = "metrics.jsonl"
IGNORED = -100  # the label that cross_entropy leaves out

# Many processes agree on stopping and saving only this often: asking is a message between all of them, 0.1 ms to
# 1 ms, where a step on a fast GPU takes 5 ms.
AGREE_EVERY = 8
# Reading the loss makes the host wait for the device, so a diverging run goes on for at most this many steps.
CHECK_LOSS_EVERY = 100

Epoch = dict[str, Any]
"""One line of metrics.jsonl: epoch, train_loss, test_loss, top1, top5, lr (of the epoch's last step), seconds,
images_per_second, data_wait (the share of those seconds that the loop waited for pictures), peak_memory_bytes (of the
GPU's allocator, or of the process)."""


@dataclass(frozen=True)
class Options:
    """How a run is carried out, which is no part of the recipe.

    accumulate: pieces into which each process cuts its share of a batch, to save memory.
    compile: the model through torch.compile.
    parallel: of several processes: "data" gives each the whole model, "hybrid" a share of each fully connected layer
        (`fastalex.parallel.one_weird_trick`).
    save_minutes, save_steps: how often the state is saved within an epoch.
    tensorboard: the lines of metrics.jsonl as curves too, in the folder's `tensorboard`.
    """

    accumulate: int = 1
    compile: bool = False
    parallel: Literal["data", "hybrid"] = "data"
    save_minutes: float = 10.0
    save_steps: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.save_steps is not None and self.save_steps < 1:
            raise ValueError(f"save_steps must be at least 1, got {self.save_steps}")
        if not self.save_minutes >= 0:
            raise ValueError(f"save_minutes must not be negative, got {self.save_minutes}")


class Watcher:
    """Told what happens during training; this one keeps silent."""

    def epoch_begins(self, epoch: int, images_done: int) -> None: ...

    def batch_done(self, images: int) -> None: ...

    def epoch_ends(self, metrics: Epoch) -> None: ...


class Stopped(Exception):
    """Training ended early, on a signal; unless the message says otherwise its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


def train(
    model: AlexNet,
    data: ImageSet,
    recipe: Recipe,
    folder: Path,
    *,
    options: Options | None = None,
    resume: bool = False,
    watcher: Watcher | None = None,
) -> list[Epoch]:
    """Train the model.  Writes model.safetensors and metrics.jsonl to `folder` after each epoch, state.pt more often.

    Returns the lines of metrics.jsonl.  With `resume` the run in `folder` goes on where its state was saved.

    Raises FileNotFoundError if there is nothing to resume; ValueError if that was another recipe or set, or the file
    cannot be read; OSError if a file cannot be written; FloatingPointError when the loss is no longer a number;
    Stopped after SIGTERM or Ctrl-C, once the state is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(model, data, recipe, folder, options or Options(), watcher or Watcher())
    if resume:
        run.load()
    with run.caught_signals():
        run.finish()
    return run.history


class Run:
    """A training run: what its state consists of, and how it advances."""

    def __init__(
        self, model: AlexNet, data: ImageSet, recipe: Recipe, folder: Path, options: Options, watcher: Watcher
    ) -> None:
        self.model, self.data, self.recipe, self.folder = model, data, recipe, folder
        self.options, self.watcher = options, watcher
        self.device = next(model.parameters()).device
        self.rank, self.size = distributed.rank(), distributed.size()
        self.pieces = self.size * options.accumulate
        if recipe.batch_size < self.pieces:
            raise ValueError(
                f"batch_size must be at least the number of processes times accumulate, {self.pieces}, "
                f"got {recipe.batch_size}"
            )
        self.steps_per_epoch = recipe.steps_per_epoch(data.count("train"))
        self.forward = prepare(model, data, recipe, options, self.device)
        self.optimizer = make_optimizer(model, recipe)  # of the parameters that are left in this process
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")

        self.rate = recipe.lr  # of the step before
        self.step = 0  # of the whole run: the next one to take
        self.history: list[Epoch] = []
        # of the epoch under way
        self.loss = torch.zeros((), device=self.device)
        self.seconds = self.waited = 0.0

        self.mark = self.saved = time.perf_counter()
        self.saved_step = -1
        self.signal: int | None = None
        self.evaluating = False

    # -- advancing

    def finish(self) -> None:
        self.write_metrics()
        writes = self.options.tensorboard and self.rank == 0
        writer = open_tensorboard(self.folder, len(self.history) + 1) if writes else None
        while len(self.history) < self.recipe.epochs:
            try:
                self.train_epoch()
                scores = self.evaluate()
            except Stopped:
                # the others may be elsewhere, so many processes save together or not at all
                if self.size == 1 and self.saved_step != self.step:
                    self.save()
                raise
            line = self.end_epoch(scores)
            if writer is not None:
                for name, value in line.items():
                    writer.add_scalar(name, value, line["epoch"])
                writer.flush()
            self.watcher.epoch_ends(line)
            if len(self.history) < self.recipe.epochs and self.agreed() == "stop":
                raise Stopped(self.signal or signal.SIGTERM)

    def train_epoch(self) -> None:
        """What is left of the epoch under way."""
        epoch = len(self.history)
        done = self.step - epoch * self.steps_per_epoch
        batches = self.batches_of(epoch)
        mine = slice(self.rank * self.options.accumulate, (self.rank + 1) * self.options.accumulate)
        pieces = [piece for b in batches[done:] for piece in distributed.equal_shares(b, self.pieces)[mine]]
        self.watcher.epoch_begins(epoch + 1, sum(map(len, batches[:done])))
        self.model.train()
        self.mark = time.perf_counter()
        pictures = iter(self.data.batches("train", [indices for indices, _ in pieces]))
        work = iter(pieces)
        for batch in batches[done:]:
            self.take_step(pictures, work, len(batch))
            self.watcher.batch_done(len(batch))
            now = time.perf_counter()
            self.seconds += now - self.mark
            self.mark = now
            if self.step % CHECK_LOSS_EVERY == 0:
                self.check_loss(self.loss)
            what = self.agreed()
            if what != "go on":
                self.save()
            if what == "stop":
                raise Stopped(self.signal or signal.SIGTERM)

    def batches_of(self, epoch: int) -> list[Tensor]:
        """The indices of the pictures in each batch of the epoch, the same in every process."""
        order = self.data.order("train", self.recipe.seed, epoch)
        return list(order.split(self.recipe.batch_size)[: self.steps_per_epoch])

    def take_step(
        self, pictures: Iterator[tuple[Tensor, Tensor]], work: Iterator[tuple[Tensor, int]], batch_size: int
    ) -> None:
        recipe, device = self.recipe, self.device
        amp = AMP_DTYPES[recipe.amp]
        self.rate = rate_at(recipe, self.step, self.steps_per_epoch, [1 - line["top1"] for line in self.history])
        set_rate(self.optimizer, self.rate, in_velocity=recipe.lr_in_velocity)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros_like(self.loss)
        for i in range(self.options.accumulate):
            images, labels = self.fetch(pictures)
            torch.manual_seed(seed_of(recipe.seed, "step", self.step, self.rank * self.options.accumulate + i))
            indices, counting = next(work)
            images = self.augmented(images.to(device, non_blocking=True), indices)
            labels = labels.to(device, non_blocking=True)
            if counting < len(labels):
                labels = torch.where(torch.arange(len(labels), device=device) < counting, labels, IGNORED)
            with self.gradients_stay_here(i < self.options.accumulate - 1):
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
        self.loss += total
        self.step += 1

    def augmented(self, images: Tensor, indices: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> the model's input (N, C, crop, crop), another for each picture in each epoch."""
        looks, recipe = self.data.preprocessing, self.recipe
        if looks.channels != 3:
            return looks.for_training(images)
        seed = seed_of(recipe.seed, "pictures", self.step // self.steps_per_epoch)
        colours = getattr(self.data, "colours", None) if recipe.colours else None
        return augment(images, indices, seed, looks, colours=colours, dtype=AMP_DTYPES[recipe.amp] or torch.float32)

    def gradients_stay_here(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        if wanted and isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def fetch(self, pictures: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        try:
            return next(pictures)
        except RuntimeError:
            # a signal to all processes reaches those that read pictures too, and may end them
            if self.signal is None:
                raise
            raise Stopped(self.signal) from None
        finally:
            self.waited += time.perf_counter() - started

    def evaluate(self) -> Scores:
        # with one process nothing changes during evaluation, so a signal may end it at once
        self.evaluating = self.size == 1
        try:
            if self.evaluating and self.signal is not None:
                raise Stopped(self.signal)
            return evaluate(self.model, self.data)
        finally:
            self.evaluating = False

    def end_epoch(self, scores: Scores) -> Epoch:
        loss = distributed.sum_over_processes(self.loss)
        self.check_loss(loss)
        weights = self.whole_weights()
        pictures = min(self.data.count("train"), self.steps_per_epoch * self.recipe.batch_size)
        line: Epoch = {
            "epoch": len(self.history) + 1,
            "train_loss": loss.item() / pictures,
            "test_loss": scores.loss,
            "top1": scores.top1,
            "top5": scores.top5,
            "lr": self.rate,
            "seconds": self.seconds,
            "images_per_second": pictures / self.seconds,
            "data_wait": self.waited / self.seconds,
            "peak_memory_bytes": peak_memory(self.device),
        }
        self.history.append(line)
        self.loss = torch.zeros_like(self.loss)
        self.seconds = self.waited = 0.0
        if self.rank == 0:
            card = ModelCard(self.model.variant, self.data.classes, self.data.preprocessing, self.recipe.dropout)
            save_weights(self.folder / MODEL, weights, card)
        self.save()
        self.write_metrics()
        return line

    def check_loss(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise self.diverged()

    def diverged(self) -> FloatingPointError:
        state = self.folder / STATE
        saved = f"; {state} holds an earlier step" if state.exists() else ""
        return FloatingPointError(
            f"the loss was not a number by step {self.step - len(self.history) * self.steps_per_epoch} of epoch "
            f"{len(self.history) + 1}: lower the learning rate (now {self.rate:g}){saved}"
        )

    # -- never losing work

    @contextlib.contextmanager
    def caught_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C let the step under way finish; a second one of its kind acts as ever.

        What the process was told to ignore when it was started (nohup, `&` in a script) stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread
            yield
            return

        def catch(number: int, frame: object) -> None:
            signal.signal(number, before[number])
            self.signal = number
            if self.evaluating:
                raise Stopped(number)

        heeded = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
        before: dict[int, Any] = {n: signal.signal(n, catch) for n in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> Literal["go on", "save", "stop"]:
        """What to do after this step, the same in every process."""
        by_steps = self.options.save_steps is not None and self.step % self.options.save_steps == 0
        last = self.step % self.steps_per_epoch == 0
        if self.size > 1 and self.step % AGREE_EVERY and not last:
            return "save" if by_steps else "go on"
        due = by_steps or time.perf_counter() - self.saved >= 60 * self.options.save_minutes
        wish = 2 if self.signal is not None else 1 if due else 0
        return ("go on", "save", "stop")[distributed.largest(wish, self.device)]  # type: ignore[return-value]

    def save(self) -> None:
        """Write state.pt, after every process has contributed."""
        loss = distributed.sum_over_processes(self.loss.clone())
        self.check_loss(loss)
        weights = self.whole_weights()
        velocity = {
            name: whole(state["momentum_buffer"]) if (state := self.optimizer.state[p]) else None
            for name, p in self.parameters().items()
        }
        if self.rank == 0:
            save_state(
                self.folder / STATE,
                recipe=self.described(),
                classes=list(self.data.classes),
                pictures=self.data.count("train"),
                step=self.step,
                weights=weights,
                velocity=velocity,
                rate=self.rate,
                scaler=self.scaler.state_dict(),
                history=self.history,
                loss=loss,
                seconds=self.seconds,
                waited=self.waited,
            )
        self.saved, self.saved_step = time.perf_counter(), self.step

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's, of one process; every process must ask.  Raises FloatingPointError if they are ruined."""
        weights = {name: whole(p.detach()) for name, p in self.parameters().items()}
        # an infinite gradient ruins them a step before the loss shows it
        if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
            raise self.diverged()
        return weights

    def load(self) -> None:
        """Go on from the state.pt that rank 0 sees.  Raises FileNotFoundError or ValueError, as `train` says."""
        state: dict[str, Any] = {}
        problem: Exception | None = None
        if self.rank == 0:
            try:
                state = self.fitting_state()
            except (OSError, ValueError) as error:
                problem = error
        # in every process, so that none waits for another that has ended
        if (problem := distributed.from_rank_0(problem)) is not None:
            raise problem
        weights, velocity = state.pop("weights", {}), state.pop("velocity", {})
        state = distributed.from_rank_0(state)
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                fill_from_rank_0(parameter, weights.get(name))
                if state["step"] > 0:
                    buffer = torch.zeros_like(parameter)
                    fill_from_rank_0(buffer, velocity.get(name))
                    self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.rate = state["rate"]
        set_rate(self.optimizer, self.rate, in_velocity=False)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        if self.rank == 0:  # the others' shares are in it
            self.loss.copy_(state["loss"])
        self.seconds, self.waited = state["seconds"], state["waited"]

    def fitting_state(self) -> dict[str, Any]:
        """What state.pt holds, if it belongs to this recipe and this set."""
        state = load_state(self.folder / STATE)
        for name, mine in (("recipe", self.described()), ("classes", list(self.data.classes))):
            if state[name] != mine:
                raise ValueError(f"{self.folder} was trained with another {difference(name, state[name], mine)}")
        if state["pictures"] != self.data.count("train"):
            raise ValueError(
                f"{self.folder} was trained with {state['pictures']:,} pictures, not {self.data.count('train'):,}"
            )
        return state

    def parameters(self) -> dict[str, nn.Parameter]:
        """By the names that they have in an AlexNet of one process."""
        return {name.replace("features.module.", "features."): p for name, p in self.model.named_parameters()}

    def described(self) -> dict[str, Any]:
        """The recipe in the plain types that torch.load(weights_only=True) accepts."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        return plain

    def write_metrics(self) -> None:
        if self.rank == 0:
            write_whole(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in self.history))


def prepare(model: AlexNet, data: ImageSet, recipe: Recipe, options: Options, device: torch.device) -> nn.Module:
    """The model as training calls it: compiled, in CUDA graphs, spread over processes, or as it is."""
    forward: nn.Module = model
    graphs = recipe.cuda_graphs and device.type == "cuda"
    if graphs and recipe.batch_size % distributed.size():
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, {distributed.size()}, for CUDA graphs, "
            f"got {recipe.batch_size}"
        )
    if options.parallel == "hybrid":
        if distributed.size() == 1:
            raise ValueError("parallel must be data for a single process, got hybrid")
        if options.compile or recipe.amp == "fp16":
            raise ValueError("parallel must be data with compile, and with amp fp16 (bf16 can be hybrid), got hybrid")
        return one_weird_trick(model, init_device_mesh(device.type, (distributed.size(),)))
    if options.compile:
        forward = cast(nn.Module, torch.compile(forward, mode="reduce-overhead" if graphs else None))
    elif graphs and options.accumulate == 1:  # a second replay would overwrite the first one's gradients
        crop, amp = data.preprocessing.crop, AMP_DTYPES[recipe.amp]
        pictures = recipe.batch_size // distributed.size()
        shape = (pictures, data.preprocessing.channels, crop, crop)
        sample = torch.empty(shape, dtype=amp, device=device, memory_format=torch.channels_last).zero_()
        model.train()
        with torch.autocast(device.type, amp, enabled=amp is not None, cache_enabled=False):
            forward = cast(nn.Module, torch.cuda.make_graphed_callables(model, (sample,)))
    if distributed.size() > 1:
        forward = nn.parallel.DistributedDataParallel(
            forward, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    return forward


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


def seed_of(*parts: int | str) -> int:
    """A seed in which every part counts; PyTorch's CPU generator looks at the low 32 bits of what it is given."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def difference(name: str, before: Any, now: Any) -> str:
    """What differs between two recipes, or two lists of classes, in a few words."""
    if name != "recipe":
        return f"set of classes: {len(before)} ({before[0]}, ...), not {len(now)} ({now[0]}, ...)"
    fields = [f"{key} was {before.get(key)!r}, not {now[key]!r}" for key in now if before.get(key) != now[key]]
    return f"recipe: {'; '.join(fields) or 'it has other fields'}"


def peak_memory(device: torch.device) -> int:
    """The most bytes in use at once so far: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def open_tensorboard(folder: Path, first_epoch: int) -> Any:
    """A writer that forgets the epochs from this one on.  Raises ValueError without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ValueError("this needs TensorBoard: pip install 'fastalex[tensorboard]'") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)
