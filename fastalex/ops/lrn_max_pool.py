"""Operator `fastalex::lrn_max_pool2d`: LRN and max-pooling in one kernel each way.  Saves input and window codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalex import backend, gpu
from fastalex.cpu import lrn, lrn_max_pool, max_pool
from fastalex.ops.common import call, device_of, differentiable, empty, operator, refuse_double_backward
from fastalex.ops.geometry import Norm, pooled_shape, windows

NAME = "lrn_max_pool2d"


def forward(
    input: Tensor, norm: Norm, window: list[int], after_relu: bool, codes: bool, *, triton: bool
) -> tuple[Tensor, Tensor | None]:
    """The fused kernel where it exists for these windows, else the two kernels one after the other."""
    room = gpu.lrn_max_pool if triton else lrn_max_pool
    kernel_size, stride, *_ = windows(window)
    if room.unsupported(input, norm.size, norm.groups, kernel_size, stride) is None:
        fused = gpu.lrn_max_pool.lrn_max_pool_fwd if triton else lrn_max_pool.lrn_max_pool_fwd
        return fused(input, *norm[:4], groups=norm.groups, after_relu=after_relu, codes=codes)
    normalised = (gpu.lrn.lrn_fwd if triton else lrn.lrn_fwd)(input, *norm)
    pool = gpu.max_pool.max_pool_fwd if triton else max_pool.max_pool_fwd
    return pool(normalised, *windows(window), False, after_relu=after_relu, codes=codes)


def backward(
    grad: Tensor,
    codes: Tensor,
    input: Tensor,
    norm: Norm,
    window: list[int],
    after_relu: bool,
    *,
    triton: bool,
    bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `forward`'s input and, with `bias`, its sum over all but the channels (float32).

    After a ReLU it is that before it.  The codes see to that, except beside NaN: Triton's fused kernel then has NaN
    where the ReLU was 0, the others have 0 as torch.
    """
    room = gpu.lrn_max_pool if triton else lrn_max_pool
    kernel_size, stride, *_ = windows(window)
    grad_input: Any
    if room.unsupported(input, norm.size, norm.groups, kernel_size, stride) is None:
        if not triton:
            grad_input = lrn_max_pool.lrn_max_pool_bwd(
                grad, codes, input, *norm[:4], groups=norm.groups, after_relu=after_relu
            )
        elif not bias:
            grad_input = gpu.lrn_max_pool_backward.lrn_max_pool_bwd(grad, codes, input, *norm[:4], groups=norm.groups)
        else:
            grad_input, partials = gpu.lrn_max_pool_backward.lrn_max_pool_bwd(
                grad, codes, input, *norm[:4], groups=norm.groups, bias_partials=True
            )
            return grad_input, gpu.partial_sums.sum_partials(partials)
    else:
        size = input.shape[2], input.shape[3]
        unpool = gpu.max_pool.max_pool_bwd if triton else max_pool.max_pool_bwd
        grad_normalised = unpool(grad, codes, size, *windows(window))
        grad_input = (gpu.lrn.lrn_bwd if triton else lrn.lrn_bwd)(grad_normalised, input, *norm)
        if after_relu:
            grad_input = torch.ops.aten.threshold_backward(grad_input, input, 0)
    return grad_input, grad_input.sum((0, 2, 3), dtype=torch.float32) if bias else None


@operator("fastalex::lrn_max_pool2d")
def lrn_max_pool2d(
    input: Tensor, norm: list[float], window: list[int], after_relu: bool, codes: bool
) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) -> pooled (N, C, OH, OW) and the int8 window codes, empty unless asked for."""
    with device_of(input):
        triton = backend.takes_triton(NAME, input)
        output, found = forward(input, Norm.of(norm), window, after_relu, codes, triton=triton)
    return output, input.new_empty(0, dtype=torch.int8) if found is None else found


@lrn_max_pool2d.register_fake
def _(input: Tensor, norm: list[float], window: list[int], after_relu: bool, codes: bool) -> tuple[Tensor, Tensor]:
    shape = pooled_shape(input.shape, window)
    found = empty(input, shape, torch.int8) if codes else input.new_empty(0, dtype=torch.int8)
    return empty(input, shape), found


@operator("fastalex::lrn_max_pool2d_backward")
def lrn_max_pool2d_backward(
    grad: Tensor, codes: Tensor, input: Tensor, norm: list[float], window: list[int], after_relu: bool
) -> Tensor:
    with device_of(input):
        triton = backend.takes_triton(NAME, input)
        return backward(grad, codes, input, Norm.of(norm), window, after_relu, triton=triton)[0]


@lrn_max_pool2d_backward.register_fake
def _(grad: Tensor, codes: Tensor, input: Tensor, norm: list[float], window: list[int], after_relu: bool) -> Tensor:
    return empty(input, input.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *ctx.parameters, _ = inputs
    ctx.save_for_backward(output[1], input)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    codes, input = ctx.saved_tensors
    return call(lrn_max_pool2d_backward, grad, codes, input, *ctx.parameters), None, None, None, None


differentiable(lrn_max_pool2d, _setup_context, _backward)
refuse_double_backward(lrn_max_pool2d_backward, NAME)
