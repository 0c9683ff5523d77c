"""A miniature training run: what it writes, and that it goes on where it was stopped."""

import json
from dataclasses import replace

import pytest
import torch

from fastalex import AlexNet, alexnet, checkpoint
from fastalex.checkpoint import MODEL, STATE
from fastalex.data.image_sets import FashionMNIST
from fastalex.evaluation.metrics import evaluate, in_top
from fastalex.files import replacing
from fastalex.training import loop
from fastalex.training.recipes import DEMO_RECIPE, PAPER_RECIPE

pytest.importorskip("safetensors")


class FewPictures(FashionMNIST):
    """Every 40th picture: 125 for training, 25 for testing."""

    def count(self, split):
        return super().count(split) // 40

    def batches(self, split, indices):
        return super().batches(split, [chosen * 40 for chosen in indices])


class Stop(Exception):
    pass


class StopAfter(loop.Watcher):
    """Kills the run in the middle of the epoch after `epoch`."""

    def __init__(self, epoch):
        self.last, self.now = epoch, 0

    def epoch_begins(self, epoch):
        self.now = epoch

    def batch_done(self, images):
        if self.now > self.last:
            raise Stop


def small(recipe, **changes):
    variant = replace(DEMO_RECIPE.variant, hidden=(32, 32))
    return replace(recipe, variant=variant, batch_size=50, **changes)


RECIPE = small(DEMO_RECIPE, epochs=3)


def run(folder, recipe=RECIPE, **options):
    data = FewPictures(FashionMNIST.preprocessing_for(1, 64))
    torch.manual_seed(recipe.seed)
    model = AlexNet(10, recipe.dropout, variant=recipe.variant)
    return model, loop.train(model, data, recipe, folder, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, *run(folder)


def test_metrics_are_written_line_by_line(finished):
    folder, _, history = finished
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == history
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert all(0 <= line["top1"] <= line["top5"] <= 1 for line in history)


def test_no_temporary_files_are_left(finished):
    assert {file.name for file in finished[0].iterdir()} == {MODEL, STATE, "metrics.jsonl"}


def test_checkpoint_rebuilds_the_model(finished):
    folder, model, history = finished
    loaded, card = checkpoint.load_model(folder / MODEL)
    assert loaded.variant == RECIPE.variant
    assert card.classes == FashionMNIST.classes
    assert card.preprocessing == FashionMNIST.preprocessing_for(1, 64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    scores = evaluate(loaded, FewPictures(card.preprocessing))
    assert scores.top1 == pytest.approx(history[-1]["top1"])


@pytest.mark.parametrize("schedule", ["one-cycle", "plateau"])
def test_resumed_run_ends_with_the_same_weights(tmp_path, schedule):
    recipe = small(DEMO_RECIPE, epochs=3, schedule=schedule)
    whole, history = run(tmp_path / "whole", recipe)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", recipe, watcher=StopAfter(2))
    torch.rand(7)  # whatever else the process draws must not matter
    resumed, resumed_history = run(tmp_path / "stopped", recipe, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    timing = {"seconds", "images_per_second"}
    plain = [[{k: v for k, v in line.items() if k not in timing} for line in h] for h in (history, resumed_history)]
    assert plain[0] == plain[1]
    assert len((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()) == 3


def test_another_seed_gives_other_weights(finished, tmp_path):
    other, _ = run(tmp_path, replace(RECIPE, epochs=1, seed=1))
    assert not torch.equal(other.state_dict()["features.0.weight"], finished[1].state_dict()["features.0.weight"])


def test_resume_refuses_another_recipe_and_an_empty_folder(finished, tmp_path):
    with pytest.raises(ValueError, match="another recipe"):
        run(finished[0], replace(RECIPE, lr=0.1), resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(tmp_path, resume=True)


def test_bf16_training_learns_as_well(tmp_path):
    _, history = run(tmp_path, replace(RECIPE, epochs=2), amp="bf16")
    assert history[-1]["train_loss"] < 2.5


def test_diverging_run_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        run(tmp_path, replace(RECIPE, lr=1e9))


def test_plateau_divides_the_rate_by_ten():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], PAPER_RECIPE.lr)
    schedule = loop.make_schedule(optimizer, PAPER_RECIPE, 10)
    for _ in range(PAPER_RECIPE.patience + 2):
        schedule.step(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(PAPER_RECIPE.lr / 10)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise Stop

    with pytest.raises(Stop):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(finished, tmp_path):
    """The kernel refuses to write past 100 kB, as a full disk would; the message names the file and the reason."""
    resource = pytest.importorskip("resource")
    model, card = checkpoint.load_model(finished[0] / MODEL)
    (tmp_path / MODEL).write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*model.safetensors: .*; the old .* is untouched"):
            checkpoint.save_model(tmp_path / MODEL, model, card)
        with pytest.raises(OSError, match=r"cannot write .*state.pt: "):
            checkpoint.save_state(tmp_path / STATE, model=model.state_dict())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / MODEL).read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / MODEL]


def test_checkpoints_have_the_permissions_of_any_new_file(finished, tmp_path):
    (tmp_path / "any").touch()
    expected = (tmp_path / "any").stat().st_mode
    assert [(finished[0] / name).stat().st_mode for name in (MODEL, STATE)] == [expected] * 2


def test_files_that_are_no_checkpoints(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load_model(tmp_path / MODEL)
    (tmp_path / MODEL).write_bytes(b"not at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        checkpoint.load_model(tmp_path / MODEL)
    save_file({"x": torch.zeros(1)}, tmp_path / MODEL)
    with pytest.raises(ValueError, match="does not say which variant"):
        checkpoint.load_model(tmp_path / MODEL)
    save_file({"x": torch.zeros(1)}, tmp_path / MODEL, metadata={checkpoint.METADATA_KEY: "{}"})
    with pytest.raises(ValueError, match="another version"):
        checkpoint.load_model(tmp_path / MODEL)


def test_cards_of_all_recipes_survive_json():
    for recipe in (DEMO_RECIPE, PAPER_RECIPE):
        card = checkpoint.ModelCard(
            recipe.variant, ("a", "b"), FashionMNIST.preprocessing_for(recipe.variant.in_channels, 64), recipe.dropout
        )
        assert checkpoint.ModelCard.from_json(card.to_json()) == card


def test_alexnet_reads_the_file_of_a_named_variant(tmp_path):
    model = AlexNet(2, variant="torchvision")
    card = checkpoint.ModelCard(model.variant, ("a", "b"), FashionMNIST.preprocessing_for(3, 224))
    checkpoint.save_model(tmp_path / MODEL, model, card)
    assert torch.equal(alexnet(tmp_path / MODEL).classifier[6].weight, model.classifier[6].weight)


def test_in_top():
    logits = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    labels = torch.tensor([1, 2])
    assert in_top(logits, labels, 1).tolist() == [False, False]
    assert in_top(logits, labels, 2).tolist() == [True, False]
    assert in_top(logits, labels, 5).tolist() == [True, True]
