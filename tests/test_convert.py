"""`fastalex convert`, and the other commands with Caffe's files."""

import sys

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("torchvision")

from caffe_files import layers_of, net
from failing import error_of
from PIL import Image
from small_models import narrow_twins

import fastalex
from fastalex import cli
from fastalex.foreign import caffe


@pytest.fixture
def files(monkeypatch, tmp_path):
    """caffenet.caffemodel of 1,000 classes, seven.caffemodel of seven, and a picture, in the working directory."""
    variant = narrow_twins(monkeypatch)["caffenet"]
    for name, classes in (("caffenet", 1000), ("seven", 7)):
        state = fastalex.AlexNet(classes, variant="caffenet").state_dict()
        (tmp_path / f"{name}.caffemodel").write_bytes(net(layers_of(variant, state), old=True, legacy=True))
    Image.effect_noise((300, 260), 60).convert("RGB").save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_converted_file_is_the_same_model(files, capsys):
    cli.main(["convert", "caffenet.caffemodel", "new/caffenet.safetensors"])
    assert "variant caffenet" in capsys.readouterr().out
    one, other = fastalex.alexnet("caffenet.caffemodel"), fastalex.alexnet("new/caffenet.safetensors")
    assert other.variant.name == "caffenet"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    shown = []
    for weights in ("caffenet.caffemodel", "new/caffenet.safetensors"):
        cli.main(["predict", "cat.png", "--weights", weights, "--device", "cpu"])
        shown.append(capsys.readouterr().out.replace(weights, "WEIGHTS"))
    assert "the 5 likeliest" in shown[0]
    assert shown[0] == shown[1]


def test_names_of_other_classes(files, capsys):
    assert "has 7 classes and no names" in error_of(capsys, "convert", "seven.caffemodel", "seven.safetensors")
    (files / "names.txt").write_text("".join(f"bird {i}\n" for i in range(7)))
    cli.main(["convert", "seven.caffemodel", "seven.safetensors", "--names", "names.txt"])
    assert fastalex.AlexNet.from_file(files / "seven.safetensors").card.classes[6] == "bird 6"
    (files / "names.txt").write_text("one\ntwo\n")
    message = error_of(capsys, "convert", "seven.caffemodel", "x.safetensors", "--names", "names.txt")
    assert "has 7 classes, 2 names were given" in message


def test_nothing_is_lost(files, capsys):
    (files / "kept.safetensors").write_bytes(b"precious")
    message = error_of(capsys, "convert", "caffenet.caffemodel", "kept.safetensors")
    assert "kept.safetensors exists: --overwrite replaces it" in message
    whole = (files / "caffenet.caffemodel").read_bytes()
    (files / "cut.caffemodel").write_bytes(whole[: len(whole) // 2])
    message = error_of(capsys, "convert", "cut.caffemodel", "kept.safetensors", "--overwrite")
    assert "cut.caffemodel is damaged" in message
    assert "called .safetensors, got x.pth" in error_of(capsys, "convert", "caffenet.caffemodel", "x.pth")
    assert "nowhere.caffemodel" in error_of(capsys, "convert", "nowhere.caffemodel", "x.safetensors")
    assert (files / "kept.safetensors").read_bytes() == b"precious"
    assert not list(files.glob("*.partial")) + list(files.glob(".*.partial"))
    cli.main(["convert", "caffenet.caffemodel", "kept.safetensors", "--overwrite"])
    assert fastalex.alexnet("kept.safetensors").num_classes == 1000


def test_eval_takes_caffes_files(files, capsys):
    for name in ("a", "b"):
        (files / "pictures/val" / name).mkdir(parents=True)
        Image.effect_noise((300, 260), 60).convert("RGB").save(files / "pictures/val" / name / "0.png")
    arguments = ["--data", "pictures", "--workers", "0", "--device", "cpu"]
    assert "the model knows 1,000 classes" in error_of(capsys, "eval", "--weights", "caffenet.caffemodel", *arguments)
    (files / "names.txt").write_text("a\nb\n")
    (files / "two.caffemodel").write_bytes(
        net(layers_of(fastalex.variants.VARIANTS["caffenet"], fastalex.AlexNet(2, variant="caffenet").state_dict()))
    )
    cli.main(["convert", "two.caffemodel", "two.safetensors", "--names", "names.txt"])
    cli.main(["eval", "--weights", "two.safetensors", *arguments])
    assert "top" in capsys.readouterr().out.lower()


def test_a_missing_package_is_one_line(files, capsys, monkeypatch):
    caffe.message.cache_clear()
    for name in ("google.protobuf", "google.protobuf.message"):
        monkeypatch.setitem(sys.modules, name, None)
    message = error_of(capsys, "convert", "caffenet.caffemodel", "x.safetensors")
    assert message.endswith("pip install 'fastalex[caffe]'\n")
