"""Models in folders, on the Hugging Face Hub and through torch.hub, without a network."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import narrow, narrow_twins
from torch import fx

import fastalex
from fastalex.data.preprocessing import Preprocessing

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[1]


def small(classes=3):
    return fastalex.AlexNet(classes, 0.25, variant=narrow("caffenet"))


def equal(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(k == other and torch.equal(v, w) for (k, v), (other, w) in pairs)


def test_round_trip(tmp_path):
    model = small()
    looks = Preprocessing(3, 300, 227, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    model.save_pretrained(tmp_path / "mine", classes=("cat", "dog", "owl"), preprocessing=looks)
    loaded = fastalex.AlexNet.from_pretrained(tmp_path / "mine")
    assert equal(loaded, model)
    assert not loaded.training
    assert loaded.variant == model.variant
    assert loaded.num_classes == 3
    assert (loaded.card.classes, loaded.card.preprocessing, loaded.card.dropout) == (("cat", "dog", "owl"), looks, 0.25)
    assert json.loads((tmp_path / "mine/config.json").read_text())["classes"] == ["cat", "dog", "owl"]
    # a model that came with names keeps them
    loaded.save_pretrained(str(tmp_path / "mine"))
    assert fastalex.AlexNet.from_pretrained(str(tmp_path / "mine")).card == loaded.card


def test_without_names_and_with_too_few(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    card = fastalex.AlexNet.from_pretrained(tmp_path).card
    assert card.classes == ("0", "1", "2")
    assert card.preprocessing == Preprocessing.for_photos(3, 227)
    with pytest.raises(ValueError, match="classes must be 3 names, one for each output, got 2"):
        model.save_pretrained(tmp_path, classes=("a", "b"))
    loaded = fastalex.AlexNet.from_pretrained(tmp_path)
    loaded.classifier[-1] = torch.nn.Linear(48, 5)
    with pytest.raises(ValueError, match="classes must be 5 names, one for each output, got 3"):
        loaded.save_pretrained(tmp_path)


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in"):
        fastalex.AlexNet.from_pretrained(tmp_path)
    for source in (tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
            fastalex.AlexNet.from_pretrained(source)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        fastalex.AlexNet.from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'fastalex\[hub\]'"):
        fastalex.AlexNet.from_pretrained("somebody/alexnet")
    small().save_pretrained(tmp_path)  # a folder needs no package
    assert fastalex.AlexNet.from_pretrained(tmp_path).num_classes == 3


def test_the_hub(tmp_path, monkeypatch):
    """What is asked of huggingface_hub, whose own functions are there with these parameters."""
    import inspect

    package = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(repo_id, filename, **options):
        assert set(options) <= set(inspect.signature(original).parameters)
        asked["download"] = (repo_id, filename, options["revision"])
        return str(tmp_path / "sent" / filename)

    class Api(package.HfApi):
        def create_repo(self, repo_id, **options):
            inspect.signature(package.HfApi.create_repo).bind(self, repo_id, **options)
            asked["create"] = (self.token, repo_id, options)
            return package.RepoUrl(f"https://huggingface.co/somebody/{repo_id}")

        def file_exists(self, repo_id, filename):
            inspect.signature(package.HfApi.file_exists).bind(self, repo_id, filename)
            return (tmp_path / "sent" / filename).exists()

        def upload_folder(self, **options):
            inspect.signature(package.HfApi.upload_folder).bind(self, **options)
            shutil.copytree(options.pop("folder_path"), tmp_path / "sent", dirs_exist_ok=True)
            asked["upload"] = options
            return "https://huggingface.co/somebody/mine/commit/1"

    original = package.hf_hub_download
    monkeypatch.setattr(package, "hf_hub_download", download)
    monkeypatch.setattr(package, "HfApi", Api)
    model = small()
    assert model.push_to_hub("mine", classes=["a", "b", "c"], private=True, token="t").endswith("commit/1")
    assert asked["create"] == ("t", "mine", {"private": True, "exist_ok": True})
    assert asked["upload"] == {"repo_id": "somebody/mine", "commit_message": "Upload AlexNet"}
    assert {path.name for path in (tmp_path / "sent").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert 'from_pretrained("somebody/mine")' in (tmp_path / "sent/README.md").read_text()
    (tmp_path / "sent/README.md").write_text("ours")
    model.push_to_hub("mine", classes=["a", "b", "c"])
    assert (tmp_path / "sent/README.md").read_text() == "ours"
    loaded = fastalex.AlexNet.from_pretrained("somebody/mine", revision="v1")
    assert asked["download"] == ("somebody/mine", "model.safetensors", "v1")
    assert equal(loaded, model)
    assert loaded.card.classes == ("a", "b", "c")


@pytest.fixture
def loaded(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    return model, fastalex.AlexNet.from_pretrained(tmp_path)


def test_the_rest_of_the_model_is_untouched(loaded):
    model, loaded = loaded
    images = torch.randn(1, 3, 227, 227)
    expected = model.eval()(images)
    assert list(loaded.state_dict()) == list(model.state_dict())
    again = pickle.loads(pickle.dumps(loaded))
    assert again.card == loaded.card
    torch.testing.assert_close(again(images), expected)
    torch.testing.assert_close(fx.symbolic_trace(loaded)(images), expected)


@pytest.mark.slow
def test_it_compiles(loaded):
    model, loaded = loaded
    images = torch.randn(1, 3, 227, 227)
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model.eval()(images))


def test_a_run_of_training_is_a_pretrained_model(tmp_path):
    """Its folder holds a model.safetensors of the same kind, and `alexnet` reads what is saved."""
    from fastalex.card import ModelCard
    from fastalex.checkpoint import load_model, save_model

    card = ModelCard(narrow("paper"), ("a", "b"), Preprocessing.for_photos(3, 224))
    save_model(tmp_path / "model.safetensors", fastalex.AlexNet.from_card(card), card)
    model = fastalex.AlexNet.from_pretrained(tmp_path)
    assert model.card == card
    model.save_pretrained(tmp_path / "copy")
    assert load_model(tmp_path / "copy/model.safetensors")[1] == card
    assert equal(fastalex.alexnet(tmp_path / "copy/model.safetensors"), model)


def test_import_brings_no_reader_of_foreign_files():
    script = (
        "import sys, fastalex; print({'huggingface_hub', 'safetensors', 'onnx', 'google.protobuf'} & {*sys.modules})"
    )
    used = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert used.stdout == "set()\n"


def test_torch_hub(tmp_path, monkeypatch):
    twins = narrow_twins(monkeypatch)
    torch.save(fastalex.AlexNet(7, variant="torchvision").state_dict(), tmp_path / "weights.pth")
    model = torch.hub.load(str(ROOT), "alexnet", weights=tmp_path / "weights.pth", source="local")
    assert type(model) is fastalex.AlexNet
    assert model.variant == twins["torchvision"]
    assert type(torch.hub.load(str(ROOT), "lpips", pnet_rand=True, verbose=False, source="local")) is fastalex.LPIPS
