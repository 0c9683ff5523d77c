"""Folders of pictures: damaged ones are named or left out, whatever reads them, and nothing is left running."""

import multiprocessing
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trees import encoded, picture, write

from fastalex.data import image_sets, sources
from fastalex.data.choose import open_images, training_pictures
from fastalex.data.decode import decode
from fastalex.data.image_sets import Folders, list_pictures
from fastalex.data.pack import pack
from fastalex.data.packed import PackedSet
from fastalex.data.preprocessing import Preprocessing, centre_crop
from fastalex.evaluation.classifier import read_picture

LOOKS = Preprocessing(3, 24, 20, (0.5,) * 3, (0.5,) * 3)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb():
    """A PNG that says it has 40,000 x 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


WHOLE = encoded(picture(1))
DAMAGED = {
    "page": (b"<html>404 not found</html>", "no picture in a format"),
    "empty": (b"", "no picture in a format"),
    "cut": (WHOLE[: len(WHOLE) // 2], "[Tt]runcated"),
    "bomb": (bomb(), "refused, more than"),
}


@pytest.fixture
def tree(tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            for i in range(3):
                write(tmp_path / "set" / split / name / f"{i}.jpg", encoded(picture(10 * number + i)))
    return tmp_path / "set"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_picture_is_named(content, reason, workers, tree):
    write(tree / "train/cat/bad.jpg", content)
    images = Folders(tree, LOOKS, workers=workers)
    with pytest.raises(ValueError, match=reason) as caught:
        list(images.batches("train", [torch.arange(2), torch.arange(images.count("train"))]))
    assert str(tree / "train/cat/bad.jpg") in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("kept", [0, 2**28])
def test_few_pictures_are_read_once(kept, tree, monkeypatch):
    monkeypatch.setattr(image_sets, "KEPT", kept)
    images = Folders(tree, LOOKS, workers=0)
    order = [torch.tensor([5, 0, 3]), torch.tensor([1])]
    first = list(images.batches("train", order))
    expected = torch.stack([read_picture(Path(images._splits["train"].samples[i][0]), LOOKS) for i in (5, 0, 3)])
    assert (first[0][0].int() - centre_crop(expected, 24).int()).abs().max() <= 1
    assert first[0][1].tolist() == [1, 0, 1]
    for path in (tree / "train").rglob("*.jpg"):
        path.unlink()
    if kept:
        for (a, labels), (b, others) in zip(first, images.batches("train", order), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(labels, others)
    else:
        with pytest.raises(ValueError, match="No such file"):
            list(images.batches("train", order))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_left_out(workers, tree):
    whole = Folders(tree, LOOKS, workers=workers)
    for name, (content, _) in DAMAGED.items():
        write(tree / f"train/cat/{name}.jpg", content)
    images = Folders(tree, LOOKS, workers=workers, on_error="skip")
    assert sorted(item.path for item in images.unreadable) == sorted(str(tree / f"train/cat/{n}.jpg") for n in DAMAGED)
    assert images.count("train") == whole.count("train") == 6
    for (a, labels), (b, others) in zip(
        images.batches("train", [torch.arange(6)]), whole.batches("train", [torch.arange(6)]), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(labels, others)


def test_nothing_left(tree):
    for path in (tree / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the pictures in .*val can be read"):
        Folders(tree, LOOKS, workers=0, on_error="skip")


def test_workers_end_with_their_reader(tree, monkeypatch):
    monkeypatch.setattr(image_sets, "KEPT", 0)
    batches = Folders(tree, LOOKS, workers=2).batches("train", [torch.arange(2)] * 3)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_command_ends(command, tree, tmp_path):
    from fastalex.alexnet import AlexNet
    from fastalex.checkpoint import ModelCard, save_model
    from fastalex.training.recipes import demo_variant

    write(tree / "train/cat/bad.jpg", b"<html>404 not found</html>")
    write(tree / "val/cat/bad.jpg", b"<html>404 not found</html>")
    arguments = ["--variant", "demo", "--epochs", "1", "--out", str(tmp_path / "run")]
    if command == "eval":
        variant = demo_variant(channels=3)
        card = ModelCard(variant, ("cat", "dog"), Preprocessing.for_photos(3, variant.crop))
        save_model(tmp_path / "model.safetensors", AlexNet.from_card(card), card)
        arguments = ["--weights", str(tmp_path / "model.safetensors")]
    begin = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fastalex",
            command,
            "--data",
            str(tree),
            "--workers",
            "2",
            "--batch-size",
            "2",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - begin < 90
    errors = [line for line in done.stderr.splitlines() if "fastalex: error" in line]
    assert len(errors) == 1
    assert "cat/bad.jpg" in errors[0]
    assert "Traceback" not in done.stdout + done.stderr


def test_classes_alone_are_split(tmp_path):
    """A fifth of each class, one at least of two; the same elsewhere; a picture more moves few."""
    counts = {"cat": 24, "dog": 10, "emu": 2, "fox": 1}
    for name, count in counts.items():
        for i in range(count):
            write(tmp_path / "a" / name / f"{i}.jpg", b"")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def chosen(root):
        images = list_pictures(tmp_path / root, ("train", "test"))
        assert images.split_here
        assert images.classes == tuple(counts)
        names = {}
        for split, samples in images.samples.items():
            names[split] = {Path(path).relative_to(tmp_path / root) for path, _ in samples}
            assert all(images.classes[label] == Path(path).parent.name for path, label in samples)
        assert not names["train"] & names["test"]
        return names

    first = chosen("a")
    held = [path.parts[0] for path in first["test"]]
    assert {name: held.count(name) for name in counts} == {"cat": 5, "dog": 2, "emu": 1, "fox": 0}
    assert len(first["train"]) == sum(counts.values()) - 8
    assert chosen("b") == first
    write(tmp_path / "b/dog/new.jpg", b"")
    assert len(chosen("b")["test"] - first["test"]) <= 1
    assert chosen("b")["test"] >= {path for path in first["test"] if path.parts[0] != "dog"}
    (tmp_path / "c/cat").mkdir(parents=True)
    write(tmp_path / "c/cat/0.jpg", b"")
    with pytest.raises(ValueError, match="no class with two pictures"):
        list_pictures(tmp_path / "c", ("train",))
    (tmp_path / "a/val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*a/train: .* or all in .*a/CLASS/"):
        list_pictures(tmp_path / "a", ("train",))


def test_what_is_held_out_is_said(tree, tmp_path):
    said = []
    open_images(tree / "train", LOOKS, splits=("train", "test"), workers=0, report=said.append)
    held = "2 pictures, a fifth of each class, are held out for testing"
    assert said == [f"{tree / 'train'} has no train/ and val/: {held}"]
    assert training_pictures(tree / "train") == (4, 2)
    assert training_pictures(tree) == (6, 2)


def test_no_workers_anywhere(tree, tmp_path):
    pack(tree, tmp_path / "packed", size=24, workers=0)
    images = PackedSet(tmp_path / "packed", LOOKS, threads=0)
    assert [len(labels) for _, labels in images.batches("train", [torch.arange(4), torch.arange(2)])] == [4, 2]
    for make in (lambda: PackedSet(tmp_path / "packed", LOOKS, threads=-1), lambda: Folders(tree, LOOKS, workers=-1)):
        with pytest.raises(ValueError, match="must be at least 0, got -1"):
            make()


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_pictures_are_the_same_to_all(channels, tmp_path):
    path = tmp_path / "train/a/ramp.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)).save(path)
    looks = Preprocessing(channels, 24, 20, (0.5,) * channels, (0.5,) * channels)
    expected = torch.from_numpy(decode(path.read_bytes(), 24)).permute(2, 0, 1)[:channels]
    assert (expected == 255).float().mean() < 0.05
    # grey of RGB may round to the other side
    assert (read_picture(path, looks).int() - expected.int()).abs().max() <= (channels == 1)
    ((pictures, _),) = Folders(tmp_path, looks, splits=("train",), workers=0).batches("train", [torch.arange(1)])
    assert (pictures[0].int() - expected.int()).abs().max() <= (channels == 1)


def test_pictures_are_upright_to_all(tmp_path):
    image = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "train/a/lying.jpg"
    path.parent.mkdir(parents=True)
    image.save(path, exif=exif)
    ((pictures, _),) = Folders(tmp_path, LOOKS, splits=("train",), workers=0).batches("train", [torch.arange(1)])
    assert (pictures[0].float() - torch.from_numpy(decode(path.read_bytes(), 24)).permute(2, 0, 1)).abs().max() <= 1


def test_lists_with_a_byte_order_mark(tmp_path):
    write(tmp_path / "train/n01/a.png", encoded(picture(1), "PNG"))
    write(tmp_path / "val/b.png", encoded(picture(1), "PNG"))
    for name, text in (("val.txt", "b.png n01\n"), ("synset_words.txt", "n01 tench\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    found = sources.find(tmp_path)
    assert found.names == ("tench",)
    assert [item.label for item in found.splits["test"]] == [0]
