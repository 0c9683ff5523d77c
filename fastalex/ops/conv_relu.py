"""Operator `fastalex::conv2d_relu`.  Saves input, weight and output; the ReLU mask is the sign of the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalex import backend, gpu
from fastalex.cpu import conv_relu
from fastalex.gpu import convolution
from fastalex.gpu.convolution import output_format
from fastalex.kernels.geometry import memory_format
from fastalex.ops.common import call, device_of, differentiable, empty, operator, refuse_double_backward
from fastalex.ops.geometry import Conv

NAME = "conv2d_relu"


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, *, triton: bool) -> Tensor:
    """By the candidate that the dispatch chooses, or the CPU's."""
    run = convolution.conv2d_relu if triton else conv_relu.conv_relu_fwd
    return run(input, weight, bias, *conv).contiguous(memory_format=output_format(input, weight))


def gradients(
    grad: Tensor,
    bias_grad: Tensor | None,
    input: Tensor,
    weight: Tensor,
    conv: Conv,
    needs: list[bool],
    *,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's gradients from the gradient of its output; empty where `needs` (input, weight, bias) says no.

    `bias_grad` is the bias gradient where a kernel above has summed it already, as all of Triton's do.
    """
    grad = grad.contiguous(memory_format=output_format(input, weight))
    if triton:
        grad_input, grad_weight = convolution.gradients(grad, input, weight, *conv, needs=needs[:2])
    else:
        need_bias = needs[2] and bias_grad is None
        grad_input, grad_weight, summed = torch.ops.aten.convolution_backward(
            grad,
            input,
            weight,
            [weight.shape[0]] if need_bias else None,
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            [needs[0], needs[1], need_bias],
        )
        bias_grad = summed if need_bias else bias_grad
    none = input.new_empty(0)
    return (
        none if grad_input is None else grad_input.contiguous(memory_format=memory_format(input)),
        none.clone() if grad_weight is None else grad_weight.contiguous(memory_format=memory_format(weight)),
        bias_grad.to(weight.dtype) if needs[2] else none.clone(),  # type: ignore[union-attr]
    )


@operator("fastalex::conv2d_relu")
def conv2d_relu(input: Tensor, weight: Tensor, bias: Tensor | None, conv: list[int]) -> Tensor:
    with device_of(input):
        return forward(input, weight, bias, Conv.of(conv), triton=backend.takes_triton(NAME, input))


@conv2d_relu.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, conv: list[int]) -> Tensor:
    return torch.empty(
        Conv.of(conv).output_shape(input, weight),
        dtype=input.dtype,
        device=input.device,
        memory_format=output_format(input, weight),
    )


@operator("fastalex::conv2d_relu_backward")
def conv2d_relu_backward(
    grad: Tensor, input: Tensor, weight: Tensor, output: Tensor, conv: list[int], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (input, weight, bias), empty where `needs` says no."""
    with device_of(input):
        bias_grad = None
        triton = backend.takes_triton(NAME, input)
        if triton:
            grad, bias_grad = gpu.relu_bias_grad.relu_bias_grad(grad, output, bias=needs[2])
        else:
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        return gradients(grad, bias_grad, input, weight, Conv.of(conv), needs, triton=triton)


def fake_gradients(input: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty(input, input.shape) if needs[0] else input.new_empty(0),
        empty(weight, weight.shape) if needs[1] else input.new_empty(0),
        weight.new_empty(weight.shape[0]) if needs[2] else input.new_empty(0),
    )


@conv2d_relu_backward.register_fake
def _(
    grad: Tensor, input: Tensor, weight: Tensor, output: Tensor, conv: list[int], needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(input, weight, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, ctx.conv = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, output = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = call(conv2d_relu_backward, grad, input, weight, output, ctx.conv, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None)


differentiable(conv2d_relu, _setup_context, _backward)
refuse_double_backward(conv2d_relu_backward, NAME)
