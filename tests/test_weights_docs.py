"""docs/weights.md: its code and commands run, on narrow nets under the names of the published files."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("torchvision")
pytest.importorskip("google.protobuf")

from caffe_files import layers_of, net, zoo_file
from PIL import Image
from small_models import narrow_twins

import fastalex
from fastalex import cli, hub
from fastalex.foreign.chain import IMAGENET_MEAN
from fastalex.weights import TORCHVISION_WEIGHTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "weights.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def files(monkeypatch, tmp_path):
    onnx = pytest.importorskip("onnx")
    variant = narrow_twins(monkeypatch)["bvlc_alexnet"]
    state = fastalex.AlexNet(variant="bvlc_alexnet").state_dict()
    (tmp_path / "bvlc_alexnet.caffemodel").write_bytes(net(layers_of(variant, state), old=True, legacy=True))
    light = Path(onnx.__file__).parent / "backend/test/data/light/light_bvlc_alexnet.onnx"
    onnx.save(zoo_file(light, state), tmp_path / "bvlcalexnet-12.onnx")
    Image.effect_noise((300, 260), 60).convert("RGB").save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)


def test_commands(files):
    (commands,) = blocks("sh")
    for command in commands.strip().splitlines():
        program, *arguments = command.split()
        assert program == "fastalex"
        cli.main([*arguments, *(["--device", "cpu"] if arguments[0] == "predict" else [])])
    one, other = fastalex.alexnet("bvlc_alexnet.safetensors"), fastalex.alexnet("from-the-zoo.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_python(files, capsys, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id, name):
            return False

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            sent[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    def download(repo_id, name, **options):
        Path("downloaded").write_bytes(sent[repo_id][name])
        return "downloaded"

    monkeypatch.setattr(hub, "client", lambda: SimpleNamespace(HfApi=Api, hf_hub_download=download))
    code = blocks("python")
    assert len(code) == 4
    names = {}
    for block in code:
        exec(block.replace("path/to/checkout", str(ROOT)), names)
    comments = re.findall(r"^print\(.*\)  # (.*)$", "".join(code), re.MULTILINE)
    printed = capsys.readouterr().out
    assert len(comments) == 2
    assert all(comment in printed for comment in comments)
    assert names["logits"].shape == (2, 1000)
    assert names["birds"].card == names["again"].card
    assert torch.equal(names["model"].classifier[6].weight, names["small"].classifier[6].weight)


def test_facts():
    assert all(f"{value:.8f}" in PAGE for value in IMAGENET_MEAN)
    assert all(name in PAGE for name in TORCHVISION_WEIGHTS)
    factor = 255 * sum((0.229, 0.224, 0.225)) / 3
    assert f"about {factor:.0f} times as large" in PAGE
    assert f"some {round(factor**2, -2):,.0f} times smaller" in PAGE


def test_extras():
    text = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"fastalex\[(\w+)\]", PAGE):
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra
