"""docs/training.md: its commands and its program, on photographs, to the letter and in miniature."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import narrow

pytest.importorskip("tyro")
pytest.importorskip("torchvision")
pytest.importorskip("skimage")

import photographs

from fastalex import AlexNet, cli
from fastalex.training.recipes import MANY_CLASSES, MANY_PICTURES, RECIPES, sized
from fastalex.variants import VARIANTS

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
[PROGRAM] = [text for kind, text in BLOCKS if kind == "python"]
DEAD = next(line for line in COMMANDS if "--recipe paper" in line)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Photographs in ./photos, and a narrow network of random weights where torchvision's would be downloaded."""
    twin = replace(narrow("torchvision", 16), name="torchvision")
    monkeypatch.setitem(VARIANTS, "torchvision", twin)
    published = AlexNet(1000, variant=twin).state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: published)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, *more):
    program, *arguments = shlex.split(command)
    assert program == "fastalex"
    cli.main([*arguments, *more, "--device", "cpu", *(["--workers", "0"] if arguments[0] != "predict" else [])])


def history(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_commands_in_miniature(folder, capsys):
    """One epoch each, 3 pictures a class, in the order of the page; the last of them goes on with one more."""
    photographs.folder_of(folder / "photos", per_class=3)
    for command in COMMANDS:
        if command == DEAD:
            continue
        short = re.sub(r"--epochs \d+", "--epochs 2", command)
        starts = command.startswith("fastalex train") and "--resume" not in command
        run(short, *(["--epochs", "1"] if starts else []))
    text = " ".join(capsys.readouterr().out.split())
    assert "6 pictures, a fifth of each class, are held out" in text
    assert "all but the last layer from IMAGENET1K_V1, backbone frozen" in text
    assert "all of runs/photos" in text
    assert [len(history(folder / "runs" / name)) for name in ("photos", "tuned", "head", "further")] == [2, 1, 1, 1]


def test_the_program(folder):
    names = {}
    exec(PROGRAM, names)
    assert names["model"].classifier[-1].weight.shape[0] == 6
    assert [len(group["params"]) for group in names["optimizer"].param_groups] == [4, 2]


def test_the_table_of_defaults_is_what_the_code_chooses():
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if re.match(r"\| \S.*\| `.*\d+ \|", line)]
    found = {row[1].strip().strip("`"): [cell.strip() for cell in row[3:]] for row in rows}
    tune = RECIPES["fine-tune"]
    for name in ("paper", "fine-tune"):
        recipe = RECIPES[name]
        assert found[name][:2] == [str(recipe.epochs), str(recipe.batch_size)]
        assert found[name][2].startswith(f"{recipe.lr:g}")
    assert found["fine-tune"][2].endswith(f"{tune.lr * tune.backbone_lr:g}")
    photos = [[cell.strip() for cell in row[3:]] for row in rows if "photos" in row[1]]
    for cells, pictures in zip(photos, (500, 1_000, 10_000), strict=True):
        recipe = sized(RECIPES["photos"], pictures)
        assert cells[0].startswith(str(recipe.epochs))
        assert cells[1:] == [str(recipe.batch_size), f"{recipe.lr:g}"]
    assert f"{MANY_PICTURES:,} and more, of {MANY_CLASSES} classes or more" in PAGE


@pytest.mark.slow
def test_own_photographs_are_learnt_with_the_defaults(folder, capsys):
    """A stranger's first command.  Guessing is right once in six."""
    photographs.folder_of(folder / "photos")
    run(COMMANDS[0])
    lines = history(folder / "runs/photos")
    assert len(lines) == 100
    assert lines[-1]["top1"] >= 0.6
    assert min(line[name] for line in lines for name in ("fc6_alive", "fc7_alive")) > 0.4
    run(COMMANDS[1])
    assert "top-1" in capsys.readouterr().out


@pytest.mark.slow
def test_the_recipe_of_2012_is_stopped_on_few_classes(folder, capsys):
    photographs.folder_of(folder / "photos")
    with pytest.raises(SystemExit) as stopped:
        run(DEAD)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "the network is dead since epoch" in message
    assert "lower learning rate (it was 0.01) or another recipe" in message
    lines = history(folder / "runs/dead")
    assert len(lines) <= 15
    assert max(line["train_loss"] for line in lines) > 20
