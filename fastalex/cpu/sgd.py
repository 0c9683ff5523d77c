"""SGD whose weights lie in two halves, on a CPU: PyTorch's fused update of each weight, put together for it.

The halves are those of `fastalex.kernels.sgd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

# Elements whose temporary values stay in the cache.  Those of all of fc6 would be a gigabyte.
PIECE = 1 << 15


def join_halves(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 weight of a bf16 number and an int16 lower half.

    Infinity, NaN and zero that somebody has written over another number are taken as they are.
    """
    bits = high.view(torch.int16)
    added = ((bits & 0x7F80) != 0x7F80) & (((bits & 0x7FFF) != 0) | (low >= 0))
    return ((bits.int() << 16) + low.int() * as_int(added)).view(torch.float32)


def as_int(mask: Tensor) -> Tensor:
    """0 and 1.  Through int8: on a CPU PyTorch converts bool forty times as slowly, and its masks are as slow."""
    return mask.view(torch.int8).int()


def split_halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(bf16, int16) of an fp32 weight: the nearest number, ties away from zero, and what is missing."""
    bits = weight.view(torch.int32)
    # wraps for no number: their sign bit and largest exponent leave room
    rounded, quiet = (bits + 0x8000) >> 16, (bits >> 16) | 0x0040
    high = rounded + (quiet - rounded) * as_int(weight.isnan())
    return high.short().view(torch.bfloat16), (bits - (high << 16)).short()


def sgd_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None = None,
    lows: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    factors: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **ignored: Any,
) -> None:
    """As `fastalex.kernels.sgd.sgd_`, a piece of a weight after the other."""
    if found_inf is not None and found_inf == 1:
        return
    for i, weight in enumerate(weights):
        tensors = [weight, grads[i], *(some[i] for some in (momentum_buffers, lows) if some)]
        for piece, grad, *others in zip(*map(pieces_of, tensors), strict=True):
            low = others.pop() if lows else None
            whole = piece if low is None else join_halves(piece, low)
            g = grad.float()
            if grad_scale is not None:
                g = g / grad_scale
                grad.copy_(g)
            if factors is not None:
                g = g.neg() if maximize else g
                g = (g.add(whole, alpha=weight_decay) if weight_decay else g) * factors[i]
            buffers: list[Any] = [None if first else buffer for buffer in others] or [None]
            sgd(
                [whole],
                [g],
                buffers,
                fused=True,
                weight_decay=weight_decay if factors is None else 0.0,
                momentum=momentum,
                lr=lr,
                dampening=dampening,
                nesterov=nesterov,
                maximize=maximize and factors is None,
            )
            if first and others:
                others[0].copy_(buffers[0])
            if low is not None:
                for half, value in zip((piece, low), split_halves(whole), strict=True):
                    half.copy_(value)


def pieces_of(x: Tensor) -> tuple[Tensor, ...]:
    """A packed tensor in the order of its memory; on a CPU by the piece."""
    return x.as_strided((x.numel(),), (1,)).split(PIECE if x.is_cpu else max(1, x.numel()))
