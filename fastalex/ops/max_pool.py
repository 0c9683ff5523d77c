"""Operator `fastalex::max_pool2d`: the maxima, and one byte per window that says which cell held it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalex import backend, gpu
from fastalex.cpu import max_pool
from fastalex.ops.common import call, device_of, differentiable, empty, operator, refuse_double_backward
from fastalex.ops.geometry import pooled_shape, windows

NAME = "max_pool2d"


@operator("fastalex::max_pool2d")
def max_pool2d(input: Tensor, window: list[int], ceil_mode: bool, codes: bool) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) -> the maxima (N, C, OH, OW) and the int8 window codes, empty unless asked for."""
    with device_of(input):
        pool = gpu.max_pool.max_pool_fwd if backend.takes_triton(NAME, input) else max_pool.max_pool_fwd
        output, found = pool(input, *windows(window), ceil_mode, codes=codes)
    return output, input.new_empty(0, dtype=torch.int8) if found is None else found


@max_pool2d.register_fake
def _(input: Tensor, window: list[int], ceil_mode: bool, codes: bool) -> tuple[Tensor, Tensor]:
    shape = pooled_shape(input.shape, window, ceil_mode)
    found = empty(input, shape, torch.int8) if codes else input.new_empty(0, dtype=torch.int8)
    return empty(input, shape), found


@operator("fastalex::max_pool2d_backward")
def max_pool2d_backward(grad: Tensor, codes: Tensor, input_size: list[int], window: list[int]) -> Tensor:
    with device_of(grad):
        height, width = input_size
        if backend.takes_triton(NAME, grad):
            return gpu.max_pool.max_pool_bwd(grad, codes, (height, width), *windows(window))
        return max_pool.max_pool_bwd(grad, codes, (height, width), *windows(window))


@max_pool2d_backward.register_fake
def _(grad: Tensor, codes: Tensor, input_size: list[int], window: list[int]) -> Tensor:
    return empty(codes, (*codes.shape[:2], *input_size), grad.dtype)


@operator("fastalex::max_pool2d_indices")
def max_pool2d_indices(codes: Tensor, input_size: list[int], window: list[int]) -> Tensor:
    """Window codes -> torch's indices h * W + w of the input plane, int64, in the shape of the codes."""
    with device_of(codes):
        height, width = input_size
        if backend.takes_triton(NAME, codes):
            return gpu.max_pool.max_pool_indices(codes, (height, width), *windows(window))
        return max_pool.max_pool_indices(codes, (height, width), *windows(window))


@max_pool2d_indices.register_fake
def _(codes: Tensor, input_size: list[int], window: list[int]) -> Tensor:
    return empty(codes, codes.shape, torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, window, _, _ = inputs
    ctx.parameters = list(input.shape[2:]), window
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    return call(max_pool2d_backward, grad, codes, *ctx.parameters), None, None, None


differentiable(max_pool2d, _setup_context, _backward)
refuse_double_backward(max_pool2d_backward, NAME)
