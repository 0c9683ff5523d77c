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


def inside(slots: Tensor, pictures: int) -> list[int]:
    """The slots as numbers.  Raises IndexError for one that is no picture's."""
    places: list[int] = slots.tolist()
    outside = [slot for slot in places if not 0 <= slot < pictures]
    if outside:
        raise IndexError(f"slots must lie in [0, {pictures}), got {outside[0]}")
    return places


def crops(
    x: Tensor,
    corners: list[tuple[int, int, bool]],
    size: int,
    mean: list[float],
    std: list[float],
    *,
    dtype: torch.dtype = torch.float32,
    slots: Tensor | None = None,
) -> Tensor:
    """As fastalex.kernels.augment.crops, where the arguments are described and checked; any number of channels."""
    if slots is not None:
        inside(slots, len(x))
        x = x.permute(0, 2, 3, 1)[slots].permute(0, 3, 1, 2)
    parts = [x[..., top : top + size, left : left + size] for top, left, _ in corners]
    cut = torch.cat([part.flip(-1) if mirrored else part for part, (*_, mirrored) in zip(parts, corners, strict=True)])
    of_channels = [torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (mean, std)]
    return (
        ((cut.float() / 255 - of_channels[0]) / of_channels[1]).to(dtype).contiguous(memory_format=torch.channels_last)
    )


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
    slots: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As fastalex.kernels.augment.augment, where the arguments are described and checked; float64 besides.

    A slot outside of the set raises IndexError.
    """
    height, width = x.shape[2:]
    batch = len(index)
    draws = draw(index, seed, height, width, size)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    deviation = torch.tensor(std, dtype=compute, device=x.device)
    shift = (draws.normals.to(compute) @ torch.tensor(axes, dtype=compute, device=x.device)) / deviation
    shift -= torch.tensor(mean, dtype=compute, device=x.device) / deviation
    # whole rows at a time: loops over three channels would be six times as slow
    scale, shift = (1 / (255 * deviation)).repeat(size), shift.repeat(1, size)
    (above, below), (before, behind) = padding
    rows, columns = (size + above + below) // block, (size + before + behind) // block
    y = torch.empty((batch, rows, columns, 3 * block * block), dtype=dtype, device=x.device)
    places = range(batch) if slots is None else inside(slots, len(x))
    corners = zip(places, draws.top.tolist(), draws.left.tolist(), draws.mirrored.tolist(), strict=True)
    for i, (slot, top, left, mirrored) in enumerate(corners):
        crop = x[slot, :, top : top + size, left : left + size].permute(1, 2, 0)
        crop = (crop.flip(1) if mirrored else crop).reshape(size, 3 * size).to(compute)
        crop = torch.addcmul(shift[i], crop, scale).view(size, size, 3)
        if block > 1:
            crop = torch.nn.functional.pad(crop, (0, 0, before, behind, above, below))
            crop = crop.view(rows, block, columns, 3 * block).transpose(1, 2)
        y[i].view(crop.shape).copy_(crop)
    taken = torch.empty(0, dtype=torch.int64, device=x.device) if labels is None else labels[slots]
    return y.permute(0, 3, 1, 2), taken
