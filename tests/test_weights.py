"""Weights in: the files and names that `alexnet` takes, and what it says of those that do not fit."""

from dataclasses import replace

import pytest
import torch
from small_models import narrow, narrow_twins
from torch import nn

import fastalex
from fastalex.alexnet import fitting_variants
from fastalex.data.preprocessing import Preprocessing
from fastalex.variants import VARIANTS
from fastalex.weights import alexnet, load_weights


@pytest.fixture
def small(monkeypatch):
    return narrow_twins(monkeypatch)


def test_pth_round_trip(small, tmp_path):
    model = fastalex.AlexNet(7, variant="torchvision")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = alexnet(tmp_path / "weights.pth")
    assert loaded.variant.name == "torchvision"
    assert loaded.num_classes == 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_safetensors_round_trip_with_its_variant(small, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = fastalex.AlexNet(7, variant="bvlc_alexnet")
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.save_file(state, tmp_path / "weights.safetensors", {"variant": "bvlc_alexnet"})
    assert alexnet(tmp_path / "weights.safetensors").variant.name == "bvlc_alexnet"
    with pytest.raises(ValueError, match='are of variant "bvlc_alexnet", not "paper"'):
        alexnet(tmp_path / "weights.safetensors", variant="paper")


def test_a_variant_of_ones_own(tmp_path):
    """Listed nowhere: the file describes it, or only names it, and then the caller must bring it."""
    safetensors = pytest.importorskip("safetensors.torch")
    card = pytest.importorskip("fastalex.checkpoint").ModelCard
    own = replace(narrow("paper"), name="own")
    model = fastalex.AlexNet(3, variant=own)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    described = card(own, ("a", "b", "c"), Preprocessing.for_photos(3, 224)).to_json()
    safetensors.save_file(state, tmp_path / "own.safetensors", {"variant": "own", "fastalex": described})
    loaded = alexnet(tmp_path / "own.safetensors")
    assert loaded.variant == own
    assert torch.equal(loaded.classifier[6].weight, model.classifier[6].weight)
    with pytest.raises(ValueError, match='are of variant "own", not "paper"'):
        alexnet(tmp_path / "own.safetensors", variant="paper")
    safetensors.save_file(state, tmp_path / "named.safetensors", {"variant": "own"})
    with pytest.raises(ValueError, match=r'variant "own", which is none of paper, .* call alexnet\(weights, variant='):
        alexnet(tmp_path / "named.safetensors")
    assert alexnet(tmp_path / "named.safetensors", variant=own).variant == own


def test_wrong_variant_is_named(small, tmp_path):
    torch.save(fastalex.AlexNet(7, variant="torchvision").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match='fit variant "torchvision", not "paper"'):
        alexnet(tmp_path / "weights.pth", variant="paper")


def test_another_number_of_classes_makes_a_new_last_layer(small, tmp_path):
    """The other layers keep their weights; the number that the weights have keeps the last one's too."""
    for name in ("torchvision", "caffenet"):
        before = fastalex.AlexNet(7, variant=name).state_dict()
        torch.save({"state_dict": before, "variant": name}, tmp_path / "weights.pth")
        torch.manual_seed(5)
        model = alexnet(tmp_path / "weights.pth", num_classes=6, dropout=0.25)
        torch.manual_seed(5)
        fresh = fastalex.AlexNet(6, variant=name).state_dict()
        assert model.num_classes == 6
        assert model.classifier[1].p == 0.25
        for key, value in model.state_dict().items():
            assert torch.equal(value, (fresh if key.startswith("classifier.6.") else before)[key]), key
        same = alexnet(tmp_path / "weights.pth", num_classes=7).state_dict()
        assert all(torch.equal(value, before[key]) for key, value in same.items())


def test_weights_that_are_not_there():
    with pytest.raises(FileNotFoundError, match=r"IMAGENET1K_V1, DEFAULT or an existing file, got 'nowhere\.pth'"):
        alexnet("nowhere.pth")


def test_pickled_code_is_not_run(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(
        ValueError, match=r"weights_only=True: Unsupported global: GLOBAL torch\.nn\.modules\.linear\.Linear"
    ):
        alexnet(tmp_path / "model.pth")


def test_weights_of_another_network(small, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="fit no variant of AlexNet"):
        alexnet(tmp_path / "weights.pth")


def test_names_of_torchvisions_weights(monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        state = fastalex.AlexNet(variant="torchvision").state_dict()
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **kw: asked.append((url, kw)) or state)
    weights = torchvision.models.AlexNet_Weights.IMAGENET1K_V1
    for name in ("DEFAULT", "IMAGENET1K_V1", weights):
        assert load_weights(name)[1] == "torchvision"
    assert {url for url, _ in asked} == {weights.url}
    assert all(kw["weights_only"] and kw["check_hash"] for _, kw in asked)


def test_every_variant_fits_itself():
    with torch.device("meta"):
        for name in VARIANTS:
            assert name in fitting_variants(fastalex.AlexNet(12, variant=name).state_dict())
