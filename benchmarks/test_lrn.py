"""Local response normalisation as the paper's first two layers have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from benchmarks.harness import Case, Race
from benchmarks.providers import OPERATION, entries, half_at_128, normal, operation_race
from benchmarks.shapes import NORM, NORM_LAYERS, matrix
from fastalex import functional as FF
from fastalex import reference

CUDA = [
    Case("lrn", passes, dtype, (batch, *shape), layer)
    for layer, shape in NORM_LAYERS.items()
    for batch, dtype, passes in matrix(("fp32", "fp16", "bf16"))
]
CPU = [
    Case("lrn", passes, "fp32", (8, *shape), layer)
    for layer, shape in NORM_LAYERS.items()
    for passes in ("forward", "both")
]
CPU_LONG = [replace(case, shape=(32, *case.shape[1:])) for case in CPU]


def prepare(case: Case, names: list[str]) -> Race:
    # x in, y out; x and the gradient in, a gradient out
    factor = {"forward": 1, "backward": 2, "both": 3}[case.passes]
    return operation_race(
        case,
        names,
        inputs=[normal(*case.shape)],
        ours=lambda x: FF.local_response_norm(x, *NORM),
        eager=lambda x: F.local_response_norm(x, *NORM),
        reference=lambda x: reference.local_response_norm(x, *NORM),
        bytes=lambda inputs, output: factor * inputs + output * (2 if case.passes == "both" else 1),
    )


@entries(CPU, CUDA, OPERATION, cpu_compile=CPU[1:2], cpu_long=CPU_LONG, cuda_quick=half_at_128)
def test_lrn(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare)
