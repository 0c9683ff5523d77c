"""Operator `fastalex::conv2d_relu`.  Saves input, weight and output; the ReLU mask is the sign of the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import backend
from fastalex.kernels.layout import memory_format
from fastalex.ops.common import (
    call,
    dense,
    device_of,
    differentiable,
    empty,
    implementation,
    operator,
    refuse_double_backward,
)

NAME = "conv2d_relu"


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The library's convolution, then bias and ReLU in one pass over its output (on a CPU inside it)."""
    if backend.takes_triton(NAME, input):
        sums = F.conv2d(input, weight, None, stride, padding, dilation, groups)
        output = implementation("bias_relu", NAME, input).bias_relu_(sums, bias)
    else:
        output = implementation("conv_relu", NAME, input).conv_relu_fwd(
            input, weight, bias, stride, padding, dilation, groups
        )
    return output.contiguous(memory_format=output_format(input, weight))


def gradients(
    grad: Tensor,
    bias_grad: Tensor | None,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's gradients from the gradient of its output; empty where `needs` (input, weight, bias) says no.

    `bias_grad` is the bias gradient where a kernel above has summed it already.
    """
    need_bias = needs[2] and bias_grad is None
    grad_input, grad_weight, summed = torch.ops.aten.convolution_backward(
        grad.contiguous(memory_format=output_format(input, weight)),
        input,
        weight,
        [weight.shape[0]] if need_bias else None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [needs[0], needs[1], need_bias],
    )
    none = input.new_empty(0)
    return (
        grad_input.contiguous(memory_format=memory_format(input)) if needs[0] else none,
        grad_weight.contiguous(memory_format=memory_format(weight)) if needs[1] else none.clone(),
        (summed if need_bias else bias_grad.to(weight.dtype)) if needs[2] else none.clone(),  # type: ignore[union-attr]
    )


def output_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last where the input or the weight is, as torch's convolutions do."""
    if memory_format(weight) is torch.channels_last:
        return torch.channels_last
    return memory_format(input)


def output_shape(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    spatial = (
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return (input.shape[0], weight.shape[0], *spatial)


@operator("fastalex::conv2d_relu")
def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    with device_of(input):
        return forward(dense(input), dense(weight), bias, stride, padding, dilation, groups)


@conv2d_relu.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return torch.empty(
        output_shape(input, weight, stride, padding, dilation),
        dtype=input.dtype,
        device=input.device,
        memory_format=output_format(input, weight),
    )


@operator("fastalex::conv2d_relu_backward")
def conv2d_relu_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (input, weight, bias), empty where `needs` says no."""
    with device_of(input):
        bias_grad = None
        if backend.takes_triton(NAME, input):
            kernels = implementation("relu_bias_grad", NAME, input)
            grad, bias_grad = kernels.relu_bias_grad(grad, output, bias=needs[2])
        else:
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        return gradients(grad, bias_grad, dense(input), dense(weight), stride, padding, dilation, groups, needs)


def fake_gradients(input: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty(input, input.shape) if needs[0] else input.new_empty(0),
        empty(weight, weight.shape) if needs[1] else input.new_empty(0),
        weight.new_empty(weight.shape[0]) if needs[2] else input.new_empty(0),
    )


@conv2d_relu_backward.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(input, weight, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.parameters = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = call(conv2d_relu_backward, grad, input, weight, output, *ctx.parameters, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


differentiable(conv2d_relu, _setup_context, _backward)
refuse_double_backward(conv2d_relu_backward, NAME)
