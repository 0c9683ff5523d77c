"""README.md: its programs and commands run, on narrow networks; what installs is checked word by word."""

import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("skimage")
pytest.importorskip("google.protobuf")
pytest.importorskip("torchvision")

import photographs
from caffe_files import layers_of, net
from PIL import Image
from small_models import narrow_twins
from torchvision import models

import fastalex
from fastalex import cli
from fastalex.weights import TORCHVISION_WEIGHTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [line.partition("#")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
OURS = [line for line in COMMANDS if line.startswith("fastalex ")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the files that the page names, narrow networks, and random weights in the place of downloads."""
    variants = narrow_twins(monkeypatch)
    published = fastalex.AlexNet(1000, variant="torchvision").state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: published)
    monkeypatch.setattr(models, "alexnet", lambda weights, build=models.alexnet: build())
    state = fastalex.AlexNet(variant="bvlc_alexnet").state_dict()
    (tmp_path / "bvlc_alexnet.caffemodel").write_bytes(net(layers_of(variants["bvlc_alexnet"], state)))
    photographs.folder_of(tmp_path / "photos", per_class=3)
    Image.effect_noise((300, 260), 60).convert("RGB").save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)


def test_the_page_is_read_whole():
    assert {kind for kind, _ in BLOCKS} == {"python", "sh"}
    assert PAGE.count("```") == 2 * len(BLOCKS)
    assert len(PROGRAMS) == 4
    assert len(OURS) == 5


def test_what_installs():
    """The commands in front, as they stand; the address is the package's own."""
    package = (ROOT / "pyproject.toml").read_text()
    address = re.search(r'^Repository = "(.+)"$', package, re.MULTILINE)[1]
    install = "pip install '.[cli,cpu]'"
    assert [line for line in COMMANDS if line not in OURS] == [
        *(f"git clone {address}", "cd fastalex", "python3 -m venv .venv && . .venv/bin/activate", install)
    ]
    assert f"`pip install 'fastalex[cli,cpu] @ git+{address}'`" in PAGE
    assert re.findall(r"^(cli|cpu) = ", package, re.MULTILINE) == ["cli", "cpu"]


def test_programs(here, capsys):
    names = {}
    for text in PROGRAMS[:2]:
        exec(text, names)
    assert names["loss"].item() > 0
    assert names["model"].variant.name == "bvlc_alexnet"
    assert "conv2d_relu_pool: " in capsys.readouterr().out


def test_the_program_of_lpips(monkeypatch):
    """On smaller pictures."""
    state = fastalex.LPIPS(pnet_rand=True).net.state_dict()
    state = {"features." + name.partition(".")[2]: value for name, value in state.items()}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: state)
    names = {}
    exec(PROGRAMS[2].replace("256, 256", "64, 64"), names)
    assert names["loss"](names["ours"], names["theirs"], normalize=True).shape == (4, 1, 1, 1)


@pytest.mark.slow
def test_the_program_of_another_model(here, capsys):
    exec(PROGRAMS[3], {})
    assert "replaced (7):" in capsys.readouterr().out


def test_commands(here, capsys):
    """In their order, one epoch each."""
    for command in OURS:
        _, name, *arguments = shlex.split(command)
        if name == "train":
            arguments += ["--epochs", "1", "--workers", "0"]
        if name in ("train", "predict"):
            arguments += ["--device", "cpu"]
        cli.main([name, *arguments])
    assert "the 5 likeliest" in capsys.readouterr().out
    for written in ("bvlc_alexnet.safetensors", "runs/photos/model.safetensors", "runs/tuned/model.safetensors"):
        assert Path(written).exists()
    assert next(iter(TORCHVISION_WEIGHTS)) in PAGE
