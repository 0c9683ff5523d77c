"""Neighbours against brute force, and when the index is made anew."""

import os

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("safetensors")

from PIL import Image

from fastalex import AlexNet
from fastalex.checkpoint import ModelCard
from fastalex.data.image_sets import FashionMNIST
from fastalex.data.pack import pack
from fastalex.data.preprocessing import Preprocessing
from fastalex.training.recipes import demo_variant
from fastalex.visualize import similar

LOOKS = Preprocessing.for_photos(3, 64)


def model_and_card(channels=3):
    torch.manual_seed(3)
    variant = demo_variant(channels)
    looks = LOOKS if channels == 3 else FashionMNIST.preprocessing_for(1, 64)
    return AlexNet(4, variant=variant).eval(), ModelCard(variant, ("a", "b", "c", "d"), looks)


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of noise, one of them twice, in two folders."""
    root = tmp_path / "pictures"
    for number in range(10):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((90, 80), 20 + 20 * number).convert("RGB").save(path)
    (root / "a" / "copy of 3.png").write_bytes((root / "b" / "3.png").read_bytes())
    return root


def build(path, folder, model, card):
    said = []
    index = similar.build(path, model, card, similar.open_collection(folder, card.preprocessing), said.append)
    return index, said


def test_nearest_is_brute_force():
    features, queries = torch.randn(50, 7), torch.randn(3, 7)
    queries[1] = features[20]
    distances, rows = similar.nearest(features, queries, 4)
    expected = (queries.double()[:, None] - features.double()).square().sum(2).sqrt()
    assert rows.tolist() == expected.argsort(1)[:, :4].tolist()
    torch.testing.assert_close(distances.double(), expected.sort(1).values[:, :4], rtol=1e-5, atol=1e-6)
    assert distances[1, 0] == 0
    assert rows[1, 0] == 20


@pytest.mark.parametrize("count", [0, 6])
def test_more_neighbours_than_rows(count):
    with pytest.raises(ValueError, match=rf"count must lie in \[1, 5\], got {count}"):
        similar.nearest(torch.randn(5, 2), torch.randn(1, 2), count)


def test_a_copy_is_found_at_distance_0_and_the_picture_itself_is_not(folder, tmp_path):
    model, card = model_and_card()
    index, _ = build(tmp_path / "index.safetensors", folder, model, card)
    assert index.features.shape == (11, model.variant.hidden[1])
    collection = similar.open_collection(folder, card.preprocessing)
    (sheet,) = similar.find_similar(model, card, collection, index, [folder / "b" / "3.png"], 3)
    assert sheet.matches[0].name == os.path.join("a", "copy of 3.png")
    assert sheet.matches[0].distance == pytest.approx(0, abs=1e-4)
    assert os.path.join("b", "3.png") not in [match.name for match in sheet.matches]
    lengths = [match.distance for match in sheet.matches]
    assert len(lengths) == 3
    assert lengths == sorted(lengths)


def test_queries_out_of_the_collection(folder, tmp_path):
    model, card = model_and_card()
    index, _ = build(tmp_path / "index.safetensors", folder, model, card)
    collection = similar.open_collection(folder, card.preprocessing)
    sheets = similar.find_similar(model, card, collection, index, [], 20)
    assert len(sheets) == 6
    assert len({sheet.name for sheet in sheets}) == 6
    for sheet in sheets:
        assert len(sheet.matches) == 10
        assert sheet.name not in [match.name for match in sheet.matches]


def test_the_index_is_used_again_and_only_changes_are_computed(folder, tmp_path):
    model, card = model_and_card()
    file = tmp_path / "new" / "index.safetensors"
    first, _ = build(file, folder, model, card)
    assert first.computed == 11
    written = file.stat().st_mtime_ns
    again, _ = build(file, folder, model, card)
    assert again.computed == 0
    assert file.stat().st_mtime_ns == written
    assert torch.equal(again.features, first.features)

    (folder / "a" / "0.png").unlink()
    Image.new("RGB", (70, 99), "red").save(folder / "b" / "1.png")
    Image.new("RGB", (70, 70), "blue").save(folder / "b" / "new.png")
    changed, _ = build(file, folder, model, card)
    assert changed.computed == 2
    fresh, _ = build(tmp_path / "other.safetensors", folder, model, card)
    torch.testing.assert_close(changed.features, fresh.features, rtol=1e-4, atol=1e-5)


def test_other_weights_or_preprocessing_make_a_new_index(folder, tmp_path):
    model, card = model_and_card()
    file = tmp_path / "index.safetensors"
    build(file, folder, model, card)
    larger = ModelCard(card.variant, card.classes, Preprocessing.for_photos(3, 72))
    assert build(file, folder, model, larger)[0].computed == 11
    with torch.no_grad():
        model.classifier[4].bias[0] += 1
    assert build(file, folder, model, larger)[0].computed == 11


@pytest.mark.parametrize("content", [b"", b"not an index", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_index_is_made_anew(content, folder, tmp_path):
    model, card = model_and_card()
    file = tmp_path / "index.safetensors"
    file.write_bytes(content)
    assert build(file, folder, model, card)[0].computed == 11


def test_unreadable_pictures_are_named_and_left_out(folder, tmp_path):
    model, card = model_and_card()
    (folder / "a" / "broken.png").write_bytes(b"no picture")
    index, said = build(tmp_path / "index.safetensors", folder, model, card)
    assert len(index.places) == 11
    assert any("broken.png is not an image" in line for line in said)
    again, _ = build(tmp_path / "index.safetensors", folder, model, card)
    assert again.computed == 0


def test_a_packed_set(folder, tmp_path):
    pack(folder, tmp_path / "packed", size=80, workers=1)
    model, card = model_and_card()
    collection = similar.open_collection(tmp_path / "packed", card.preprocessing)
    index, _ = build(tmp_path / "index.safetensors", tmp_path / "packed", model, card)
    assert index.computed == len(collection.names) == 11
    assert build(tmp_path / "index.safetensors", tmp_path / "packed", model, card)[0].computed == 0
    sheets = similar.find_similar(model, card, collection, index, [], 2)
    twins = {sheet.name.rpartition("/")[2]: sheet.matches[0] for sheet in sheets}
    found = [twins[name] for name in ("3.png", "copy of 3.png") if name in twins]
    assert all(match.distance == pytest.approx(0, abs=1e-4) for match in found)


def test_the_sample_that_ships_with_the_package():
    collection = similar.open_collection(None, FashionMNIST.preprocessing_for(1, 64))
    assert len(collection.names) == len(set(collection.names)) == len(collection.stamps) == 1000
    shoe, shirt = collection.pictures([999, 0])
    assert collection.names[999].startswith("Ankle boot")
    assert shoe.shape == (1, 68, 68)
    assert not torch.equal(shoe, shirt)


def test_folders_without_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        similar.open_collection(tmp_path / "nowhere", LOOKS)
    with pytest.raises(ValueError, match="no pictures in"):
        similar.open_collection(tmp_path, LOOKS)
