"""What a run was started with is kept: `--resume` alone goes on with it, and what contradicts it is refused."""

import json

import pytest
import trees

pytest.importorskip("safetensors")
pytest.importorskip("tyro")
pytest.importorskip("torchvision")

from fastalex import cli
from fastalex.training.progress import METRICS
from fastalex.training.settings import SETTINGS, Settings

SAME = ["--seed", "3", "--init", "IMAGENET1K_V1"]  # the first is what the run has
START = ["--epochs", "1", "--batch-size", "4", "--lr", "0.02", "--seed", "3", "--recipe", "paper", "--variant", "demo"]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    data = folder.with_name("pictures")
    trees.folders(data, width=90, height=80)
    cli.main(["train", "--data", str(data), "--workers", "0", "--out", str(folder), "--device", "cpu", *START])
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_resume_alone_goes_on_with_the_runs_own_settings(started, capsys):
    before = lines(started)
    cli.main(["train", "--resume", "--out", str(started)])
    assert lines(started) == before
    text = " ".join(capsys.readouterr().out.split())
    assert "recipe paper: variant demo at 64x64, 1 epoch of 6 pictures" in text
    cli.main(["train", "--resume", "--out", str(started), "--epochs", "2", "--save-minutes", "1"])
    assert lines(started)[:1] == before
    assert len(lines(started)) == 2
    settings = Settings.load(started)
    assert (settings.recipe.epochs, settings.recipe.lr, settings.recipe.seed) == (2, 0.02, 3)
    assert settings.flags["save_minutes"] == 1.0
    cli.main(["train", "--resume", "--out", str(started)])  # the two epochs are the run's own now
    assert len(lines(started)) == 2


def test_what_may_not_change_is_named_with_both_values(started, capsys):
    kept = (started / SETTINGS).read_text()
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", "--out", str(started), "--lr", "0.5", "--recipe", "demo", *SAME])
    message = capsys.readouterr().err
    wrong = "--recipe paper, not demo, no --init, not IMAGENET1K_V1, --lr 0.02, not 0.5"
    assert f"{started} was started with {wrong}: leave that out" in message
    assert "seed" not in message
    assert (started / SETTINGS).read_text() == kept


def test_data_that_does_not_fit_changes_nothing(started, capsys, tmp_path):
    """A wrong --data is refused by the state, and the next --resume goes on as if it had not been given."""
    trees.folders(tmp_path / "pictures", per_class=2, width=90, height=80)
    kept = (started / SETTINGS).read_text()
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", "--out", str(started), "--data", str(tmp_path / "pictures")])
    assert f"{started} was trained with 6 pictures, not 4" in capsys.readouterr().err
    assert (started / SETTINGS).read_text() == kept


def test_settings_survive_their_file(started, tmp_path):
    settings = Settings.load(started)
    (tmp_path / SETTINGS).write_text(settings.to_json())
    assert Settings.load(tmp_path) == settings
    assert Settings.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "not JSON",
        lambda text: "[]",
        lambda text: text.replace('"lr": 0.02', '"lr": "fast"'),
        lambda text: text.replace('"epochs"', '"epoch"'),
        lambda text: text.replace('"channels"', '"canals"'),
        lambda text: text.replace('"flags": {', '"flags": [], "other": {'),
    ],
)
def test_damaged_settings(damage, started, tmp_path):
    (tmp_path / SETTINGS).write_text(damage((started / SETTINGS).read_text()))
    with pytest.raises(ValueError, match=r"settings\.json is damaged or of another version"):
        Settings.load(tmp_path)
