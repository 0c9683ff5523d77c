"""The three commands of docs/imagenet.md, as they stand there, on a miniature tree in ImageNet's layout."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("torchvision")

import trees

from fastalex import cli

ROOT = Path(__file__).parent.parent
# what makes minutes of days; everything else is taken from there
SMALL = ["--epochs", "1", "--batch-size", "6", "--device", "cpu"]


def commands():
    section = (ROOT / "docs" / "imagenet.md").read_text().split("## Three commands")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line) for line in block.group(1).splitlines()]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trees.imagenet(tmp_path / "ILSVRC2012", width=300, height=280)
    return tmp_path


def check(tree):
    assert len((tree / "runs/imagenet/metrics.jsonl").read_text().splitlines()) == 1
    scores = json.loads((tree / "runs/imagenet/scores.json").read_text())
    assert (scores["pictures"], scores["crops"]) == (6, "ten")
    assert [row["name"] for row in scores["per_class"]] == list(trees.SYNSETS)
    assert (tree / "runs/imagenet/confusion.png").stat().st_size > 1000


def test_three_commands(tree):
    """In this process, with a narrow network."""
    pack, train, evaluate = commands()
    assert train[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "fastalex"]
    cli.main(pack[1:])
    cli.main([*train[5:], *SMALL, "--variant", "demo"])
    cli.main([*evaluate[1:], "--device", "cpu"])
    check(tree)


@pytest.mark.slow
def test_three_commands_as_a_shell_starts_them(tree):
    """With torchrun and the network of the paper."""
    pack, train, evaluate = commands()
    fastalex, torchrun = [sys.executable, "-m", "fastalex"], [sys.executable, "-m", "torch.distributed.run"]
    train[2] = "2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in (
        [*fastalex, *pack[1:]],
        [*torchrun, "--standalone", *train[1:], *SMALL],
        [*fastalex, *evaluate[1:], "--device", "cpu", "--batch-size", "20"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    check(tree)
