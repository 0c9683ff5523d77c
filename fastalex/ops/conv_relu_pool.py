"""Operator `fastalex::conv2d_relu_pool`: a whole stage, conv -> ReLU -> (LRN ->) max-pool, as one autograd node.

One node lets the pooling backward write the gradient before the ReLU directly: the codes of windows whose maximum is 0
carry the mask, and the same pass sums the bias gradient.  Neither is computed again below.
Saved: input, weight, the int8 codes, and the activation where LRN needs it (without LRN the codes are enough).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastalex import backend, gpu
from fastalex.cpu import max_pool
from fastalex.gpu.convolution import output_format
from fastalex.ops import conv_relu, lrn_max_pool
from fastalex.ops.common import call, device_of, differentiable, empty, operator, refuse_double_backward
from fastalex.ops.geometry import Conv, Norm, pooled_shape, windows

NAME = "conv2d_relu_pool"

# Of the activation of a block of images on a CPU.  Buffers above 32 MiB, where glibc stops keeping them, cost their
# page faults in every call: conv1 of 32 images in fp32 (37 MB) with LRN and pooling took 0.88 of the time in two blocks
# (Zen 4, 1 MiB of L2 cache), 0.96 in 32, where the weight and the scratch of the LRN leave the cache between blocks.
# A whole model in fp32 gains 2 to 4 %.
BLOCK_BYTES = 16 * 2**20


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    norm: list[float],
    window: list[int],
    codes: bool,
    *,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernels one after the other: pooled, the activation and, with `codes`, the window codes."""
    activation = conv_relu.forward(input, weight, bias, conv, triton=triton)
    if norm:
        output, found = lrn_max_pool.forward(activation, Norm.of(norm), window, True, codes, triton=triton)
    else:
        pool = gpu.max_pool.max_pool_fwd if triton else max_pool.max_pool_fwd
        output, found = pool(activation, *windows(window), False, codes=codes, after_relu=True)
    return output, activation, found


def inference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    norm: list[float],
    window: list[int],
    *,
    triton: bool,
) -> Tensor:
    """Pooled.  On a CPU in nearly equal blocks of images, so that the activation of the whole batch never exists."""
    images = input.shape[0]
    shape = conv.output_shape(input, weight)
    # A block has an image for every thread: PyTorch's pooling and oneDNN divide images among them.
    blocks = min(-(-math.prod(shape) * input.itemsize // BLOCK_BYTES), images // torch.get_num_threads())
    if blocks <= 1 or triton:
        return forward(input, weight, bias, conv, norm, window, False, triton=triton)[0]
    output = torch.empty(
        pooled_shape(shape, window),
        dtype=input.dtype,
        device=input.device,
        memory_format=output_format(input, weight),
    )
    step = -(-images // blocks)
    for part, pooled in zip(input.split(step), output.split(step), strict=True):
        pooled.copy_(forward(part, weight, bias, conv, norm, window, False, triton=triton)[0])
    return output


def split(geometry: list[int]) -> tuple[Conv, list[int]]:
    """The convolution and the pooling window of a stage, which its schema carries in one list."""
    return Conv.of(geometry), geometry[7:]


@operator("fastalex::conv2d_relu_pool")
def conv2d_relu_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int], norm: list[float], codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> pooled, and what a backward needs, empty without `codes`: the activation (with LRN only) and window codes.

    geometry: of the convolution, then kernel size and stride of the pooling.
    """
    with device_of(input):
        triton = backend.takes_triton(NAME, input)
        conv, window = split(geometry)
        if codes:
            output, activation, found = forward(input, weight, bias, conv, norm, window, codes, triton=triton)
            return output, activation if norm else input.new_empty(0), found  # type: ignore[return-value]
        output = inference(input, weight, bias, conv, norm, window, triton=triton)
        return output, input.new_empty(0), input.new_empty(0, dtype=torch.int8)


@conv2d_relu_pool.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int], norm: list[float], codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    conv, window = split(geometry)
    activation = torch.empty(
        conv.output_shape(input, weight),
        dtype=input.dtype,
        device=input.device,
        memory_format=output_format(input, weight),
    )
    shape = pooled_shape(activation.shape, window)
    found = empty(activation, shape, torch.int8) if codes else input.new_empty(0, dtype=torch.int8)
    return empty(activation, shape), activation if norm and codes else input.new_empty(0), found


@operator("fastalex::conv2d_relu_pool_backward")
def conv2d_relu_pool_backward(
    grad: Tensor,
    codes: Tensor,
    activation: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: list[int],
    norm: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (input, weight, bias), empty where `needs` says no."""
    with device_of(input):
        triton = backend.takes_triton(NAME, input)
        conv, window = split(geometry)
        # On a CPU the convolution's own backward sums the bias gradient.
        bias = needs[2] and triton
        bias_grad = None
        if norm:
            before_relu, bias_grad = lrn_max_pool.backward(
                grad, codes, activation, Norm.of(norm), window, True, triton=triton, bias=bias
            )
        else:
            _, _, height, width = conv.output_shape(input, weight)
            where = (height, width), *windows(window)
            if bias:
                before_relu, partials = gpu.max_pool.max_pool_bwd(grad, codes, *where, bias_partials=True)
                bias_grad = gpu.partial_sums.sum_partials(partials)
            else:
                unpool = gpu.max_pool.max_pool_bwd if triton else max_pool.max_pool_bwd
                before_relu = unpool(grad, codes, *where)
        return conv_relu.gradients(before_relu, bias_grad, input, weight, conv, needs, triton=triton)


@conv2d_relu_pool_backward.register_fake
def _(
    grad: Tensor,
    codes: Tensor,
    activation: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: list[int],
    norm: list[float],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return conv_relu.fake_gradients(input, weight, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, weight, bias, *ctx.parameters, _ = inputs
    _, activation, codes = output
    ctx.has_bias = bias is not None
    ctx.save_for_backward(codes, activation, input, weight)
    ctx.mark_non_differentiable(activation, codes)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = call(conv2d_relu_pool_backward, grad, *ctx.saved_tensors, *ctx.parameters, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


differentiable(conv2d_relu_pool, _setup_context, _backward)
refuse_double_backward(conv2d_relu_pool_backward, NAME)
