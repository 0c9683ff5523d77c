"""Operator `fastalex::local_response_norm`.  Saves its input only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalex.ops.common import (
    call,
    device_of,
    differentiable,
    empty,
    implementation,
    operator,
    refuse_double_backward,
)

NAME = "local_response_norm"


@operator("fastalex::local_response_norm")
def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    with device_of(input):
        return implementation("lrn", NAME, input).lrn_fwd(input, size, alpha, beta, k, groups)


@local_response_norm.register_fake
def _(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    return empty(input, input.shape)


@operator("fastalex::local_response_norm_backward")
def local_response_norm_backward(
    grad: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> Tensor:
    with device_of(input):
        return implementation("lrn", NAME, input).lrn_bwd(grad, input, size, alpha, beta, k, groups)


@local_response_norm_backward.register_fake
def _(grad: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    return empty(input, input.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, *ctx.parameters = inputs
    ctx.save_for_backward(input)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (input,) = ctx.saved_tensors
    return call(local_response_norm_backward, grad, input, *ctx.parameters), None, None, None, None, None


differentiable(local_response_norm, _setup_context, _backward)
refuse_double_backward(local_response_norm_backward, NAME)
