"""The command line as a newcomer meets it: help, one-line errors, and a round trip from training to prediction."""

import json
import subprocess
import sys
from typing import get_args, get_type_hints
from urllib.error import URLError

import pytest

pytest.importorskip("tyro")
pytest.importorskip("torchvision")

import torch
from PIL import Image

from fastalex import cli
from fastalex.data import fashion_mnist, photos
from fastalex.training import recipes
from fastalex.variants import VARIANTS
from fastalex.visualize import console, figures


def error_of(capsys, *arguments):
    """The message on stderr of a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("fastalex: error: ")
    assert message.count("\n") == 1
    return message


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch over the whole set."""
    folder = tmp_path_factory.mktemp("run")
    cli.main(["train", "--out", str(folder), "--epochs", "1", "--batch-size", "100", "--device", "cpu"])
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "shoe.png"
    Image.fromarray(fashion_mnist.load("test").images[-1]).resize((300, 200)).save(path)
    return path


@pytest.mark.parametrize(
    "command", [[], *([name] for name in cli.COMMANDS), ["visualize", "similar"], ["experiment", "ablation"]]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: fastalex {' '.join(command)}".strip() in text
    if not command:
        assert all(name in text for name in cli.COMMANDS)


def test_python_m_fastalex():
    done = subprocess.run([sys.executable, "-m", "fastalex", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "predict" in done.stdout


def test_wrong_argument_ends_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "fastalex", "train", "--epochs", "many"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def choices(argument):
    """The names that an optional argument of `fastalex train` takes."""
    literal, none = get_args(get_type_hints(cli.train)[argument])
    assert none is type(None)
    return get_args(literal)


def test_every_variant_and_recipe_can_be_trained():
    assert choices("variant") == ("demo", *VARIANTS)
    assert sorted(choices("recipe")) == sorted(recipes.RECIPES)


def test_train_eval_predict(trained, picture, capsys, tmp_path):
    weights = str(trained / "model.safetensors")
    cli.main(["eval", "--weights", weights, "--device", "cpu", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "top-1" in text
    assert "Ankle boot" in text
    assert {file.name for file in tmp_path.iterdir()} >= {"scores.json", "confusion.png"}
    figure = trained / "new" / "predictions.png"
    for crops in ([], ["--ten-crop"]):
        options = ["--weights", weights, "--top", "2", "--out", str(figure), "--device", "cpu", *crops]
        cli.main(["predict", str(picture), *options])
        text = capsys.readouterr().out
        assert "the 2 likeliest" in text
        assert text.count("%") == 2
        with Image.open(figure) as drawn:
            assert drawn.width > drawn.height > 200
        figure.unlink()


def test_predict_without_pictures_takes_four_photos(trained, capsys, tmp_path):
    pytest.importorskip("skimage")
    weights, figure = str(trained / "model.safetensors"), str(tmp_path / "photos.png")
    cli.main(["predict", "--weights", weights, "--out", figure, "--device", "cpu"])
    text = capsys.readouterr().out
    assert all(name in text for name in photos.NAMES)
    assert text.count("%") == 4 * 5


def test_predict_without_pictures_or_scikit_image(trained, capsys, monkeypatch):
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    message = error_of(capsys, "predict", "--weights", str(trained / "model.safetensors"))
    assert "pip install 'fastalex[photos]'" in message


def test_published_weights_without_a_network(capsys, picture, monkeypatch, tmp_path):
    """The message holds the command that fetches the file elsewhere, and where to put it."""

    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = error_of(capsys, "predict", str(picture))
    assert "curl -LO https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in message
    assert str(tmp_path / "hub" / "checkpoints") in message


@pytest.mark.parametrize(("size", "reason"), [((20000, 10000), "more than 85,000,000"), ((4000, 10), "50 times")])
def test_pictures_that_would_take_gigabytes(trained, capsys, tmp_path, size, reason):
    path = tmp_path / "big.png"
    Image.new("1", size).save(path)
    assert reason in error_of(capsys, "predict", str(path), "--weights", str(trained / "model.safetensors"))


def test_an_existing_run_is_not_overwritten(trained, capsys):
    assert "--resume" in error_of(capsys, "train", "--out", str(trained))


def test_resume_of_a_finished_run_keeps_it(trained, capsys):
    before = (trained / "metrics.jsonl").read_text()
    cli.main(["train", "--out", str(trained), "--epochs", "1", "--batch-size", "100", "--resume", "--device", "cpu"])
    assert (trained / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("--accumulate", "0"), ("--save-steps", "0"), ("--lr", "-1"), ("--epochs", "0"), ("--batch-size", "0")],
)
def test_senseless_numbers(option, value, capsys, tmp_path):
    message = error_of(capsys, "train", option, value, "--out", str(tmp_path), "--device", "cpu")
    assert option.removeprefix("--").replace("-", "_") in message
    assert value in message


def test_missing_picture(trained, capsys):
    weights = str(trained / "model.safetensors")
    assert "no such file: nothing.jpg" in error_of(capsys, "predict", "nothing.jpg", "--weights", weights)


def test_visualize(trained, picture, capsys, tmp_path):
    """Each command: what it says it wrote is there, and the pages hold as many pictures as they should."""
    common = ["--weights", str(trained / "model.safetensors"), "--out", str(tmp_path / "out")]
    for number in range(3):
        Image.effect_noise((90, 80), 40 + number).save(picture.parent / f"{number}.png")
    commands = {
        ("filters",): {"filters.png": None, "filters.html": 32},
        ("activations", str(picture), "--layer", "pool2"): {
            "activations-pool2-shoe.png": None,
            "activations-pool2.html": 1 + 96,
        },
        ("activations", str(picture), "--layer", "fc7"): {"activations-fc7.html": 1 + 1},
        ("similar", str(picture), "--data", str(picture.parent), "--count", "2"): {
            "similar.png": None,
            "similar.html": 1 + 2,
            "index.safetensors": None,
        },
    }
    for arguments, files in commands.items():
        cli.main(["visualize", *arguments, *common])
        text = capsys.readouterr().out
        for name, pictures in files.items():
            assert str(tmp_path / "out" / name) in text
            if pictures is None:
                assert (tmp_path / "out" / name).stat().st_size > 1000
            else:
                assert (tmp_path / "out" / name).read_text().count("<img ") == pictures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["activations", "PICTURE", "--layer", "conv6"], "layer must be one of conv1, pool1, conv2"),
        (["similar", "--count", "0"], "--count must be at least 1, got 0"),
        (["similar", "--data", "nowhere"], "no folder nowhere"),
    ],
)
def test_visualize_refuses(trained, picture, capsys, tmp_path, arguments, message):
    arguments = [str(picture) if argument == "PICTURE" else argument for argument in arguments]
    options = ["--weights", str(trained / "model.safetensors"), "--out", str(tmp_path / "out")]
    assert message in error_of(capsys, "visualize", *arguments, *options)


def test_not_an_image(trained, capsys, tmp_path):
    path = tmp_path / "text.jpg"
    path.write_text("this is text")
    weights = str(trained / "model.safetensors")
    assert f"{path} is not an image" in error_of(capsys, "predict", str(path), "--weights", weights)


def test_missing_checkpoint(capsys, picture, tmp_path):
    weights = str(tmp_path / "model.safetensors")
    assert f"no checkpoint at {weights}" in error_of(capsys, "predict", str(picture), "--weights", weights)
    assert "nothing.pth" in error_of(capsys, "predict", str(picture), "--weights", "nothing.pth")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_wrong_checkpoint(name, capsys, picture, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"not a checkpoint")
    assert name in error_of(capsys, "predict", str(picture), "--weights", str(path))


def test_classes_without_names(capsys, picture, tmp_path):
    import torch

    from fastalex import AlexNet

    path = tmp_path / "seven.pth"
    torch.save(AlexNet(7, variant="torchvision").state_dict(), path)
    assert "7 classes and no names" in error_of(capsys, "predict", str(picture), "--weights", str(path))


def test_other_classes_than_the_checkpoint(trained, capsys, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (80, 80)).save(tmp_path / "val" / name / "0.png")
    message = error_of(
        capsys, "eval", "--weights", str(trained / "model.safetensors"), "--data", str(tmp_path), "--workers", "0"
    )
    assert "10 classes" in message
    assert "have 2" in message


def test_wordnet_numbers_stand_for_imagenets_names():
    from fastalex.checkpoint import ModelCard
    from fastalex.data.preprocessing import Preprocessing
    from fastalex.evaluation.classifier import check_classes

    card = ModelCard(VARIANTS["torchvision"], tuple(f"name {i}" for i in range(1000)), Preprocessing.for_photos(3, 224))
    check_classes(card, tuple(f"n{i:08}" for i in range(1000)))
    with pytest.raises(ValueError, match="have 999"):
        check_classes(card, tuple(f"n{i:08}" for i in range(999)))
    with pytest.raises(ValueError, match="must be the same"):
        check_classes(card, tuple(f"other {i}" for i in range(1000)))


def test_missing_folder(capsys, tmp_path):
    message = error_of(capsys, "train", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert "nowhere/train" in message


def test_unknown_device(trained, capsys):
    assert "--device abacus" in error_of(
        capsys, "eval", "--weights", str(trained / "model.safetensors"), "--device", "abacus"
    )


@pytest.mark.parametrize("missing", ["tyro", "rich", "safetensors"])
def test_a_missing_extra_names_the_remedy(missing):
    script = (
        f"import sys; sys.modules[{missing!r}] = None; from fastalex.cli import main;"
        f"main(['eval', '--weights', 'x.safetensors'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install 'fastalex[cli]'")
    assert missing in done.stderr


def test_published_checkpoint_is_understood(capsys, picture, tmp_path):
    """A .pth file with torchvision's parameters and 1000 classes gets ImageNet's names."""
    import torch

    from fastalex import AlexNet

    path = tmp_path / "alexnet.pth"
    torch.save(AlexNet(variant="torchvision").state_dict(), path)
    cli.main(["predict", str(picture), "--weights", str(path), "--out", str(tmp_path / "x.png"), "--device", "cpu"])
    assert "the 5 likeliest" in capsys.readouterr().out


def test_describe(capsys, tmp_path):
    chart, numbers = tmp_path / "new" / "chart.png", tmp_path / "other" / "numbers.json"
    cli.main(["describe", "--variant", "demo", "--classes", "10", "--chart", str(chart), "--json", str(numbers)])
    assert "fc6" in capsys.readouterr().out
    with Image.open(chart) as picture:
        assert picture.width > picture.height > 300
    assert json.loads(numbers.read_text())["totals"]["parameters"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "row"),
    [
        ("relu-vs-tanh", ["--threshold", "0.8", "--iterations", "40"], "tanh"),
        ("ablation", ["--epochs", "1"], "dropout"),
    ],
)
def test_experiments(name, options, row, capsys, tmp_path):
    """In processes of their own; a second time nothing is left to do, and other settings are refused."""
    arguments = ["experiment", name, "--seeds", "1", "--out", str(tmp_path), "--device", "cpu"]
    for _ in range(2):
        cli.main([*arguments, *options])
        text = capsys.readouterr().out
        assert row in text
        assert all((tmp_path / file).is_file() for file in ("results.json", "table.md", "figure.png"))
    assert "seed 1:" not in text
    assert "other settings" in error_of(capsys, *arguments, "--seeds", "2", *options)


@pytest.mark.parametrize("name", ["v1 [/old]", "x[bold]y", "a [red]", ":smile:", "$x_$ y$"])
def test_names_are_no_markup(name, trained, capsys, tmp_path):
    """In paths of pictures and results, in the terminal and in figures."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    path = folder / f"{name.replace('/', '')}.png"
    Image.new("RGB", (80, 80)).save(path)
    cli.main(["predict", str(path), "--weights", str(trained / "model.safetensors"), "--out", str(folder / "out.png")])
    text = "".join(capsys.readouterr().out.split("\n"))
    assert f"wrote {folder / 'out.png'}" in text
    assert (folder / "out.png").is_file()


def test_classes_are_no_markup(capsys, tmp_path):
    names = ("[/red]", "[bold]cat[/]", "$x_{$", "a|b")
    confusion = torch.arange(16).view(4, 4)
    console.print_classes(confusion, names)
    console.print_predictions(["a [/b].jpg"], torch.tensor([[0.1, 0.2, 0.3, 0.4]]), names)
    text = capsys.readouterr().out
    for name in (*names, "a [/b].jpg"):
        assert name in text
    figures.confusion_matrix(confusion, names, tmp_path / "confusion.png")
    pictures = torch.zeros(3, 8, 8, dtype=torch.uint8)
    figures.predictions([pictures], ["$a_$ b$.jpg"], torch.tensor([[0.1, 0.2, 0.3, 0.4]]), names, tmp_path / "p.png")
