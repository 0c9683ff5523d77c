"""Geometry as an operator's schema carries it, in flat lists of numbers, and as everything behind it takes it.

conv    stride, padding, dilation (height and width each), groups
window  kernel size, stride and, where there are any, padding and dilation
norm    size, alpha, beta, k, groups of an LRN; empty for none
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastalex.kernels.geometry import Pair, output_size


class Conv(NamedTuple):
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @property
    def flat(self) -> list[int]:
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def of(cls, flat: Sequence[int]) -> Conv:
        return cls((flat[0], flat[1]), (flat[2], flat[3]), (flat[4], flat[5]), flat[6])

    def output_shape(self, input: Tensor, weight: Tensor) -> tuple[int, ...]:
        size = output_size(input.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation)
        return input.shape[0], weight.shape[0], *size


class Norm(NamedTuple):
    size: int
    alpha: float
    beta: float
    k: float
    groups: int

    @classmethod
    def of(cls, flat: Sequence[float]) -> Norm:
        size, alpha, beta, k, groups = flat
        return cls(int(size), alpha, beta, k, int(groups))


def windows(flat: Sequence[int]) -> tuple[Pair, Pair, Pair, Pair]:
    """Kernel size, stride, padding and dilation; no padding and no dilation where there are none."""
    whole = (*flat, 0, 0, 1, 1)
    return (whole[0], whole[1]), (whole[2], whole[3]), (whole[4], whole[5]), (whole[6], whole[7])


def pooled_shape(shape: Sequence[int], window: Sequence[int], ceil_mode: bool = False) -> tuple[int, ...]:
    """(N, C, OH, OW) of a map's shape."""
    return *shape[:2], *output_size(shape[2:], *windows(window), ceil_mode)
