"""`fastalex tune`: time the candidates of every layer of a model on this machine, and keep what was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastalex import dispatch
from fastalex.dispatch import Measurement
from fastalex.ops.common import device_of
from fastalex.ops.conv_candidates import CONV2D_INPUT_GRAD
from fastalex.ops.explanation import dispatched, operator_calls


def tune_model(
    model: nn.Module, images: Tensor, *, training: bool = True, rounds: int = dispatch.ROUNDS
) -> Iterator[tuple[str, Measurement]]:
    """Measure each layer for batches like `images`, save it at once, and yield (key, measurement).

    Each is measured with torch.backends.cudnn.benchmark on and off, and with its other settings as they are.
    training=False leaves the gradients out.  Layers without a choice and keys that come twice are skipped.
    """
    was_training = model.training
    model.eval()  # with dropout, a linear layer has no choice
    calls = operator_calls(model, images)
    model.train(was_training)
    done = set()
    for i, (name, args) in enumerate(calls):
        for operation, arguments in dispatched(name, args, training=training):
            if i == 0 and operation is CONV2D_INPUT_GRAD:
                continue  # nobody needs the gradient of the images
            real = tuple(_random_like(a) if isinstance(a, Tensor) else a for a in arguments)
            for benchmark in (True, False):
                with _cudnn_benchmark(benchmark), device_of(real[0]):
                    key = dispatch.table_key(operation, dispatch.flags(), real)
                    if key in done:
                        continue
                    done.add(key)
                    measurement = dispatch.tune(operation, *real, rounds=rounds)
                dispatch.save(dispatch.environment(real[0].device), {key: measurement})
                yield key, measurement


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
