"""What a variant of AlexNet consists of, layer by layer: shapes, neurons, parameters, arithmetic, and memory.

Shapes, parameters and arithmetic follow from the variant.  Memory is measured: the bytes of every tensor that autograd
keeps for the backward pass of one picture in fp32, once for this package's model and once for the same network of
torch.nn modules with in-place ReLUs, as torchvision writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastalex.alexnet import AlexNet
from fastalex.variants import BatchNorm, Variant, find_variant


@dataclass(frozen=True)
class Layer:
    """One row of the table, for one picture.

    name: as in Caffe: conv1, norm1, pool1, ..., fc6, fc7, fc8.  A ReLU and a dropout belong to the layer before them.
    shape: of the output, (channels, height, width) or (units,).
    neurons: outputs of convolutions and fully connected layers, the paper's count.
    parameters: weights and biases.
    flops: of convolutions and matrix products, two per multiply-add, biases left out; 0 for the other layers.
    eager_bytes: what torch.nn keeps for the backward pass.
    fused_bytes: what this package keeps, for the convolution and everything up to the next one; None in those rows.
    """

    name: str
    shape: tuple[int, ...]
    neurons: int
    parameters: int
    flops: int
    eager_bytes: int
    fused_bytes: int | None


@dataclass(frozen=True)
class Description:
    variant: str
    input: tuple[int, int, int]
    layers: tuple[Layer, ...]

    def total(self, column: str) -> int:
        """The sum of "neurons", "parameters", "flops", "eager_bytes" or "fused_bytes"."""
        return sum(getattr(layer, column) or 0 for layer in self.layers)

    def share(self, column: str, name: str) -> float:
        """The part of a column's sum that the layers hold whose name starts with `name`."""
        part = sum(getattr(layer, column) or 0 for layer in self.layers if layer.name.startswith(name))
        return part / self.total(column)

    def stages(self) -> dict[str, tuple[Layer, ...]]:
        """The layers, each convolution or fully connected layer together with what follows it, under its name."""
        found: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers:
            if layer.neurons:
                name = layer.name
            found[name] = (*found.get(name, ()), layer)
        return found

    def to_dict(self) -> dict[str, Any]:
        columns = ("neurons", "parameters", "flops", "eager_bytes", "fused_bytes")
        return {
            **asdict(self),
            "totals": {column: self.total(column) for column in columns},
            "fc6_share_of_parameters": self.share("parameters", "fc6"),
        }


def describe(variant: str | Variant = "paper", classes: int = 1000) -> Description:
    """The table of a variant.  Builds the network twice and runs one picture through each, on the CPU.

    Raises ValueError for an unknown variant or a number of classes below 1.
    """
    found = find_variant(variant)
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    size = (found.in_channels, found.crop, found.crop)
    with torch.device("meta"):  # the weights' values do not matter: drawing 61 million of them would take a second
        rows, stages = _torch_layers(found, classes), _fused_stages(found, classes)
    for _, module in (*rows, *stages):
        module.to_empty(device="cpu")
    eager, outputs = _kept(rows, size)
    fused, _ = _kept(stages, size)
    layers = []
    for (name, module), output, eager_bytes in zip(rows, outputs, eager.values(), strict=True):
        weighted = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        positions = output.shape[1:].numel() // output.shape[1]
        layers.append(
            Layer(
                name,
                tuple(output.shape[1:]),
                output.numel() if weighted else 0,
                sum(p.numel() for p in module.parameters()),
                sum(2 * m.weight.numel() * positions for m in weighted),
                eager_bytes,
                fused.get(name),
            )
        )
    return Description(found.name, size, tuple(layers))


def _torch_layers(variant: Variant, classes: int) -> list[tuple[str, nn.Module]]:
    """The network in modules of torch.nn, one entry for each row of the table."""
    layers: list[tuple[str, nn.Module]] = []
    channels = variant.in_channels
    for number, conv in enumerate(variant.convs, 1):
        relu = nn.ReLU(inplace=True)
        pad = [nn.ZeroPad2d((0, variant.pad_end, 0, variant.pad_end))] if number == 1 and variant.pad_end else []
        convolution = nn.Conv2d(
            channels, conv.channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups
        )
        after: list[tuple[str, nn.Module]] = []
        if conv.lrn:
            after.append((f"norm{number}", TorchNorm(*conv.lrn)))
        elif isinstance(conv.norm, BatchNorm):
            after.append((f"norm{number}", nn.BatchNorm2d(conv.channels, *conv.norm, affine=False)))
        if conv.pool:
            after.append((f"pool{number}", nn.MaxPool2d(conv.pool, conv.pool_stride)))
        if variant.pool_first:
            after.reverse()
        if variant.relu == "last" and after:
            name, last = after[-1]
            after[-1] = (name, nn.Sequential(last, relu))
            layers.append((f"conv{number}", nn.Sequential(*pad, convolution)))
        else:
            layers.append((f"conv{number}", nn.Sequential(*pad, convolution, relu)))
        layers += after
        channels = conv.channels
    inputs, (first, second) = channels * variant.features_size**2, variant.hidden
    drop = nn.Dropout(0.5)
    before, behind = ([drop], []) if variant.dropout_first else ([], [drop])
    flat = [nn.AdaptiveAvgPool2d(variant.features_size), nn.Flatten()]
    layers.append(("fc6", nn.Sequential(*flat, *before, nn.Linear(inputs, first), nn.ReLU(inplace=True), *behind)))
    layers.append(("fc7", nn.Sequential(*before, nn.Linear(first, second), nn.ReLU(inplace=True), *behind)))
    layers.append(("fc8", nn.Linear(second, classes)))
    return layers


class TorchNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm, inside each of `groups` parts of the channels."""

    def __init__(self, size: int, alpha: float, beta: float, k: float, groups: int) -> None:
        super().__init__(size, alpha, beta, k)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        n, c, h, w = input.shape
        return super().forward(input.view(n * self.groups, c // self.groups, h, w)).view(n, c, h, w)


def _fused_stages(variant: Variant, classes: int) -> list[tuple[str, nn.Module]]:
    """This package's model, cut before each convolution and fully connected layer."""
    model = AlexNet(classes, variant=variant).to(memory_format=torch.channels_last)
    starts = [i for i, module in enumerate(model.features) if isinstance(module, nn.Conv2d)]
    starts[0] = 0  # with the padding in front of it
    ends = [*starts[1:], len(model.features)]
    stages: list[tuple[str, nn.Module]] = [
        (f"conv{number}", model.features[start:end])
        for number, (start, end) in enumerate(zip(starts, ends, strict=True), 1)
    ]
    classifier = model.classifier
    stages.append(("fc6", nn.Sequential(model.avgpool, nn.Flatten(), *classifier[:3])))
    return [*stages, ("fc7", classifier[3:6]), ("fc8", classifier[6])]


def _kept(stages: Sequence[tuple[str, nn.Module]], size: tuple[int, int, int]) -> tuple[dict[str, int], list[Tensor]]:
    """The bytes that autograd keeps for each stage, in training, and the stages' outputs.

    A tensor counts once, for the stage that made it, or else for the one that kept it; parameters, running statistics
    and the picture do not count.
    """
    picture = x = torch.randn(1, *size)
    kept: dict[int, tuple[str, int]] = {}
    own = [tensor for _, stage in stages for tensor in (*stage.parameters(), *stage.buffers())]
    ignored = {_storage(tensor) for tensor in own} | {_storage(picture)}
    makers: dict[int, str] = {}
    alive, outputs = [picture], []

    def keeper(name: str) -> Callable[[Tensor], Tensor]:
        def keep(tensor: Tensor) -> Tensor:
            alive.append(tensor)  # tensors are told apart by their addresses, which must not be used again
            kept.setdefault(_storage(tensor), (name, tensor.untyped_storage().nbytes()))
            return tensor

        return keep

    for name, stage in stages:
        with torch.autograd.graph.saved_tensors_hooks(keeper(name), lambda tensor: tensor):
            x = stage.train()(x)
        makers.setdefault(_storage(x), name)
        outputs.append(x)
    bytes_of = dict.fromkeys((name for name, _ in stages), 0)
    for storage, (keeper_name, size_in_bytes) in kept.items():
        if storage not in ignored:
            bytes_of[makers.get(storage, keeper_name)] += size_in_bytes
    return bytes_of, outputs


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
