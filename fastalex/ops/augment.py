"""Operators `fastalex::augment` and `fastalex::crops`.  No gradient: their inputs are bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalex import backend, gpu
from fastalex.cpu import augment as cpu_augment
from fastalex.ops.common import device_of, operator

NAME = "augment"


@operator("fastalex::augment")
def augment(
    images: Tensor,
    indices: Tensor,
    seed: Tensor,
    size: int,
    colours: list[float],
    block: int,
    padding: list[int],
    dtype: torch.dtype,
    slots: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As fastalex.kernels.augment.augment.  colours: mean, std, three axes; padding: (top, bottom, left, right)."""
    with device_of(images):
        # PyTorch's operations run on whatever device where the kernel cannot
        triton = not backend.takes_reference(NAME, images) and backend.takes_triton(NAME, images)
        return (gpu.augment if triton else cpu_augment).augment(
            images,
            indices,
            seed,
            size,
            *(colours[0:3], colours[3:6]),
            [colours[6:9], colours[9:12], colours[12:15]],
            block=block,
            padding=((padding[0], padding[1]), (padding[2], padding[3])),
            dtype=dtype,
            slots=slots,
            labels=labels,
        )


@augment.register_fake
def _(
    images: Tensor,
    indices: Tensor,
    seed: Tensor,
    size: int,
    colours: list[float],
    block: int,
    padding: list[int],
    dtype: torch.dtype,
    slots: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    top, bottom, left, right = padding
    batch = indices.shape[0]
    shape = (batch, 3 * block * block, (size + top + bottom) // block, (size + left + right) // block)
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    return out, indices.new_empty(0 if labels is None else batch)


@operator("fastalex::crops")
def crops(
    images: Tensor, corners: list[int], size: int, colours: list[float], dtype: torch.dtype, slots: Tensor | None = None
) -> Tensor:
    """As fastalex.kernels.augment.crops.  corners: top, left, mirrored (0 or 1) of each; colours: mean, std."""
    with device_of(images):
        triton = not backend.takes_reference(NAME, images) and backend.takes_triton(NAME, images)
        channels = images.shape[1]
        module = gpu.augment if triton and channels == 3 else cpu_augment
        triples = [(corners[i], corners[i + 1], bool(corners[i + 2])) for i in range(0, len(corners), 3)]
        return module.crops(images, triples, size, colours[:channels], colours[channels:], dtype=dtype, slots=slots)


@crops.register_fake
def _(
    images: Tensor, corners: list[int], size: int, colours: list[float], dtype: torch.dtype, slots: Tensor | None = None
) -> Tensor:
    batch = images.shape[0] if slots is None else slots.shape[0]
    shape = (len(corners) // 3 * batch, images.shape[1], size, size)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
