"""Operator `fastalex::augment`.  No gradient: its input are bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalex import backend, gpu
from fastalex.cpu import augment as cpu_augment
from fastalex.ops.common import device_of

NAME = "augment"


@torch.library.custom_op("fastalex::augment", mutates_args=())
def augment(
    images: Tensor,
    indices: Tensor,
    seed: Tensor,
    size: int,
    colours: list[float],
    block: int,
    padding: list[int],
    dtype: torch.dtype,
) -> Tensor:
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
) -> Tensor:
    top, bottom, left, right = padding
    shape = (images.shape[0], 3 * block * block, (size + top + bottom) // block, (size + left + right) // block)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
