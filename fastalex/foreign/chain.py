"""What Caffe's AlexNets have in common, in whatever file they lie: a chain of layers, and Caffe's idea of a picture.

A reader of one kind of file turns it into `Layer`s; `state_of` checks them, one by one, against the variants that
Caffe published, and makes the state_dict.  The two variants have parameters of the same shapes: only the order of
pooling and normalisation tells them apart, so a file without its layers could not be loaded safely.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalex import fields
from fastalex.alexnet import parameter_shapes
from fastalex.data.preprocessing import Preprocessing
from fastalex.variants import VARIANTS, Variant

CONVOLUTION, RELU, LRN, MAX_POOL, LINEAR = "convolution", "ReLU", "LRN", "max-pooling", "linear layer"
# What changes nothing in evaluation, or only the form of the output.
PASSED_OVER = {"Dropout", "Softmax", "SoftmaxWithLoss", "Accuracy", "Split", "Reshape", "Flatten", "Identity"}
PUBLISHED = ("bvlc_alexnet", "caffenet")
MOST_CLASSES = 2**16  # a damaged file may ask for any number

# Blue, green, red: the mean of ILSVRC 2012's training pictures as Caffe has it (the average over the pixels of
# imagenet_mean.binaryproto, python/caffe/imagenet/ilsvrc_2012_mean.npy).
IMAGENET_MEAN = (104.00698793, 116.66876762, 122.67891434)


@dataclass(frozen=True)
class Layer:
    """A layer of a file.  `kind`: one of the five above, or what the file calls it, with anything odd about it.

    `settings`: those of CONVOLUTION, LRN and MAX_POOL, by the names of torch.  `parameters`: weight, bias.
    """

    name: str
    kind: str
    bottom: str
    top: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Pixels:
    """What a net takes: (pixel - mean) * scale, for pixels in [0, 255] and `mean` in the order blue, green, red."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    scale: float = 1.0


def state_of(layers: Sequence[Layer], pixels: Pixels, path: Path) -> tuple[dict[str, Tensor], str]:
    """The state_dict in these layers, for pictures as `Preprocessing.for_photos` makes them, and its variant's name.

    Raises ValueError, naming the file, the layer and the setting, for anything but Caffe's two AlexNets.
    """
    chain = list(_follow(layers, path))
    variant = _find_variant(chain, path)
    parameters: list[Tensor] = []
    for layer, (kind, settings) in zip(chain, _layers_of(variant), strict=True):
        for setting, number in settings.items():
            found = layer.settings[setting]
            # the files hold numbers in single precision
            if not isinstance(found, int | float) or not math.isclose(found, number, rel_tol=1e-6):
                raise ValueError(
                    f"{path}: layer {layer.name} has {setting} {_shown(found)}, {variant.name} has {_shown(number)}"
                )
        if kind in (CONVOLUTION, LINEAR):
            if len(layer.parameters) != 2:
                raise ValueError(f"{path}: layer {layer.name} has {len(layer.parameters)} blobs, not weight and bias")
            parameters += layer.parameters
    classes = chain[-1].parameters[1].numel()
    fields.whole(f"{path}: the number of classes", classes, most=MOST_CLASSES)
    wanted = parameter_shapes(variant, classes)
    owners = [layer for layer in chain if layer.parameters for _ in range(2)]
    state = {}
    for (name, shape), value, layer in zip(wanted.items(), parameters, owners, strict=True):
        if value.shape != shape:
            raise ValueError(
                f"{path}: the {name.rpartition('.')[2]} of layer {layer.name} is {tuple(value.shape)}, "
                f"{variant.name} has {tuple(shape)}"
            )
    folded = fold(parameters[0], parameters[1], pixels, Preprocessing.for_photos(3, variant.crop))
    for name, value, layer in zip(wanted, [*folded, *parameters[2:]], owners, strict=True):
        state[name] = value.float()
        if not state[name].isfinite().all():
            raise ValueError(f"{path}: the {name.rpartition('.')[2]} of layer {layer.name} is not finite")
    return state, variant.name


def fold(weight: Tensor, bias: Tensor, pixels: Pixels, looks: Preprocessing) -> tuple[Tensor, Tensor]:
    """Weight (K, 3, H, W) and bias (K,) of a first convolution for what `looks` makes of a picture, in float64.

    In: those for the net's own pixels, blue first.  `looks` hands over y = (x / 255 - m) / s, red first, so that
    x - mean = 255 s y + (255 m - mean): the factor goes into the weight, whose input channels turn around, the rest,
    a constant per channel, into the bias.  That is an identity and no approximation, because the convolution has no
    padding: at a border a padded zero would stand for the mean in one net and for black in the other.

    The alternative is a `Preprocessing` with mean / 255 and 1 / 255, which leaves the weight as it is but for the order
    of its channels.  It would bind these weights to pictures of their own kind; folded, they take what every other
    model here and in torchvision takes, in `fastalex.alexnet`, fine-tuning and torch.hub alike.  The price is a
    rounding to float32, half a unit in the last place of each weight.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (looks.mean, looks.std))
    weight = weight.double().flip(1) * pixels.scale
    offset = 255 * mean - torch.tensor(pixels.mean, dtype=torch.float64).flip(0)
    constant = torch.einsum("kchw,c->k", weight, offset)
    return weight * (255 * std).view(-1, 1, 1), bias.double() + constant


def _follow(layers: Sequence[Layer], path: Path) -> Iterator[Layer]:
    """The layers from the first one with parameters on, each of which takes what the one before it made."""
    top = next((layer.bottom for layer in layers if layer.parameters), None)
    if top is None:
        raise ValueError(f"{path} is damaged or of another kind: none of its {len(layers)} layers has weights")
    for layer in layers:
        if layer.bottom == top:
            top = layer.top
            if layer.kind not in PASSED_OVER:
                yield layer
        elif layer.parameters:
            raise ValueError(f"{path}: layer {layer.name} takes {layer.bottom!r}, not {top!r}, which comes before it")


def _layers_of(variant: Variant) -> Iterator[tuple[str, dict[str, float]]]:
    """The kind and the settings of each layer that Caffe would write for this variant."""
    for conv in variant.convs:
        settings: dict[str, float] = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
        yield CONVOLUTION, settings | {"groups": conv.groups}
        yield RELU, {}
        after: list[tuple[str, dict[str, float]]] = []
        if norm := conv.lrn:
            after.append((LRN, {"size": norm.size, "alpha": norm.alpha, "beta": norm.beta, "k": norm.k}))
        if conv.pool:
            after.append((MAX_POOL, {"kernel_size": conv.pool, "stride": conv.pool_stride, "padding": 0}))
        yield from reversed(after) if variant.pool_first else after
    yield from [(LINEAR, {}), (RELU, {}), (LINEAR, {}), (RELU, {}), (LINEAR, {})]


def _find_variant(chain: Sequence[Layer], path: Path) -> Variant:
    """The published variant of these kinds of layers in this order."""
    furthest = -1
    for name in PUBLISHED:
        kinds = [kind for kind, _ in _layers_of(VARIANTS[name])]
        found = [layer.kind for layer in chain]
        if found == kinds:
            return VARIANTS[name]
        same = next((i for i, pair in enumerate(zip(found, kinds, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(found), len(kinds)) if same is None else same
        if same > furthest:
            furthest = same
            expected = kinds[same] if same < len(kinds) else "no more layers"
            here = f"layer {chain[same].name} is: {chain[same].kind}" if same < len(chain) else "the file has no more"
            reason = f"where {name} has {expected}, {here}"
    raise ValueError(f"{path} is none of {', '.join(PUBLISHED)}: {reason}")


def _shown(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
