"""A hidden layer: linear and ReLU.  Without dropout, whose random choice no two providers share."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from benchmarks.harness import Case, Race
from benchmarks.providers import entries, far_from_zero, half_at_128, normal, operation_race
from benchmarks.shapes import matrix
from fastalex import functional as FF
from fastalex import reference

PROVIDERS = ("fastalex", "eager", "compile", "compile-max-autotune")
LAYERS = {"fc6": 9216, "fc7": 4096}
CUDA = [
    Case("linear", passes, dtype, (batch, features), layer)
    for layer, features in LAYERS.items()
    for batch, dtype, passes in matrix(("fp32", "tf32", "fp16", "bf16"))
]
CPU = [Case("linear", passes, "fp32", (16, 9216), "fc6") for passes in ("forward", "both")]


def prepare(case: Case, names: list[str]) -> Race:
    features = case.shape[1]
    factors = {"forward": (1, 1), "backward": (2, 2), "both": (3, 3)}[case.passes]
    return operation_race(
        case,
        names,
        inputs=[
            normal(*case.shape),
            normal(4096, features, seed=2) / features**0.5,
            far_from_zero(4096),
        ],
        ours=lambda x, weight, bias: FF.linear_relu_dropout(x, weight, bias, training=False),
        eager=lambda x, weight, bias: F.relu(F.linear(x, weight, bias)),
        reference=lambda x, weight, bias: reference.linear_relu_dropout(x, weight, bias, 0.0, False),
        bytes=lambda inputs, output: factors[0] * inputs + factors[1] * output,
    )


@entries(CPU, CUDA, PROVIDERS, cuda_quick=half_at_128)
def test_linear(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare)
