"""Operator `fastalex::feature_distance`: the distance of LPIPS between two feature maps.  Saves the two maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalex import backend, gpu
from fastalex.cpu import lpips
from fastalex.ops.common import call, device_of, differentiable, operator, refuse_double_backward
from fastalex.reference import sum_dtype, unit_vectors

NAME = "feature_distance"


def images_last(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor (N, C, H, W) with the channels innermost, also where sizes of 1 leave that open."""
    n, c, h, w = shape
    return torch.empty((n, h, w, c), dtype=dtype or like.dtype, device=like.device).permute(0, 3, 1, 2)


@operator("fastalex::feature_distance")
def feature_distance(a: Tensor, b: Tensor, weight: Tensor | None, spatial: bool) -> Tensor:
    """(N, C, H, W) each, b's batch N or 1 -> (N,), or with `spatial` (N, H, W); float32, or float64 for float64."""
    with device_of(a):
        forward = gpu.lpips.lpips_fwd if backend.takes_triton(NAME, a) else lpips.lpips_fwd
        out = forward([(a, b, weight)], [a.shape], spatial)
        return out.view(a.shape[0], *a.shape[2:]) if spatial else out.view(a.shape[0])


@feature_distance.register_fake
def _(a: Tensor, b: Tensor, weight: Tensor | None, spatial: bool) -> Tensor:
    shape = (a.shape[0], *a.shape[2:]) if spatial else a.shape[:1]
    return a.new_empty(shape, dtype=sum_dtype(a.dtype))


@operator("fastalex::feature_distance_backward")
def feature_distance_backward(
    grad: Tensor, a: Tensor, b: Tensor, weight: Tensor | None, spatial: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (a, b, weight), empty where `needs` says no.

    That of the weight, which only training LPIPS itself needs, is not fused.
    """
    with device_of(a):
        backward = gpu.lpips.lpips_bwd if backend.takes_triton(NAME, a) else lpips.lpips_bwd
        incoming = grad.reshape(a.shape[0], -1)
        da = backward(incoming, a, b, weight, spatial=spatial) if needs[0] else a.new_empty(0)
        db = backward(incoming, b.expand(a.shape), a, weight, spatial=spatial) if needs[1] else a.new_empty(0)
        if needs[1] and b.shape[0] != a.shape[0]:
            db = db.sum(0, keepdim=True)
        if not needs[2] or weight is None:
            return da, db, a.new_empty(0)
        wide = sum_dtype(a.dtype)
        u, v = unit_vectors(a.to(wide)), unit_vectors(b.to(wide))
        per_pixel = grad[:, None] if spatial else (grad / a[0, 0].numel()).view(-1, 1, 1, 1)
        return da, db, ((u - v).square_() * per_pixel).sum((0, 2, 3)).to(weight.dtype)


@feature_distance_backward.register_fake
def _(
    grad: Tensor, a: Tensor, b: Tensor, weight: Tensor | None, spatial: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        images_last(a.shape, a) if needs[0] else a.new_empty(0),
        images_last(b.shape, b) if needs[1] else a.new_empty(0),
        weight.new_empty(weight.shape) if needs[2] and weight is not None else a.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, weight, ctx.spatial = inputs
    ctx.save_for_backward(a, b, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = call(feature_distance_backward, grad, a, b, weight, ctx.spatial, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None)


differentiable(feature_distance, _setup_context, _backward)
refuse_double_backward(feature_distance_backward, "feature_distance")
