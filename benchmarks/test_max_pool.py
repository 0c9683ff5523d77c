"""Overlapping max-pooling where AlexNet has no normalisation before it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from benchmarks.harness import DTYPES, Case, Race
from benchmarks.providers import OPERATION, entries, half_at_128, normal, operation_race
from benchmarks.shapes import POOL_LAYERS, matrix
from fastalex import functional as FF
from fastalex import reference

CUDA = [
    Case("max_pool", passes, dtype, (batch, *shape), layer)
    for layer, shape in POOL_LAYERS.items()
    for batch, dtype, passes in matrix(("fp32", "fp16", "bf16"))
]
CPU = [Case("max_pool", passes, "fp32", (8, 64, 55, 55), "torchvision-conv1") for passes in ("forward", "both")]


def prepare(case: Case, names: list[str]) -> Race:
    size = DTYPES[case.dtype].itemsize

    def moved(inputs: int, output: int) -> int:
        """The least that a training step moves, with one byte per window; forward alone is inference."""
        backward = inputs + output + output // size
        return {"forward": inputs + output, "backward": backward, "both": 2 * backward}[case.passes]

    return operation_race(
        case,
        names,
        inputs=[normal(*case.shape)],
        ours=lambda x: FF.max_pool2d(x, 3, 2),  # type: ignore[arg-type, return-value]
        eager=lambda x: F.max_pool2d(x, 3, 2),
        reference=lambda x: reference.max_pool2d(x, 3, 2),  # type: ignore[arg-type, return-value]
        bytes=moved,
    )


@entries(CPU, CUDA, OPERATION, cuda_quick=half_at_128)
def test_max_pool(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare)
