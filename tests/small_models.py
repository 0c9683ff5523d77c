"""Networks like AlexNet, fast enough for every test."""

import torch
from torch import nn

from fastalex.variants import VARIANTS, Conv, Variant


def narrow(name: str, divisor: int = 8) -> Variant:
    """The variant with a fraction of the channels: the same wiring, fast enough for every test."""
    variant = VARIANTS[name]
    convs = tuple(Conv(**{**vars(c), "channels": c.channels // divisor}) for c in variant.convs)
    return Variant(**{**vars(variant), "name": f"narrow {name}", "convs": convs, "hidden": (64, 48)})


def narrow_twins(monkeypatch, divisor: int = 8) -> dict[str, Variant]:
    """Narrow twins in the place of the variants, so that files of weights stay small."""
    twins = {name: Variant(**{**vars(narrow(name, divisor)), "name": name}) for name in VARIANTS}
    for name, twin in twins.items():
        monkeypatch.setitem(VARIANTS, name, twin)
    return twins


class Plain(nn.Module):
    """torchvision's AlexNet in modules of torch.nn, an eighth as wide."""

    def __init__(self):
        super().__init__()
        channels, modules = 3, []
        for conv in narrow("torchvision").convs:
            modules += [nn.Conv2d(channels, conv.channels, conv.kernel_size, conv.stride, conv.padding), nn.ReLU()]
            modules += [nn.MaxPool2d(3, 2)] if conv.pool else []
            channels = conv.channels
        self.features = nn.Sequential(*modules)
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        hidden = [nn.Dropout(), nn.Linear(channels * 36, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 48), nn.ReLU()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(48, 4))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
