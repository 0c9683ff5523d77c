"""Operator `fastalex::conv2d_relu`.  Saves input, weight and output; the ReLU mask is the sign of the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalex import backend, dispatch
from fastalex.kernels.geometry import memory_format
from fastalex.ops.common import (
    call,
    device_of,
    differentiable,
    empty,
    implementation,
    operator,
    refuse_double_backward,
)
from fastalex.ops.conv_candidates import (
    CONV2D_INPUT_GRAD,
    CONV2D_RELU,
    CONV2D_WEIGHT_GRAD,
    output_format,
    output_size,
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
    """By the candidate that the dispatch chooses; on a CPU by the library, with bias and ReLU inside."""
    if backend.takes_triton(NAME, input):
        args = (input, weight, bias, stride, padding, dilation, groups)
        output = dispatch.choose(CONV2D_RELU, *args).candidate.run(*args)
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

    `bias_grad` is the bias gradient where a kernel above has summed it already, as all of Triton's do.
    """
    grad = grad.contiguous(memory_format=output_format(input, weight))
    if backend.takes_triton(NAME, input):
        args = (grad, input, weight, stride, padding, dilation, groups)
        grad_input, grad_weight = (
            dispatch.choose(operation, *args).candidate.run(*args) if needed else None
            for operation, needed in zip((CONV2D_INPUT_GRAD, CONV2D_WEIGHT_GRAD), needs[:2], strict=True)
        )
    else:
        need_bias = needs[2] and bias_grad is None
        grad_input, grad_weight, summed = torch.ops.aten.convolution_backward(
            grad,
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
        bias_grad = summed if need_bias else bias_grad
    none = input.new_empty(0)
    return (
        none if grad_input is None else grad_input.contiguous(memory_format=memory_format(input)),
        none.clone() if grad_weight is None else grad_weight.contiguous(memory_format=memory_format(weight)),
        bias_grad.to(weight.dtype) if needs[2] else none.clone(),  # type: ignore[union-attr]
    )


def output_shape(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    return (input.shape[0], weight.shape[0], *output_size(input, weight, stride, padding, dilation))


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
        return forward(input, weight, bias, stride, padding, dilation, groups)


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
        return gradients(grad, bias_grad, input, weight, stride, padding, dilation, groups, needs)


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
