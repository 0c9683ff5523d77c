"""Operator `fastalex::local_response_norm`.  Saves its input only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalex import backend, gpu
from fastalex.cpu import lrn
from fastalex.ops.common import call, device_of, differentiable, empty, operator, refuse_double_backward
from fastalex.ops.geometry import Norm

NAME = "local_response_norm"


@operator("fastalex::local_response_norm")
def local_response_norm(input: Tensor, norm: list[float]) -> Tensor:
    with device_of(input):
        if backend.takes_triton(NAME, input):
            return gpu.lrn.lrn_fwd(input, *Norm.of(norm))
        return lrn.lrn_fwd(input, *Norm.of(norm))


@local_response_norm.register_fake
def _(input: Tensor, norm: list[float]) -> Tensor:
    return empty(input, input.shape)


@operator("fastalex::local_response_norm_backward")
def local_response_norm_backward(grad: Tensor, input: Tensor, norm: list[float]) -> Tensor:
    with device_of(input):
        if backend.takes_triton(NAME, input):
            return gpu.lrn.lrn_bwd(grad, input, *Norm.of(norm))
        return lrn.lrn_bwd(grad, input, *Norm.of(norm))


@local_response_norm_backward.register_fake
def _(grad: Tensor, input: Tensor, norm: list[float]) -> Tensor:
    return empty(input, input.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, ctx.norm = inputs
    ctx.save_for_backward(input)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (input,) = ctx.saved_tensors
    return call(local_response_norm_backward, grad, input, ctx.norm), None


differentiable(local_response_norm, _setup_context, _backward)
refuse_double_backward(local_response_norm_backward, NAME)
