"""The layer table against numbers known from elsewhere, and its twin of torch.nn modules against the model."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastalex import AlexNet
from fastalex.describe import _torch_layers, describe
from fastalex.variants import VARIANTS
from fastalex.words import counted


@pytest.fixture(scope="module")
def paper():
    return describe("paper")


def narrow(variant):
    """A quarter of the channels and 64 hidden units, so that a test takes milliseconds."""
    convs = tuple(replace(conv, channels=conv.channels // 4) for conv in variant.convs)
    return replace(variant, convs=convs, hidden=(64, 64))


def test_known_totals(paper):
    assert paper.total("parameters") == 60_965_224
    assert paper.total("neurons") == 659_272  # "650,000 neurons" in the abstract
    assert paper.share("parameters", "fc6") == (6 * 6 * 256 + 1) * 4096 / 60_965_224
    assert [layer.name for layer in paper.layers if layer.neurons] == (
        ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    )
    assert paper.layers[0].shape == (96, 55, 55)
    assert paper.layers[-1].shape == (1000,)


def test_agrees_with_torchvision_and_torchs_flop_counter():
    models = pytest.importorskip("torchvision").models
    from torch.utils.flop_counter import FlopCounterMode

    found = describe("torchvision", classes=17)
    with torch.device("meta"):
        model = models.alexnet(num_classes=17).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert found.total("flops") == counter.get_total_flops()
    assert found.total("parameters") == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_twin_of_torch_modules_is_the_same_network(name):
    variant = narrow(VARIANTS[name])
    model = AlexNet(5, variant=replace(variant, init="torch")).eval()
    twin = nn.Sequential(*(module for _, module in _torch_layers(variant, 5))).eval()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        theirs.data.copy_(ours)
    x = torch.randn(2, 3, variant.crop, variant.crop)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_kept_for_backward(name):
    """What each stage keeps at least: its output where something needs it, one byte a pooling window."""
    variant = narrow(VARIANTS[name])
    found = {layer.name: layer for layer in describe(variant, classes=5).layers}
    plain = found["conv3"]
    assert plain.eager_bytes == 4 * plain.neurons
    # batch normalisation keeps its input, its output for the next layer, and two numbers a channel
    normed = 4 * plain.neurons + 2 * 4 * plain.shape[0] if "norm3" in found else 0
    assert plain.fused_bytes == plain.eager_bytes + normed
    codes = torch.Size(found["pool5"].shape).numel()
    pooled = 0 if variant.relu == "first" else 4 * codes  # the ReLU behind the pooling needs its output
    assert found["conv5"].fused_bytes == codes + pooled
    # an index of eight bytes for each window, and its value for the next layer
    assert found["pool5"].eager_bytes == 12 * codes
    assert found["fc8"].eager_bytes == found["fc8"].fused_bytes == 0
    assert found["pool1"].fused_bytes is None


def test_lrn_stages_keep_a_quarter(paper):
    stages = paper.stages()
    assert list(stages)[:2] == ["conv1", "conv2"]
    for name in ("conv1", "conv2"):
        eager = sum(layer.eager_bytes for layer in stages[name])
        fused = sum(layer.fused_bytes or 0 for layer in stages[name])
        assert fused < 0.25 * eager


def test_json_holds_everything(paper):
    found = json.loads(json.dumps(paper.to_dict()))
    assert found["totals"]["parameters"] == sum(layer["parameters"] for layer in found["layers"])
    assert found["input"] == [3, 224, 224]
    assert len(found["layers"]) == 13


@pytest.mark.parametrize(("arguments", "message"), [(("vgg",), "variant must be one of"), (("paper", 0), "got 0")])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        describe(*arguments)


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [(1, ("picture",), "1 picture"), (0, ("picture",), "0 pictures"), (1234, ("class", "classes"), "1,234 classes")],
)
def test_counted(number, words, expected):
    assert counted(number, *words) == expected
