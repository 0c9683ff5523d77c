"""The networks whose features LPIPS compares, as data: torchvision's AlexNet, VGG16 and SqueezeNet 1.1, up to the last
ReLU that is looked at.

A trunk is a tuple of layers in the order of computation.  The parameters of a trunk are a flat list, weight and bias of
each convolution in this order, of a Fire's squeeze, expand1x1 and expand3x3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastalex.kernels.geometry import output_size


@dataclass(frozen=True)
class Conv:
    """Convolution and ReLU.  tap: the output is one of the features."""

    inputs: int
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    tap: bool = False
    parameters = 2

    def size(self, length: int) -> int:
        return output_size((length,), (self.kernel,), (self.stride,), (self.padding,), (1,))[0]


@dataclass(frozen=True)
class Pool:
    """Max-pooling without padding."""

    kernel: int
    stride: int
    ceil: bool = False
    tap = False
    parameters = 0

    def size(self, length: int) -> int:
        return output_size((length,), (self.kernel,), (self.stride,), (0,), (1,), self.ceil)[0]


@dataclass(frozen=True)
class Fire:
    """SqueezeNet's module: a 1x1 convolution to `squeeze` channels, then 1x1 and 3x3 ones side by side; ReLU each."""

    inputs: int
    squeeze: int
    expand: int
    tap: bool = False
    parameters = 6

    @property
    def channels(self) -> int:
        return 2 * self.expand

    def size(self, length: int) -> int:
        return length


Layer = Conv | Pool | Fire


@dataclass(frozen=True)
class Trunk:
    """layers: in order; indices: of each in torchvision's `features`; slices: in which of the lpips package's slices
    each lies."""

    layers: tuple[Layer, ...]
    indices: tuple[int, ...]

    @property
    def slices(self) -> tuple[int, ...]:
        """The number of the slice, from 1, that each layer belongs to: a slice ends with a feature."""
        found, current = [], 1
        for layer in self.layers:
            found.append(current)
            current += layer.tap
        return tuple(found)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the features."""
        return tuple(layer.channels for layer in self.layers if layer.tap)  # type: ignore[union-attr]

    def names(self) -> Iterator[str]:
        """Of the parameters, as the lpips package calls them: slice1.0.weight, slice1.0.bias, ..."""
        for layer, index, number in zip(self.layers, self.indices, self.slices, strict=True):
            for part in {0: (), 2: ("",), 6: (".squeeze", ".expand1x1", ".expand3x3")}[layer.parameters]:
                for kind in ("weight", "bias"):
                    yield f"slice{number}.{index}{part}.{kind}"

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Of the parameters."""
        for layer in self.layers:
            if isinstance(layer, Conv):
                convs = [(layer.channels, layer.inputs, layer.kernel)]
            elif isinstance(layer, Fire):
                convs = [(layer.squeeze, layer.inputs, 1), (layer.expand, layer.squeeze, 1)]
                convs.append((layer.expand, layer.squeeze, 3))
            else:
                convs = []
            for outputs, inputs, kernel in convs:
                yield outputs, inputs, kernel, kernel
                yield (outputs,)

    def sizes(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Height and width after each layer, for images of this one; 0 or less where no window fits."""
        height, width = size
        found = []
        for layer in self.layers:
            height, width = layer.size(height), layer.size(width)
            found.append((height, width))
        return found

    def feature_sizes(self, size: Sequence[int]) -> list[tuple[int, int]]:
        return [size for layer, size in zip(self.layers, self.sizes(size), strict=True) if layer.tap]

    def smallest(self) -> int:
        """The smallest height and width of an image."""
        return next(length for length in range(1, 1024) if all(min(size) > 0 for size in self.sizes((length, length))))


def _vgg16() -> Trunk:
    layers: list[Layer] = []
    indices: list[int] = []
    inputs, index = 3, 0
    for channels, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(Pool(2, 2))
            indices.append(index)
            index += 1
        for i in range(depth):
            layers.append(Conv(inputs, channels, 3, padding=1, tap=i == depth - 1))
            indices.append(index)
            inputs, index = channels, index + 2
    return Trunk(tuple(layers), tuple(indices))


TRUNKS = {
    "alex": Trunk(
        (
            Conv(3, 64, 11, 4, 2, tap=True),
            Pool(3, 2),
            Conv(64, 192, 5, padding=2, tap=True),
            Pool(3, 2),
            Conv(192, 384, 3, padding=1, tap=True),
            Conv(384, 256, 3, padding=1, tap=True),
            Conv(256, 256, 3, padding=1, tap=True),
        ),
        (0, 2, 3, 5, 6, 8, 10),
    ),
    "vgg": _vgg16(),
    "squeeze": Trunk(
        (
            Conv(3, 64, 3, 2, tap=True),
            Pool(3, 2, ceil=True),
            Fire(64, 16, 64),
            Fire(128, 16, 64, tap=True),
            Pool(3, 2, ceil=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128, tap=True),
            Pool(3, 2, ceil=True),
            Fire(256, 48, 192, tap=True),
            Fire(384, 48, 192, tap=True),
            Fire(384, 64, 256, tap=True),
            Fire(512, 64, 256, tap=True),
        ),
        (0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
    ),
}
