"""Operator `fastalex::lrn_max_pool2d`: LRN and max-pooling in one kernel each way.  Saves input and window codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalex import backend
from fastalex.kernels.geometry import output_size
from fastalex.ops.common import (
    call,
    device_of,
    differentiable,
    empty,
    implementation,
    operator,
    refuse_double_backward,
)

NAME = "lrn_max_pool2d"


def forward(
    input: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: list[int],
    stride: list[int],
    after_relu: bool,
    codes: bool,
) -> tuple[Tensor, Tensor | None]:
    """The fused kernel where it exists for these windows, else the two kernels one after the other."""
    module = implementation("lrn_max_pool", NAME, input)
    if module.unsupported(input, size, groups, tuple(kernel_size), tuple(stride)) is None:
        return module.lrn_max_pool_fwd(input, size, alpha, beta, k, groups=groups, after_relu=after_relu, codes=codes)
    normalised = implementation("lrn", NAME, input).lrn_fwd(input, size, alpha, beta, k, groups)
    pool = implementation("max_pool", NAME, input)
    return pool.max_pool_fwd(
        normalised,
        tuple(kernel_size),
        tuple(stride),
        (0, 0),
        (1, 1),
        False,
        codes=codes,
        after_relu=after_relu,
    )


def backward(
    grad: Tensor,
    codes: Tensor,
    input: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: list[int],
    stride: list[int],
    after_relu: bool,
    bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `forward`'s input and, with `bias`, its sum over all but the channels (float32).

    After a ReLU it is that before it.  The codes see to that, except beside NaN: Triton's fused kernel then has NaN
    where the ReLU was 0, the others have 0 as torch.
    """
    partials = None
    module = implementation("lrn_max_pool", NAME, input)
    mask: dict[str, bool] = {} if backend.takes_triton(NAME, input) else {"after_relu": after_relu}
    if module.unsupported(input, size, groups, tuple(kernel_size), tuple(stride)) is None:
        grad_input = module.lrn_max_pool_bwd(
            grad, codes, input, size, alpha, beta, k, groups=groups, bias_partials=bias, **mask
        )
        if bias:
            grad_input, partials = grad_input
    else:
        grad_normalised = implementation("max_pool", NAME, input).max_pool_bwd(
            grad, codes, tuple(input.shape[2:]), tuple(kernel_size), tuple(stride), (0, 0), (1, 1)
        )
        grad_input = implementation("lrn", NAME, input).lrn_bwd(grad_normalised, input, size, alpha, beta, k, groups)
        if after_relu:
            grad_input = torch.ops.aten.threshold_backward(grad_input, input, 0)
        if bias:
            partials = grad_input.float().sum((2, 3))
    if partials is None:
        return grad_input, None
    return grad_input, implementation("relu_bias_grad", NAME, input).sum_partials(partials)


def pooled_shape(shape: Sequence[int], kernel_size: list[int], stride: list[int]) -> tuple[int, ...]:
    return (*shape[:2], *output_size(shape[2:], kernel_size, stride))


@operator("fastalex::lrn_max_pool2d")
def lrn_max_pool2d(
    input: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: list[int],
    stride: list[int],
    after_relu: bool,
    codes: bool,
) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) -> pooled (N, C, OH, OW) and the int8 window codes, empty unless asked for."""
    with device_of(input):
        output, found = forward(input, size, alpha, beta, k, groups, kernel_size, stride, after_relu, codes)
    return output, input.new_empty(0, dtype=torch.int8) if found is None else found


@lrn_max_pool2d.register_fake
def _(
    input: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: list[int],
    stride: list[int],
    after_relu: bool,
    codes: bool,
) -> tuple[Tensor, Tensor]:
    shape = pooled_shape(input.shape, kernel_size, stride)
    found = empty(input, shape, torch.int8) if codes else input.new_empty(0, dtype=torch.int8)
    return empty(input, shape), found


@operator("fastalex::lrn_max_pool2d_backward")
def lrn_max_pool2d_backward(
    grad: Tensor,
    codes: Tensor,
    input: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: list[int],
    stride: list[int],
    after_relu: bool,
) -> Tensor:
    with device_of(input):
        return backward(grad, codes, input, size, alpha, beta, k, groups, kernel_size, stride, after_relu)[0]


@lrn_max_pool2d_backward.register_fake
def _(
    grad: Tensor,
    codes: Tensor,
    input: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: list[int],
    stride: list[int],
    after_relu: bool,
) -> Tensor:
    return empty(input, input.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *parameters = inputs
    ctx.parameters = parameters[:8]
    ctx.save_for_backward(output[1], input)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    codes, input = ctx.saved_tensors
    return call(lrn_max_pool2d_backward, grad, codes, input, *ctx.parameters), *[None] * 9


differentiable(lrn_max_pool2d, _setup_context, _backward)
refuse_double_backward(lrn_max_pool2d_backward, NAME)
