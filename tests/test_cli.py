"""The command line as a newcomer meets it: help, one-line errors, and a round trip from training to prediction."""

import contextlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args, get_type_hints
from urllib.error import URLError

import pytest

pytest.importorskip("tyro")
pytest.importorskip("torchvision")

import torch
from failing import error_of
from PIL import Image

from fastalex import AlexNet, cli
from fastalex.data import fashion_mnist, photos
from fastalex.evaluation import commands, inputs
from fastalex.training import recipes
from fastalex.variants import VARIANTS
from fastalex.visualize import console, figures


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


ALL_COMMANDS = [
    *([name] for name in cli.COMMANDS if name not in ("visualize", "experiment")),
    *(["visualize", name] for name in ("filters", "activations", "similar")),
    *(["experiment", name] for name in ("relu-vs-tanh", "ablation")),
]


@pytest.mark.parametrize("command", ALL_COMMANDS, ids="-".join)
def test_help_names_things_and_not_types(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert not re.search(r"\b(PATH|STR|INT|FLOAT|BOOL|None|False|OUT)\b|\{None", text)
    assert "--no-" not in text


def test_version(capsys):
    cli.main(["--version"])
    text = capsys.readouterr().out
    assert re.fullmatch(r"fastalex \S+, Python \S+, torch \S+, (triton \S+|no triton), (numba \S+|no numba)\n", text)
    assert torch.__version__ in text


@pytest.mark.parametrize("colours", [True, False])
def test_colours_of_help(colours, capsys, monkeypatch):
    """On a terminal, unless NO_COLOR says otherwise."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "" if colours else "1")
    with pytest.raises(SystemExit):
        cli.main(["describe", "--help"])
    assert ("\x1b[" in capsys.readouterr().out) == colours


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, tmp_path):
    """A script that the shell takes, and that knows commands and choices."""
    script = tmp_path / "fastalex"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--tyro-write-completion", shell, str(script)])
    assert stopped.value.code in (0, None)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(script)], check=True)
    text = script.read_text()
    assert all(word in text for word in ("predict", "--ten-crop", "bvlc_alexnet", "relu-vs-tanh"))


def test_completion_completes(tmp_path):
    """As in a shell of someone who presses tab."""
    script = tmp_path / "fastalex"
    with pytest.raises(SystemExit):
        cli.main(["--tyro-write-completion", "bash", str(script)])
    lines = (
        f"source {script}; words=$(complete -p fastalex); function=${{words##*-F }}; function=${{function%% *}};"
        "COMP_WORDS=(fastalex describe --variant caf); COMP_CWORD=3; COMP_LINE='fastalex describe --variant caf';"
        "COMP_POINT=${#COMP_LINE}; $function fastalex caf --variant; echo ${COMPREPLY[@]}"
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["caffenet"], done.stderr


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastalex.visualize.describe.show", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["describe"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "fastalex: stopped\n"


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
        assert "10 classes" in text
        with Image.open(figure) as drawn:
            assert drawn.width > drawn.height > 200
        figure.unlink()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file as torchvision's: 1,000 classes."""
    path = tmp_path_factory.mktemp("published") / "alexnet.pth"
    torch.save(AlexNet(variant="torchvision").state_dict(), path)
    return path


def test_predict_without_pictures_takes_four_photos(published, capsys, tmp_path):
    pytest.importorskip("skimage")
    figure = str(tmp_path / "photos.png")
    cli.main(["predict", "--weights", str(published), "--out", figure, "--device", "cpu"])
    text = capsys.readouterr().out
    assert all(name in text for name in photos.NAMES)
    assert text.count("%") == 4 * 5


def test_predict_without_pictures_takes_the_samples_for_its_model(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    options = ["--weights", str(trained / "model.safetensors"), "--device", "cpu"]
    cli.main(["predict", *options, "--top", "1", "--out", str(tmp_path / "predictions.png")])
    text = capsys.readouterr().out
    assert "the likeliest class " in text
    assert all(name in text for name in ("Coat 405", "Sandal 510", "Bag 820", "Ankle boot 977"))


def test_predict_without_pictures_or_scikit_image(published, capsys, monkeypatch):
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    assert "pip install 'fastalex[photos]'" in error_of(capsys, "predict", "--weights", str(published))


@pytest.mark.parametrize(
    "command", [["predict"], ["eval"], ["visualize", "filters"], ["visualize", "activations"], ["visualize", "similar"]]
)
def test_no_model_yet(command, capsys, monkeypatch, tmp_path):
    """The default is one and the same, and what makes it is named."""
    monkeypatch.chdir(tmp_path)
    message = error_of(capsys, *command)
    assert f"no {cli.DEMO_MODEL} yet: run `fastalex demo` first" in message
    assert "--weights IMAGENET1K_V1" in message


def test_the_default_weights(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cli.DEMO_MODEL.parent.mkdir(parents=True)
    cli.DEMO_MODEL.write_bytes((trained / "model.safetensors").read_bytes())
    cli.main(["predict", "--device", "cpu"])
    assert f"{cli.DEMO_MODEL}: variant demo, 10 classes" in capsys.readouterr().out
    cli.main(["visualize", "filters"])
    assert Path("runs/visualize/filters.png").is_file()


class Site(http.server.BaseHTTPRequestHandler):
    """/picture: one; /endless: bytes without an end; /silent: none; everything else is missing."""

    picture = b""

    def do_GET(self):
        self.send_response(404 if self.path == "/none.jpg" else 200)
        self.end_headers()
        if self.path.startswith("/picture"):
            self.wfile.write(self.picture)
        with contextlib.suppress(OSError):
            while self.path == "/endless":
                self.wfile.write(bytes(1 << 20))
        if self.path == "/silent":
            self.server.stopping.wait(20)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(picture, monkeypatch):
    """The address of a server with `picture`."""
    monkeypatch.setattr(Site, "picture", picture.read_bytes())
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.stopping = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.stopping.set()
        server.shutdown()


def test_predict_takes_folders_addresses_and_standard_input(trained, picture, site, capsys, monkeypatch, tmp_path):
    """All of them with the file's own probabilities; the bad ones are left out and named, and the code is 1."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.PNG").write_bytes(picture.read_bytes())
    (folder / "a.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("no picture either")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture.read_bytes())))
    report = tmp_path / "new" / "report.json"
    names = [str(picture), str(folder), f"{site}/picture.png?size=1", "-", f"{site}/none.jpg", "gone.png"]
    names.append(str(tmp_path / "empty"))
    options = ["--weights", str(trained / "model.safetensors"), "--device", "cpu", "--json", str(report), "--top", "3"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["predict", *names, *options, "--out", str(tmp_path / "predictions.png")])
    assert stopped.value.code == 1
    found = json.loads(report.read_text())
    assert [row["picture"] for row in found["pictures"]] == [
        str(picture), str(folder / "deep" / "b.PNG"), f"{site}/picture.png?size=1", "-",
    ]  # fmt: skip
    first = found["pictures"][0]["classes"]
    assert [row["probability"] for row in first] == sorted((row["probability"] for row in first), reverse=True)
    assert len(first) == 3
    assert all(row["classes"] == first for row in found["pictures"])
    bad = [str(folder / "a.jpg"), f"{site}/none.jpg", "gone.png", str(tmp_path / "empty")]
    assert [row["picture"] for row in found["left_out"]] == bad
    text = capsys.readouterr().err
    for name, reason in zip(bad, ("not an image", "HTTP Error 404", "no such file", "no pictures in"), strict=True):
        assert sum(name in line and "left out:" in line and reason in line for line in text.splitlines()) == 1
    assert "4 of 8 pictures left out" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/none.jpg", "cannot be fetched: HTTP Error 404"), ("/endless", "more than 3,000,000 bytes"),
     ("/silent", "timed out"), ("/nothing", "is empty"), (None, "refused")],
)  # fmt: skip
def test_addresses_that_have_no_picture(path, reason, trained, site, capsys, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_BYTES", 3_000_000)
    monkeypatch.setattr(inputs, "SILENT_SECONDS", 0.2)
    address = "http://127.0.0.1:9/x.png" if path is None else site + path
    message = error_of(capsys, "predict", address, "--weights", str(trained / "model.safetensors"))
    assert address in message
    assert reason in message


@pytest.mark.parametrize(("content", "reason"), [(b"", "standard input is empty"), (b"text", "input is not an image")])
def test_standard_input_that_is_no_picture(content, reason, trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert reason in error_of(capsys, "predict", "-", "--weights", str(trained / "model.safetensors"))


def test_none_of_several_pictures_can_be_read(trained, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["predict", "one.png", "two.png", "--weights", str(trained / "model.safetensors")])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [" left out", " left out", " error"]
    assert lines[-1].endswith("none of 2 pictures can be read")


def test_many_pictures(trained, picture, capsys, monkeypatch, tmp_path):
    """In several batches; the figure holds the first ones."""
    monkeypatch.setattr(commands, "BATCH", 4)
    monkeypatch.setattr(commands, "SHOWN", 5)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(10):
        os.link(picture, folder / f"{number:02}.png")
    report = tmp_path / "report.json"
    options = ["--weights", str(trained / "model.safetensors"), "--device", "cpu", "--json", str(report), "--top", "1"]
    cli.main(["predict", str(folder), *options, "--out", str(tmp_path / "figure.png")])
    assert [Path(row["picture"]).name for row in json.loads(report.read_text())["pictures"]] == [
        f"{number:02}.png" for number in range(10)
    ]
    assert "the first 5 of 10 pictures" in capsys.readouterr().out


def test_the_documents_commands(trained, picture, site, capsys, monkeypatch, tmp_path):
    """docs/cli.md's, one after the other, and its JSON has the fields that are written."""
    text = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    cli.DEMO_MODEL.parent.mkdir(parents=True)
    cli.DEMO_MODEL.write_bytes((trained / "model.safetensors").read_bytes())
    for name in ("cat.jpg", "photos/bag.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(picture.read_bytes())
    ran = 0
    for line in "".join(blocks).replace("https://example.org/cat.jpg", f"{site}/picture").splitlines():
        program, *arguments = line.replace("~", str(tmp_path)).split()
        if program == "mkdir":
            Path(arguments[-1]).mkdir(parents=True)
            continue
        assert program == "fastalex"
        if arguments[0] == "inspect":  # compiles
            arguments += ["--help"]
        if "<" in arguments:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(arguments[-1]).read_bytes())))
            arguments = arguments[: arguments.index("<")]
        ends = arguments[-1] == "--help" or arguments[0].startswith("--tyro")
        with pytest.raises(SystemExit, match=r"^(0|None|)$") if ends else contextlib.nullcontext():
            cli.main(arguments)
        ran += 1
    assert ran == 7
    (shown,) = re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    written, shown = json.loads(Path("classes.json").read_text()), json.loads(shown)
    assert written.keys() == shown.keys()
    assert written["pictures"][0].keys() == shown["pictures"][0].keys()
    assert written["pictures"][0]["classes"][0].keys() == shown["pictures"][0]["classes"][0].keys()
    assert shown["left_out"][0].keys() == {"picture", "reason"}


def test_published_weights_without_a_network(capsys, picture, monkeypatch, tmp_path):
    """The message holds the command that fetches the file elsewhere, and where to put it."""

    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = error_of(capsys, "predict", str(picture), "--weights", "IMAGENET1K_V1")
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


def test_published_checkpoint_is_understood(published, capsys, picture, tmp_path):
    """A .pth file with torchvision's parameters and 1000 classes gets ImageNet's names."""
    out = str(tmp_path / "x.png")
    cli.main(["predict", str(picture), "--weights", str(published), "--out", out, "--device", "cpu"])
    text = capsys.readouterr().out
    assert "the 5 likeliest" in text
    assert "1,000 classes" in text


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
