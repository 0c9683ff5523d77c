"""The package `lpips` beside ours, both with the same random weights: nothing is downloaded."""

import types

import pytest
import torch
from torch import nn

import fastalex

lpips = pytest.importorskip("lpips")


def random_network(build):
    """torchvision's convolutions, with weights that keep the size of activations, without its slow linear layers."""

    def make(pretrained=False):
        with torch.device("meta"):
            features = build().features
        features = features.to_empty(device="cpu")
        for module in features.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias, 0.0, 0.1)
        return types.SimpleNamespace(features=features)

    return make


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    networks = lpips.pretrained_networks.tv
    stand_in = types.SimpleNamespace(
        **{name: random_network(getattr(networks, name)) for name in ("alexnet", "vgg16", "squeezenet1_1")}
    )
    monkeypatch.setattr(lpips.pretrained_networks, "tv", stand_in)


@pytest.fixture
def both():
    """A function: (the package's loss, ours) with these arguments and the same weights."""

    def make(net, **options):
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False, **options)
        ours = fastalex.LPIPS(net=net, pnet_rand=True, **options)
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    return make
