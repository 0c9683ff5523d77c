"""Layers by name, and what a hook on them sees, against the same network run module by module."""

from dataclasses import replace

import pytest
import torch

from fastalex import AlexNet
from fastalex.variants import VARIANTS
from fastalex.visualize.activations import activations, hidden_features, layer_names

NORMALISED = ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8"]
NAMES = {
    "paper": NORMALISED,
    "bvlc_alexnet": NORMALISED,
    "torchvision": NORMALISED,
    "caffenet": ["conv1", "pool1", "norm1", "conv2", "pool2", "norm2", *NORMALISED[4:]],
    "bn": ["conv1", "pool1", "norm1", "conv2", "pool2", "norm2", "conv3", "norm3", "conv4", "norm4", *NORMALISED[6:]],
    "code2012": ["conv1", "pool1", "relu1", "conv2", "pool2", "relu2", *NORMALISED[4:8], "relu5", *NORMALISED[8:]],
}


def narrow(name):
    variant = VARIANTS[name]
    convs = tuple(replace(conv, channels=conv.channels // 8) for conv in variant.convs)
    return AlexNet(5, variant=replace(variant, convs=convs, hidden=(48, 32), init="torch")).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_names(name):
    model = narrow(name)
    names = layer_names(model)
    assert list(names) == NAMES[name]
    modules = dict(model.named_modules())
    assert [modules[names[f"fc{i}"]].out_features for i in (6, 7, 8)] == [48, 32, 5]


@pytest.mark.parametrize("name", ["paper", "code2012"])
def test_a_layer_sees_what_the_modules_before_it_compute(name):
    model = narrow(name)
    x = torch.randn(2, 3, 224, 224)
    expected = x
    by_path = {path: layer for layer, path in layer_names(model).items()}
    with torch.no_grad():
        for position, module in enumerate(model.features):
            expected = module(expected)
            if layer := by_path.get(f"features.{position}"):
                torch.testing.assert_close(activations(model, x, layer), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(activations(model, x, "fc8"), model(x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(hidden_features(model, x), activations(model, x, "fc7"), rtol=1e-4, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_conv1_of_the_paper_and_of_torchvision():
    for name, shape in (("paper", (1, 12, 55, 55)), ("torchvision", (1, 8, 55, 55))):
        maps = activations(narrow(name), torch.randn(1, 3, 224, 224), "conv1")
        assert maps.shape == shape
        assert maps.amin() == 0


def test_a_path_of_a_module_is_a_name_too():
    model = narrow("paper")
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(activations(model, x, "features.0"), activations(model, x, "conv1"))


@pytest.mark.parametrize("layer", ["conv9", "features.99", ""])
def test_unknown_layer(layer):
    with pytest.raises(ValueError, match=r"layer must be one of conv1, pool1, .* or a module's path"):
        activations(narrow("paper"), torch.randn(1, 3, 224, 224), layer)
