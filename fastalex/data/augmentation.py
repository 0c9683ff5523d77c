"""Augmentation of whole batches on the model's device: the 2012 paper's crops, mirror images and colours.

What happens to a picture follows from a seed and the picture's number, not from the batch that it is in: any number
of processes, a run that was resumed, the Triton kernel and PyTorch on a CPU all see the same crop of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from fastalex.backend import KERNEL_DTYPES
from fastalex.data.preprocessing import Colours, Preprocessing

Padding = tuple[tuple[int, int], tuple[int, int]]
# Krizhevsky et al. 2012, section 4.1: "a Gaussian with mean zero and standard deviation 0.1"
JITTER = 0.1


@overload
def augment(
    images: Tensor,
    indices: Tensor,
    seed: int | Tensor,
    preprocessing: Preprocessing,
    *,
    colours: Colours | None = None,
    jitter: float = JITTER,
    dtype: torch.dtype = torch.float32,
    block: int = 1,
    padding: Padding = ((0, 0), (0, 0)),
    slots: Tensor | None = None,
    labels: None = None,
) -> Tensor: ...


@overload
def augment(
    images: Tensor,
    indices: Tensor,
    seed: int | Tensor,
    preprocessing: Preprocessing,
    *,
    colours: Colours | None = None,
    jitter: float = JITTER,
    dtype: torch.dtype = torch.float32,
    block: int = 1,
    padding: Padding = ((0, 0), (0, 0)),
    slots: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]: ...


def augment(
    images: Tensor,
    indices: Tensor,
    seed: int | Tensor,
    preprocessing: Preprocessing,
    *,
    colours: Colours | None = None,
    jitter: float = JITTER,
    dtype: torch.dtype = torch.float32,
    block: int = 1,
    padding: Padding = ((0, 0), (0, 0)),
    slots: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A random crop of each picture, mirrored half of the time, its colours changed, normalised: in one pass.

    images: uint8 (N, 3, H, W), best in channels_last.  indices: int64 (N,), the pictures' numbers in their set.
    slots: int64 (N,): images is a whole set (M, 3, H, W), in channels_last, and slots say where in it each picture of
    the batch lies; they are read where they lie, without a batch of bytes in between.  labels: int64 (M,) of the set.
    seed: one for each epoch; a tensor of one int64 on the images' device is read by the kernel, so that a captured
    CUDA graph draws anew when it changes.  preprocessing: crop, mean and std; its `resize` plays no part here.
    colours: adds sum_k vectors[k] * values[k] * a_k to all pixels of a picture, with a_k ~ N(0, jitter), for pixels
    in [0, 1]; by default nothing.  That is the paper's formula; the program that its authors published multiplied by
    standard deviations, the roots of these eigenvalues, which is several times as much.

    Returns (N, 3, crop, crop) in channels_last, and where labels are given those of the batch, too.  With block = 4:
    (N, 48, H', W'), the blocks that AlexNet's first convolution takes (`padding=model.block_padding(crop, crop)`): the
    space-to-depth of the result with `padding` ((top, bottom), (left, right)), where channel (i * 4 + j) * 3 + c is
    pixel (i, j) of a block.
    dtype: float32, float16 or bfloat16, computed in float32 and rounded once.

    Raises ValueError for what does not fit, IndexError for a slot outside of the set.  On a GPU, whose slots nobody
    could read without waiting for it, such a picture is NaN all over, and nothing outside of the set is read.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    batch, _, height, width = images.shape
    crop = preprocessing.crop
    if slots is not None:
        batch = len(indices)
        if slots.shape != (batch,) or slots.dtype != torch.int64:
            raise ValueError(f"slots must be int64 ({batch},), got {slots.dtype} {tuple(slots.shape)}")
        if not images.permute(0, 2, 3, 1).is_contiguous():
            raise ValueError(f"images must be in channels_last where slots are given, got strides {images.stride()}")
    if labels is not None:
        if slots is None:
            raise ValueError("labels need slots: those of a batch need no gathering")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64 or labels.device != images.device:
            raise ValueError(
                f"labels must be int64 ({len(images)},) on {images.device}, "
                f"got {labels.dtype} {tuple(labels.shape)} on {labels.device}"
            )
    if indices.shape != (batch,) or indices.dtype != torch.int64:
        raise ValueError(f"indices must be int64 ({batch},), got {indices.dtype} {tuple(indices.shape)}")
    if preprocessing.channels != 3 or not 1 <= crop <= min(height, width):
        raise ValueError(
            f"preprocessing must have 3 channels and a crop in [1, {min(height, width)}] for pictures of "
            f"{height}x{width}, got {preprocessing.channels} and {crop}"
        )
    if not 0 <= jitter < float("inf"):
        raise ValueError(f"jitter must be a number of at least 0, got {jitter}")
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    (top, bottom), (left, right) = padding
    if block not in (1, 4) or (block == 1 and any((top, bottom, left, right))):
        raise ValueError(f"block must be 1 without padding, or 4, got {block} and {padding}")
    rows, columns = crop + top + bottom, crop + left + right
    if min(rows, columns) < 1 or rows % block or columns % block:
        raise ValueError(f"padding must make the crop {crop} positive multiples of {block}, got {padding}")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must lie in [-2^63, 2^63), got {seed}")
        # filled on the device: a copy from pageable memory would wait for all that it still has to do
        seed = torch.full((1,), seed, dtype=torch.int64, device=images.device)
    elif seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != images.device:
        raise ValueError(
            f"seed must be an integer or one int64 on {images.device}, "
            f"got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    axes = [0.0] * 9
    if colours is not None:
        axes = [jitter * v * x for v, vector in zip(colours.values, colours.vectors, strict=True) for x in vector]
    from fastalex import ops

    if slots is not None:
        slots = moved(slots, images.device)
    looks = [*preprocessing.mean, *preprocessing.std, *axes]
    inputs, taken = ops.common.call(
        ops.augment, images, moved(indices, images.device), seed, crop, looks, block, [top, bottom, left, right], dtype,
        slots, labels,
    )  # fmt: skip
    return inputs if labels is None else (inputs, taken)


Corner = tuple[int, int, bool]


def centre(shape: Sequence[int], size: int) -> list[Corner]:
    """The one corner of `centre_crop` in pictures of shape (..., H, W)."""
    height, width = shape[-2:]
    return [((height - size) // 2, (width - size) // 2, False)]


def ten_corners(shape: Sequence[int], size: int) -> list[Corner]:
    """(top, left, mirrored) of the crops in the four corners and the centre, and of their mirror images.  shape:
    (..., H, W).

    In the order and at the places of torchvision's `ten_crop`: the second five are the crops of the mirrored picture.
    """
    bottom, right = shape[-2] - size, shape[-1] - size
    middle = round(bottom / 2), round(right / 2)
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), middle]
    return [(top, left, False) for top, left in places] + [(top, right - left, True) for top, left in places]


def cropped(
    images: Tensor, corners: list[Corner], preprocessing: Preprocessing, *, slots: Tensor | None = None
) -> Tensor:
    """The same crops of each picture, normalised, in one launch: float32 (K * N, C, crop, crop), crop by crop.

    images, slots: as in `augment`, of one channel or three.  corners: K of them, within the pictures.
    Raises IndexError for a slot outside of the set, as `augment`.
    """
    from fastalex import ops

    flat = [int(number) for corner in corners for number in corner]
    looks = [*preprocessing.mean, *preprocessing.std]
    return ops.common.call(ops.crops, images, flat, preprocessing.crop, looks, torch.float32, slots)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device.  A copy to a GPU that is not from pinned memory would wait for all its work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
