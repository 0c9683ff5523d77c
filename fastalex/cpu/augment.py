"""Augmentation in PyTorch, on any device: the same crops, mirror images and colours as fastalex/kernels/augment.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox(seed: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64) of Philox4x32-10 (Salmon et al. 2011): key `seed`, counter (index, 0), int64 each.

    A product of two words wraps around in int64, but its bits are those of the unsigned one.
    """
    c0, c1 = index & WORD, index >> 32 & WORD
    c2 = c3 = torch.zeros_like(index)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (high >> 32 & WORD) ^ c1 ^ k0, high & WORD, (low >> 32 & WORD) ^ c3 ^ k1, low & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


class Draws(NamedTuple):
    """What is random for each picture: int64 (N,) corners, bool (N,), and standard normal float32 (N, 3)."""

    top: Tensor
    left: Tensor
    mirrored: Tensor
    normals: Tensor


def draw(index: Tensor, seed: Tensor, height: int, width: int, size: int) -> Draws:
    """The draws of the pictures with these int64 numbers, as the kernel makes them."""
    word, *others = philox(seed, index)
    crops = height - size + 1
    choice = word * (2 * crops * (width - size + 1)) >> 32
    # odd multiples of 2^-24 in (-1, 1), from 24 of 32 bits
    uniform = (2 * (torch.stack(others, 1) >> 8) + 1 - 2**24).double() * 2.0**-24
    normals = (2**0.5 * torch.erfinv(uniform)).float()
    return Draws(choice // 2 % crops, choice // (2 * crops), choice % 2 == 1, normals)


def augment(
    x: Tensor,
    index: Tensor,
    seed: Tensor,
    size: int,
    mean: list[float],
    std: list[float],
    axes: list[list[float]],
    *,
    block: int = 1,
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As fastalex.kernels.augment.augment, where the arguments are described and checked; float64 besides."""
    batch, _, height, width = x.shape
    top, left, mirrored, normals = draw(index, seed, height, width, size)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    deviation = torch.tensor(std, dtype=compute, device=x.device)
    shift = (normals.to(compute) @ torch.tensor(axes, dtype=compute, device=x.device)) / deviation
    shift -= torch.tensor(mean, dtype=compute, device=x.device) / deviation
    # unfold is a view of every possible crop, so that only the chosen ones are copied: (N, size, size, 3)
    crops = x.unfold(2, size, 1).unfold(3, size, 1)[torch.arange(batch, device=x.device), :, top, left]
    crops = torch.where(mirrored[:, None, None, None], crops.flip(3), crops).permute(0, 2, 3, 1)
    y = torch.addcmul(shift[:, None, None, :], crops.to(compute), 1 / (255 * deviation)).to(dtype)
    (above, below), (before, behind) = padding
    y = torch.nn.functional.pad(y, (0, 0, before, behind, above, below))
    rows, columns = y.shape[1] // block, y.shape[2] // block
    y = y.view(batch, rows, block, columns, block, 3).transpose(2, 3)
    return y.reshape(batch, rows, columns, 3 * block * block).permute(0, 3, 1, 2)
