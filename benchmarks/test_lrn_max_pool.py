"""Normalisation and pooling in one, as after the paper's first two convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DTYPES, Case, Race
from benchmarks.providers import OPERATION, entries, half_at_128, normal, operation_race
from benchmarks.shapes import NORM, NORM_LAYERS, matrix
from fastalex import functional as FF
from fastalex import reference

CUDA = [
    Case("lrn_max_pool", passes, dtype, (batch, *shape), layer)
    for layer, shape in NORM_LAYERS.items()
    for batch, dtype, passes in matrix(("fp32", "fp16", "bf16"))
]
CPU = [
    Case("lrn_max_pool", passes, "fp32", (8, *shape), layer)
    for layer, shape in NORM_LAYERS.items()
    for passes in ("forward", "both")
]
CPU_LONG = [replace(case, shape=(32, *case.shape[1:])) for case in CPU]


def exact(x: Tensor) -> Tensor:
    return reference.lrn_max_pool2d(x, *NORM, (3, 3), (2, 2))


def prepare(case: Case, names: list[str]) -> Race:
    size = DTYPES[case.dtype].itemsize

    def moved(inputs: int, output: int) -> int:
        """The least that a training step moves, with one byte per window; forward alone is inference."""
        forward, backward = inputs + output, 2 * inputs + output + output // size
        return {"forward": forward, "backward": backward, "both": forward + output // size + backward}[case.passes]

    return operation_race(
        case,
        names,
        # what a ReLU lets through: with its zeros, `after_relu` would rightly give another gradient than eager's
        inputs=[normal(*case.shape).abs()],
        ours=lambda x: FF.lrn_max_pool2d(x, *NORM, after_relu=True),
        eager=lambda x: F.max_pool2d(F.local_response_norm(x, *NORM), 3, 2),
        reference=exact,
        bytes=moved,
        almost_ties=True,
    )


@entries(CPU, CUDA, OPERATION, cpu_compile=CPU[1:2], cpu_long=CPU_LONG, cuda_quick=half_at_128)
def test_lrn_max_pool(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare)
