"""How many operations each operator stands for, as torch.utils.flop_counter counts: two per product, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fastalex.kernels.geometry import output_size
from fastalex.ops.geometry import Conv

OPS = torch.ops.fastalex
Shape = Sequence[int]


def convolution(input: Shape, weight: Shape, geometry: Sequence[int]) -> int:
    conv = Conv.of(geometry)
    out = output_size(input[2:], weight[2:], conv.stride, conv.padding, conv.dilation)
    return 2 * input[0] * math.prod(out) * math.prod(weight)


@register_flop_formula([OPS.conv2d_relu, OPS.conv2d_relu_pool])
def _(input: Shape, weight: Shape, bias: Shape | None, geometry: list[int], *rest: Any, **_: Any) -> int:
    return convolution(input, weight, geometry)


@register_flop_formula(OPS.conv2d_relu_backward)
def _(grad: Shape, input: Shape, weight: Shape, output: Shape, geometry: list[int], needs: list[bool], **_: Any) -> int:
    return sum(needs[:2]) * convolution(input, weight, geometry)


@register_flop_formula(OPS.conv2d_relu_pool_backward)
def _(grad: Shape, codes: Shape, activation: Shape, input: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    geometry, _norm, needs = rest
    return sum(needs[:2]) * convolution(input, weight, geometry)


@register_flop_formula(OPS.linear_relu_dropout)
def _(input: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    return 2 * math.prod(input[:-1]) * math.prod(weight)


@register_flop_formula(OPS.linear_relu_dropout_backward)
def _(grad: Shape, input: Shape, weight: Shape, output: Shape, p: float, needs: list[bool], **_: Any) -> int:
    return sum(needs[:2]) * 2 * math.prod(input[:-1]) * math.prod(weight)


@register_flop_formula(
    [
        OPS.local_response_norm,
        OPS.local_response_norm_backward,
        OPS.max_pool2d,
        OPS.max_pool2d_backward,
        OPS.max_pool2d_indices,
        OPS.lrn_max_pool2d,
        OPS.lrn_max_pool2d_backward,
        OPS.augment,
        OPS.crops,
        OPS.feature_distance,
        OPS.feature_distance_backward,
    ]
)
def _(*args: Any, **_: Any) -> int:
    """Neither does torch count its own."""
    return 0
