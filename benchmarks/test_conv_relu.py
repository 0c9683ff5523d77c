"""Convolution, bias and ReLU of every layer of the paper's and torchvision's network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Race
from benchmarks.providers import (
    CONVOLUTION,
    FORCED,
    OPERATION,
    entries,
    far_from_zero,
    half_at_128,
    normal,
    operation_race,
)
from benchmarks.shapes import conv_layers, matrix
from fastalex import functional as FF
from fastalex import reference

LAYERS = conv_layers("paper") | conv_layers("torchvision")
CUDA = [
    Case("conv_relu", passes, dtype, (batch, *shape), layer)
    for layer, (_, shape) in LAYERS.items()
    for batch, dtype, passes in matrix(("fp32", "tf32", "fp16", "bf16"))
]
CPU = [
    Case("conv_relu", passes, "fp32", (8, *LAYERS[layer][1]), layer)
    for layer in ("paper-conv1", "paper-conv3")
    for passes in ("forward", "both")
]


def prepare(case: Case, names: list[str]) -> Race:
    conv, (channels, *_) = LAYERS[case.layer]
    fan_in = channels // conv.groups * conv.kernel_size**2
    parameters = (conv.stride, conv.padding, 1, conv.groups)
    # x and weight in, y out; for the gradients those and the gradient of y in, those of x and weight out
    factors = {"forward": (1, 1), "backward": (2, 2), "both": (3, 3)}[case.passes]

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, weight, bias, *parameters))

    return operation_race(
        case,
        names,
        inputs=[
            normal(*case.shape),
            normal(conv.channels, channels // conv.groups, *2 * (conv.kernel_size,), seed=2) / fan_in**0.5,
            far_from_zero(conv.channels),
        ],
        ours=lambda x, weight, bias: FF.conv2d_relu(x, weight, bias, *parameters),
        eager=eager,
        reference=lambda x, weight, bias: reference.conv2d_relu(x, weight, bias, *parameters),
        bytes=lambda inputs, output: factors[0] * inputs + factors[1] * output,
        tolerance=CONVOLUTION,
    )


def quick(case: Case) -> Sequence[str]:
    return half_at_128(case) if case.layer.startswith("paper") else ()


@entries(CPU, CUDA, (*OPERATION, *FORCED), cuda_quick=quick)
def test_conv_relu(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare)
