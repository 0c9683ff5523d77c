"""Operator `fastalex::conv2d_relu_pool`: a whole stage, conv -> ReLU -> (LRN ->) max-pool, as one autograd node.

One node lets the pooling backward write the gradient before the ReLU directly: the window codes of dead windows
carry the mask, and the same pass sums the bias gradient.  Neither is computed again below.
Saved: input, weight, the int8 codes, and the activation where LRN needs it (without LRN the codes are enough).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastalex import backend
from fastalex.ops import conv_relu, lrn_max_pool
from fastalex.ops.common import (
    call,
    device_of,
    differentiable,
    empty,
    implementation,
    operator,
    refuse_double_backward,
)

NAME = "conv2d_relu_pool"

# Of the activation of a block of images on a CPU.  Buffers above 32 MiB, where glibc stops keeping them, cost their
# page faults in every call: conv1 of 32 images in fp32 (37 MB) with LRN and pooling took 0.88 of the time in two blocks
# (Zen 4, 1 MiB of L2 cache), 0.96 in 32, where the weight and the scratch of the LRN leave the cache between blocks.
# A whole model in fp32 gains 2 to 4 %.
BLOCK_BYTES = 16 * 2**20


Conv = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups
Norm = tuple[int, float, float, float, int]  # size (0: none), alpha, beta, k, groups
Window = tuple[list[int], list[int]]  # kernel size, stride


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, norm: Norm, window: Window, codes: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernels one after the other: pooled, the activation and, with `codes`, the window codes."""
    activation = conv_relu.forward(input, weight, bias, *conv)
    if norm[0]:
        output, found = lrn_max_pool.forward(activation, *norm, *window, True, codes)
    else:
        kernel_size, stride = map(tuple, window)
        output, found = implementation("max_pool", NAME, input).max_pool_fwd(
            activation, kernel_size, stride, (0, 0), (1, 1), False, codes=codes, after_relu=True
        )
    return output, activation, found


def inference(input: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, norm: Norm, window: Window) -> Tensor:
    """Pooled.  On a CPU in nearly equal blocks of images, so that the activation of the whole batch never exists."""
    images = input.shape[0]
    shape = conv_relu.output_shape(input, weight, *conv[:3])
    # A block has an image for every thread: PyTorch's pooling and oneDNN divide images among them.
    blocks = min(-(-math.prod(shape) * input.itemsize // BLOCK_BYTES), images // torch.get_num_threads())
    if blocks <= 1 or backend.takes_triton(NAME, input):
        return forward(input, weight, bias, conv, norm, window, False)[0]
    output = torch.empty(
        lrn_max_pool.pooled_shape(shape, *window),
        dtype=input.dtype,
        device=input.device,
        memory_format=conv_relu.output_format(input, weight),
    )
    step = -(-images // blocks)
    for part, pooled in zip(input.split(step), output.split(step), strict=True):
        pooled.copy_(forward(part, weight, bias, conv, norm, window, False)[0])
    return output


@operator("fastalex::conv2d_relu_pool")
def conv2d_relu_pool(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    lrn_groups: int,
    kernel_size: list[int],
    pool_stride: list[int],
    codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> pooled, and what a backward needs, empty without `codes`: the activation (with LRN only) and window codes."""
    with device_of(input):
        conv, norm = (stride, padding, dilation, groups), (lrn_size, alpha, beta, k, lrn_groups)
        window = (kernel_size, pool_stride)
        if codes:
            output, activation, found = forward(input, weight, bias, conv, norm, window, codes)
            return output, activation if lrn_size else input.new_empty(0), found  # type: ignore[return-value]
        output = inference(input, weight, bias, conv, norm, window)
        return output, input.new_empty(0), input.new_empty(0, dtype=torch.int8)


@conv2d_relu_pool.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    lrn_groups: int,
    kernel_size: list[int],
    pool_stride: list[int],
    codes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    activation = torch.empty(
        conv_relu.output_shape(input, weight, stride, padding, dilation),
        dtype=input.dtype,
        device=input.device,
        memory_format=conv_relu.output_format(input, weight),
    )
    shape = lrn_max_pool.pooled_shape(activation.shape, kernel_size, pool_stride)
    found = empty(activation, shape, torch.int8) if codes else input.new_empty(0, dtype=torch.int8)
    return empty(activation, shape), activation if lrn_size and codes else input.new_empty(0), found


@operator("fastalex::conv2d_relu_pool_backward")
def conv2d_relu_pool_backward(
    grad: Tensor,
    codes: Tensor,
    activation: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    lrn_groups: int,
    kernel_size: list[int],
    pool_stride: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (input, weight, bias), empty where `needs` says no."""
    with device_of(input):
        # On a CPU the convolution's own backward sums the bias gradient.
        bias = needs[2] and backend.takes_triton(NAME, input)
        bias_grad = None
        if lrn_size:
            before_relu, bias_grad = lrn_max_pool.backward(
                grad,
                codes,
                activation,
                lrn_size,
                alpha,
                beta,
                k,
                lrn_groups,
                kernel_size,
                pool_stride,
                True,
                bias,
            )
        else:
            before_relu = implementation("max_pool", NAME, input).max_pool_bwd(
                grad,
                codes,
                tuple(conv_relu.output_shape(input, weight, stride, padding, dilation)[2:]),
                tuple(kernel_size),
                tuple(pool_stride),
                (0, 0),
                (1, 1),
                bias_partials=bias,
            )
            if bias:
                before_relu, partials = before_relu
                bias_grad = implementation("relu_bias_grad", NAME, input).sum_partials(partials)
        return conv_relu.gradients(before_relu, bias_grad, input, weight, stride, padding, dilation, groups, needs)


@conv2d_relu_pool_backward.register_fake
def _(
    grad: Tensor,
    codes: Tensor,
    activation: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    lrn_groups: int,
    kernel_size: list[int],
    pool_stride: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return conv_relu.fake_gradients(input, weight, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, *parameters = inputs
    _, activation, codes = output
    ctx.parameters = parameters[:-1]
    ctx.has_bias = bias is not None
    ctx.save_for_backward(codes, activation, input, weight)
    ctx.mark_non_differentiable(activation, codes)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = call(conv2d_relu_pool_backward, grad, *ctx.saved_tensors, *ctx.parameters, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 12)


differentiable(conv2d_relu_pool, _setup_context, _backward)
refuse_double_backward(conv2d_relu_pool_backward, NAME)
