"""Operator `fastalex::max_pool2d`: the maxima, and one byte per window that says which cell held it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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

NAME = "max_pool2d"


@operator("fastalex::max_pool2d")
def max_pool2d(
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    codes: bool,
) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) -> the maxima (N, C, OH, OW) and the int8 window codes, empty unless asked for."""
    with device_of(input):
        output, found = implementation("max_pool", NAME, input).max_pool_fwd(
            input,
            tuple(kernel_size),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            ceil_mode,
            codes=codes,
        )
    return output, found if codes else input.new_empty(0, dtype=torch.int8)


@max_pool2d.register_fake
def _(
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    codes: bool,
) -> tuple[Tensor, Tensor]:
    shape = (*input.shape[:2], *output_size(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode))
    found = empty(input, shape, torch.int8) if codes else input.new_empty(0, dtype=torch.int8)
    return empty(input, shape), found


@operator("fastalex::max_pool2d_backward")
def max_pool2d_backward(
    grad: Tensor,
    codes: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    with device_of(grad):
        return implementation("max_pool", NAME, grad).max_pool_bwd(
            grad,
            codes,
            tuple(input_size),
            tuple(kernel_size),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
        )


@max_pool2d_backward.register_fake
def _(
    grad: Tensor,
    codes: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return empty(codes, (*codes.shape[:2], *input_size), grad.dtype)


@operator("fastalex::max_pool2d_indices")
def max_pool2d_indices(
    codes: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Window codes -> torch's indices h * W + w of the input plane, int64, in the shape of the codes."""
    with device_of(codes):
        return implementation("max_pool", NAME, codes).max_pool_indices(
            codes, tuple(input_size), tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
        )


@max_pool2d_indices.register_fake
def _(
    codes: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return empty(codes, codes.shape, torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, kernel_size, stride, padding, dilation, _, _ = inputs
    ctx.parameters = list(input.shape[2:]), kernel_size, stride, padding, dilation
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    return call(max_pool2d_backward, grad, codes, *ctx.parameters), None, None, None, None, None, None


differentiable(max_pool2d, _setup_context, _backward)
refuse_double_backward(max_pool2d_backward, NAME)
