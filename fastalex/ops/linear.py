"""Operator `fastalex::linear_relu_dropout`.  No stored mask: the sign of the saved output carries ReLU and dropout.

On a CPU the weight and the bias may be wider than the input, as they are under autocast: the operator narrows them, and
gives their gradients in their own dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import backend, gpu
from fastalex.cpu.linear import linear_relu_fwd, narrowed, weight_grad
from fastalex.gpu import dispatch
from fastalex.gpu.linear import LINEAR_RELU
from fastalex.ops.common import call, device_of, differentiable, operator, refuse_double_backward

NAME = "linear_relu_dropout"


def as_rows(tensor: Tensor) -> Tensor:
    """(..., C) -> (N, C), packed; also where C is 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous()


@operator("fastalex::linear_relu_dropout")
def linear_relu_dropout(input: Tensor, weight: Tensor, bias: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    """(..., C) -> (..., K).  `seed`, an int64 tensor of one element on the input's device, chooses what p > 0 drops."""
    with device_of(input):
        rows = as_rows(input)
        if backend.takes_triton(NAME, input):
            if p > 0:
                output = gpu.bias_relu.bias_relu_(F.linear(rows, weight), bias, p=p, seed=seed)
            else:
                output = dispatch.choose(LINEAR_RELU, rows, weight, bias).candidate.run(rows, weight, bias)
        else:
            output = linear_relu_fwd(rows, weight, bias)
            if p > 0:
                generator = torch.Generator().manual_seed(int(seed))  # type: ignore[arg-type]
                output.mul_(torch.empty_like(output).bernoulli_(1 - p, generator=generator).div_(1 - p))
        return output.view(*input.shape[:-1], weight.shape[0])


@linear_relu_dropout.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@operator("fastalex::linear_relu_dropout_backward")
def linear_relu_dropout_backward(
    grad: Tensor, input: Tensor, weight: Tensor, output: Tensor, p: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (input, weight, bias), empty where `needs` says no."""
    with device_of(input):
        scale = 1 / (1 - p)
        grad_rows = as_rows(grad)
        output_rows = as_rows(output)
        rows = as_rows(input)
        bias_grad = None
        if backend.takes_triton(NAME, input):
            before_relu, bias_grad = gpu.relu_bias_grad.relu_bias_grad(
                grad_rows, output_rows, bias=needs[2], scale=scale
            )
        else:
            before_relu = torch.ops.aten.threshold_backward(grad_rows, output_rows, 0)
            if p > 0:
                before_relu.mul_(scale)
            if needs[2]:
                bias_grad = before_relu.sum(0, dtype=weight.dtype)
        none = input.new_empty(0)
        return (
            (before_relu @ narrowed(weight, input.dtype)).view(input.shape) if needs[0] else none,
            weight_grad(before_relu, rows, weight.dtype) if needs[1] else none.clone(),
            none.clone() if bias_grad is None else bias_grad.to(weight.dtype),
        )


@linear_relu_dropout_backward.register_fake
def _(
    grad: Tensor, input: Tensor, weight: Tensor, output: Tensor, p: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape) if needs[0] else input.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else input.new_empty(0),
        weight.new_empty(weight.shape[0]) if needs[2] else input.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, ctx.p, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = call(linear_relu_dropout_backward, grad, *ctx.saved_tensors, ctx.p, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


differentiable(linear_relu_dropout, _setup_context, _backward)
refuse_double_backward(linear_relu_dropout_backward, NAME)
