"""`fastalex tune`: time the candidates of every layer of a model on this machine, and keep what was found."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalex.alexnet import AlexNet
from fastalex.check.runner import Child, Context, Item, Log, Row, Stage, end, run_stage, watch
from fastalex.choices import dispatched, operator_calls
from fastalex.gpu import dispatch
from fastalex.gpu.convolution import CONV2D_INPUT_GRAD
from fastalex.gpu.dispatch import Measurement, Operation
from fastalex.ops.common import device_of
from fastalex.variants import VARIANTS


def tune_model(
    model: nn.Module, images: Tensor, *, training: bool = True, rounds: int = dispatch.ROUNDS, sweep: bool = False
) -> Iterator[tuple[str, Measurement]]:
    """Measure each layer for batches like `images`, save it at once, and yield (key, measurement).

    Each is measured with torch.backends.cudnn.benchmark on and off, and with its other settings as they are.
    training=False leaves the gradients out.  sweep: see `dispatch.tune`.  Layers without a choice and keys that come
    twice are skipped.
    """
    for operation, args in choices(model, images, training=training):
        where = dispatch.environment(args[0].device)
        for key, measurement in measured(operation, args, rounds, sweep):
            dispatch.save(where, {key: measurement})
            yield key, measurement


def choices(model: nn.Module, images: Tensor, *, training: bool) -> list[tuple[Operation, tuple[Any, ...]]]:
    """What the layers of a model can choose, each once, with random tensors for arguments."""
    was_training = model.training
    model.eval()  # with dropout, a linear layer has no choice
    calls = operator_calls(model, images)
    model.train(was_training)
    found: dict[str, tuple[Operation, tuple[Any, ...]]] = {}
    for number, (name, args) in enumerate(calls):
        for operation, arguments in dispatched(name, args, training=training):
            if number == 0 and operation is CONV2D_INPUT_GRAD:
                continue  # nobody needs the gradient of the images
            key = dispatch.table_key(operation, dispatch.flags(), arguments)
            if key not in found:
                real = tuple(_random_like(a) if isinstance(a, Tensor) else a for a in arguments)
                found[key] = operation, real
    return list(found.values())


def measured(
    operation: Operation, args: tuple[Any, ...], rounds: int, sweep: bool
) -> Iterator[tuple[str, Measurement]]:
    """(key, measurement) with torch.backends.cudnn.benchmark on and off; kernels of ours, which it does not concern,
    are timed once."""
    times: dict[str, float] = {}
    for benchmark in (True, False):
        with _cudnn_benchmark(benchmark), device_of(args[0]):
            key = dispatch.table_key(operation, dispatch.flags(), args)
            found = dispatch.tune(operation, *args, rounds=rounds, known=times, sweep=sweep)
        times = {name: ms for name, ms in found.milliseconds.items() if (c := operation.named(name)) and c.is_ours}
        yield key, found


@contextlib.contextmanager
def _cudnn_benchmark(on: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _random_like(fake: Tensor) -> Tensor:
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device).normal_()


# ------------------------------------------------------------------------------------------------- in processes
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """What `fastalex tune` goes through: every variant in every dtype at every batch size."""

    variants: Sequence[str]
    dtypes: Sequence[str]
    batches: Sequence[int]
    training: bool
    sweep: bool = False

    def items(self, context: Context) -> dict[str, Item]:
        """One for each family of kernels, so that one that takes the GPU with it loses its own alone."""
        families = (
            "conv2d_relu",
            "linear_relu",
            *(("conv2d_weight_grad", "conv2d_input_grad") if self.training else ()),
        )
        return {
            f"{variant} {dtype} {batch}/{family}": partial(self.family, variant, dtype, batch, family, context)
            for dtype, batch, variant in itertools.product(self.dtypes, self.batches, self.variants)
            for family in families
        }

    def family(self, variant: str, dtype: str, batch: int, family: str, context: Context) -> Row:
        """Images come as decoders leave them and in channels_last: only the first layer sees a difference."""
        number, crop = DTYPES[dtype], VARIANTS[variant].crop
        with torch.device(context.device):
            model = AlexNet(variant=VARIANTS[variant]).to(number)
            images = torch.zeros(batch, 3, crop, crop, dtype=number)
        found: dict[str, Row] = {}
        for layout in (torch.channels_last, torch.contiguous_format):
            given = images.contiguous(memory_format=layout)
            for operation, args in choices(model, given, training=self.training):
                if operation.name != family:
                    continue
                if not context.timed:
                    for candidate in operation.candidates.values():
                        if candidate.unsupported(*args) is None:
                            with contextlib.suppress(Exception):  # told when it is timed
                                candidate.run(*args)
                elif dispatch.table_key(operation, dispatch.flags(), args) not in found:
                    found |= {key: asdict(m) for key, m in measured(operation, args, dispatch.ROUNDS, self.sweep)}
        return {"where": dispatch.environment(torch.device(context.device)), "measurements": found}

    def stage(self) -> Stage:
        # a sweep compiles a dozen configurations of each layer while it times
        return Stage("tune", self.items, times=True, seconds=1800.0 if self.sweep else 300.0)


def tune(job: Job, path: Path, device: str = "cuda") -> Iterator[tuple[str, Measurement | str]]:
    """Compile in parallel processes, time in one, and add to the table at `path` what each family found.

    Yields (key, measurement), and (family, reason) for one that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder) / "tune.jsonl")
        command = [sys.executable, "-m", "fastalex.gpu.tuning", json.dumps(asdict(job)), str(log.path)]
        cores = os.cpu_count() or 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for phase, processes in (("warm", min(cores, len(job.items(Context(device))))), ("times", 1)):
            children = [
                Child(job.stage(), phase, i, processes, device, command, log, environment) for i in range(processes)
            ]
            watch(children, processes, float("inf"))
        for family, row in log.ended("times", "tune").items():
            if row["state"] == "failed":
                yield family, row["error"]
                continue
            found = {key: Measurement(**entry) for key, entry in row["measurements"].items()}
            dispatch.merge(path, row["where"], found)
            yield from found.items()
    dispatch.forget()


def main() -> None:
    job, path, _, phase, process, processes, device = sys.argv[1:8]
    stage = Job(**json.loads(job)).stage()
    run_stage(stage, Log(Path(path)), Context(device, phase == "times"), phase, int(process), int(processes))
    end()


if __name__ == "__main__":
    main()
