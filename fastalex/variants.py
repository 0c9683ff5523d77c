"""What an AlexNet is made of, as data: the six variants of the network, and the means to write others.

They differ in wiring, normalisation, padding and initialisation, not in code: a frozen `Variant` says what is built,
and `fastalex.alexnet.AlexNet` builds it.  Narrower networks for smaller images are other instances of `Variant`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from fastalex import fields
from fastalex.functional import ResponseNorm

# height and width of pictures, as `fastalex pack` has it
LARGEST = 4096


class BatchNorm(NamedTuple):
    """nn.BatchNorm2d (Ioffe and Szegedy 2015) without weight and bias; `momentum` is torch's, of running statistics."""

    eps: float = 1e-5
    momentum: float = 0.1


@dataclass(frozen=True)
class Conv:
    """One convolutional layer and what follows it, in the order of the fields (but see `Variant.relu`)."""

    channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    norm: ResponseNorm | BatchNorm | None = None
    pool: int | None = None  # the window; its stride is `pool_stride`
    pool_stride: int = 2
    std: float = 0.01  # of the initial weights
    bias: float = 0.0  # initial

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value that makes no layer."""
        for name in ("channels", "kernel_size", "stride", "groups", "pool_stride"):
            fields.whole(name, getattr(self, name))
        fields.whole("padding", self.padding, 0, self.kernel_size)
        if self.pool is not None:
            fields.whole("pool", self.pool)
        if isinstance(self.norm, BatchNorm):
            fields.number("norm.eps", self.norm.eps, 0)
            fields.number("norm.momentum", self.norm.momentum, 0)
            if self.norm.momentum > 1:
                raise ValueError(f"norm.momentum must be at most 1, got {self.norm.momentum}")
        elif self.norm is not None:
            if not isinstance(self.norm, tuple) or len(self.norm) != len(ResponseNorm._fields):
                raise ValueError(f"norm must be a ResponseNorm, a BatchNorm or None, got {self.norm!r}")
            size, *numbers, groups = self.norm
            fields.whole("norm.size", size)
            fields.whole("norm.groups", groups)
            for name, value in zip(ResponseNorm._fields[1:-1], numbers, strict=True):
                fields.number(f"norm.{name}", value)
        fields.number("std", self.std, 0)
        fields.number("bias", self.bias)
        if self.channels % self.groups:
            raise ValueError(f"groups must divide the {self.channels} channels, got {self.groups}")

    @property
    def lrn(self) -> ResponseNorm | None:
        """`norm`, if that is LRN."""
        return None if isinstance(self.norm, BatchNorm) else self.norm


@dataclass(frozen=True)
class Variant:
    """What an AlexNet is made of.

    `relu` says where the ReLU stands in layers with normalisation or pooling: "first" (conv, ReLU, then those) or
    "last" (after pooling).  `pool_first` pools before normalising.  `crop` is the height and width of the images that
    the network was made for, `pad_end` what is added to their right and bottom.  `init` is "normal" (the paper's:
    weights from N(0, std), given biases) or "torch" (PyTorch's default for its layers, as torchvision's model).
    `features_size` is the height and width of the last feature map; other sizes are averaged to it.
    """

    name: str
    convs: tuple[Conv, ...]
    crop: int = 224
    in_channels: int = 3
    pad_end: int = 0
    relu: str = "first"
    pool_first: bool = False
    hidden: tuple[int, int] = (4096, 4096)
    hidden_std: float = 0.01
    hidden_bias: float = 0.0
    dropout_first: bool = False  # before the two hidden layers, as torchvision, instead of after them
    init: str = "normal"
    features_size: int = 6

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value that makes no network."""
        if not isinstance(self.name, str):
            raise ValueError(f"name must be a text, got {self.name!r}")
        if not isinstance(self.convs, tuple) or not self.convs or not all(isinstance(c, Conv) for c in self.convs):
            raise ValueError(f"convs must be a tuple of one Conv or more, got {self.convs!r}")
        fields.whole("crop", self.crop, most=LARGEST)
        fields.whole("features_size", self.features_size, most=LARGEST)
        fields.whole("in_channels", self.in_channels)
        fields.whole("pad_end", self.pad_end, 0, self.crop)
        fields.one_of("relu", self.relu, "first", "last")
        fields.one_of("init", self.init, "normal", "torch")
        fields.one_of("pool_first", self.pool_first, False, True)
        fields.one_of("dropout_first", self.dropout_first, False, True)
        if not isinstance(self.hidden, tuple) or len(self.hidden) != 2:
            raise ValueError(f"hidden must be two numbers, got {self.hidden!r}")
        for size in self.hidden:
            fields.whole("hidden", size)
        fields.number("hidden_std", self.hidden_std, 0)
        fields.number("hidden_bias", self.hidden_bias)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Variant:
        """The variant that `dataclasses.asdict` took apart, also after a trip through JSON.

        Raises ValueError, naming the field, for one that is missing, unknown or wrong.
        """
        found = fields.complete("variant", cls, values)
        convs = []
        for i, conv in enumerate(fields.listed("variant.convs", found["convs"])):
            conv = fields.complete(f"variant.convs[{i}]", Conv, conv)
            norm = conv["norm"]
            if norm is not None:
                norm = fields.listed(f"variant.convs[{i}].norm", norm)
                # JSON keeps no names: the two differ in their length
                kinds = {len(kind._fields): kind for kind in (ResponseNorm, BatchNorm)}
                conv["norm"] = kinds[len(norm)](*norm) if len(norm) in kinds else norm
            try:
                convs.append(Conv(**conv))
            except ValueError as error:
                raise ValueError(f"variant.convs[{i}].{error}") from None
        found |= {"convs": tuple(convs), "hidden": fields.listed("variant.hidden", found["hidden"])}
        try:
            return cls(**found)
        except ValueError as error:
            raise ValueError(f"variant.{error}") from None


def _krizhevsky(norm: ResponseNorm, conv1_padding: int, bias: float, std: float = 0.01) -> tuple[Conv, ...]:
    """The five layers of the 2012 network, split over two GPUs in layers 2, 4 and 5."""
    return (
        Conv(96, 11, stride=4, padding=conv1_padding, norm=norm, pool=3),
        Conv(256, 5, padding=2, groups=2, norm=norm, pool=3, bias=bias),
        Conv(384, 3, padding=1, std=std),
        Conv(384, 3, padding=1, groups=2, std=std, bias=bias),
        Conv(256, 3, padding=1, groups=2, std=std, bias=bias, pool=3),
    )


# The 2012 text: section 3.3 prints a sum with alpha = 1e-4 over n = 5, which is alpha = 5e-4 in torch's mean.
PAPER = Variant(
    "paper",
    _krizhevsky(ResponseNorm(5, 5e-4, 0.75, 2.0), conv1_padding=2, bias=1.0),
    hidden_bias=1.0,
)
# What the authors' program ran (its layers-145.cfg): alpha / n, LRN inside each GPU's half, padding on the right and
# bottom only (224 -> 55 by rounding up), ReLU after pooling.  That file's additional spatial normalisation after the
# second LRN is left out.
CODE2012 = Variant(
    "code2012",
    _krizhevsky(ResponseNorm(5, 1e-4, 0.75, 2.0, groups=2), conv1_padding=0, bias=1.0, std=0.03),
    pad_end=3,
    relu="last",
    hidden_bias=1.0,
)
# torchvision.models.alexnet, the single column of "One weird trick" (Krizhevsky 2014) without LRN.
TORCHVISION = Variant(
    "torchvision",
    (
        Conv(64, 11, stride=4, padding=2, pool=3),
        Conv(192, 5, padding=2, pool=3),
        Conv(384, 3, padding=1),
        Conv(256, 3, padding=1),
        Conv(256, 3, padding=1, pool=3),
    ),
    dropout_first=True,
    init="torch",
)
# Caffe's two models (BVLC/caffe, models/): k = 1, alpha / n, 227x227 crops.  Their pooling rounds up, which is the
# same at 55, 27 and 13.
BVLC_ALEXNET = Variant(
    "bvlc_alexnet",
    _krizhevsky(ResponseNorm(5, 1e-4, 0.75, 1.0), conv1_padding=0, bias=0.1),
    crop=227,
    hidden_std=0.005,
    hidden_bias=0.1,
)
CAFFENET = Variant(
    "caffenet",
    _krizhevsky(ResponseNorm(5, 1e-4, 0.75, 1.0), conv1_padding=0, bias=1.0),
    crop=227,
    pool_first=True,
    hidden_std=0.005,
    hidden_bias=1.0,
)
# AlexNet with batch normalisation in the place of LRN, for large batches: what the solvers for 8K, 16K and 32K pictures
# of You, Gitman and Ginsburg (2017) train (borisgin/nvcaffe, models/alexnet_bn/train_val2.prototxt).  Normalised is
# what the next convolution reads, behind the pooling, without scale and shift; conv5 has none behind it.
BN = Variant(
    "bn",
    tuple(
        replace(conv, norm=BatchNorm(1e-4, 0.1) if number < 5 else None, bias=0.01)
        for number, conv in enumerate(BVLC_ALEXNET.convs, 1)
    ),
    crop=227,
    pool_first=True,
    hidden_std=0.005,
    hidden_bias=0.1,
)
VARIANTS: Mapping[str, Variant] = {v.name: v for v in (PAPER, CODE2012, TORCHVISION, BVLC_ALEXNET, CAFFENET, BN)}


VariantName = Literal["paper", "code2012", "torchvision", "bvlc_alexnet", "caffenet", "bn"]


def find_variant(variant: str | Variant) -> Variant:
    """The variant of this name (or the variant itself).  Raises ValueError for an unknown name."""
    if isinstance(variant, Variant):
        return variant
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return VARIANTS[variant]
