"""From 8-bit pictures to what the model takes, whole batches at a time, on whatever device they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalex import fields

LARGEST = 4096  # height and width of an input


class Colours(NamedTuple):
    """Principal components of the RGB values of a set's pixels, in [0, 1], the largest first.

    `values`: the eigenvalues of their covariance matrix; `vectors`: one unit vector (R, G, B) for each.
    """

    values: tuple[float, ...]
    vectors: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of a picture.  Travels with its checkpoint.

    `channels` 1 (grey) or 3 (RGB); the short side is resized to `resize`, then a square of `crop` pixels is cut out;
    `mean` and `std` per channel, for values in [0, 1].
    """

    channels: int
    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value that makes no input."""
        fields.one_of("channels", self.channels, 1, 3)
        fields.whole("resize", self.resize, most=2 * LARGEST)
        fields.whole("crop", self.crop, most=LARGEST)
        if self.crop > self.resize:
            raise ValueError(f"crop must be at most resize, {self.resize}, got {self.crop}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != self.channels:
                raise ValueError(f"{name} must be a number for each of {self.channels} channels, got {values!r}")
            for value in values:
                fields.number(name, value)
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    @classmethod
    def from_dict(cls, values: Any) -> Preprocessing:
        """What `dataclasses.asdict` took apart, also after a trip through JSON.

        Raises ValueError, naming the field, for one that is missing, unknown or wrong.
        """
        found = fields.complete("preprocessing", cls, values)
        found |= {name: fields.listed(f"preprocessing.{name}", found[name]) for name in ("mean", "std")}
        try:
            return cls(**found)
        except ValueError as error:
            raise ValueError(f"preprocessing.{error}") from None

    @classmethod
    def for_photos(cls, channels: int, crop: int) -> Preprocessing:
        """The usual one for photographs: short side 8/7 of the crop (256 for 224), ImageNet's mean and deviation."""
        if channels == 1:
            return cls(1, crop * 8 // 7, crop, (0.449,), (0.226,))
        return cls(channels, crop * 8 // 7, crop, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) in [0, 255] -> float32, (x / 255 - mean) / std."""
        # filled on the device: a copy from the host could not be captured in a CUDA graph
        mean, std = (
            torch.stack([torch.full((1, 1), value, device=images.device) for value in values])
            for values in (self.mean, self.std)
        )
        return (images.float() / 255 - mean) / std

    def for_training(self, images: Tensor) -> Tensor:
        """Random crops, half of them mirrored, normalised: uint8 (N, C, H, W) -> float32 (N, C, crop, crop)."""
        return self.normalise(random_flip(random_crop(images, self.crop)))

    def for_evaluation(self, images: Tensor) -> Tensor:
        """The centre of each picture, normalised: uint8 (N, C, H, W) -> float32 (N, C, crop, crop)."""
        return self.normalise(centre_crop(images, self.crop))


def random_crop(images: Tensor, size: int) -> Tensor:
    """A square of `size` pixels from each picture, each at a place of its own: (N, C, H, W) -> (N, C, size, size)."""
    count, _, height, width = images.shape
    top = torch.randint(height - size + 1, (count,), device=images.device)
    left = torch.randint(width - size + 1, (count,), device=images.device)
    # unfold is a view of every possible crop, so that only the chosen ones are copied
    crops = images.unfold(2, size, 1).unfold(3, size, 1)
    return crops[torch.arange(count, device=images.device), :, top, left]


def random_flip(images: Tensor) -> Tensor:
    """Each picture of (N, C, H, W) mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The square of `size` pixels in the middle: (N, C, H, W) -> (N, C, size, size)."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
