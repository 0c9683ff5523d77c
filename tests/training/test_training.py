"""A miniature training run: what it writes, and that it goes on where it was stopped."""

import json
import sys
import time
import types

import pytest
import torch
from small_runs import BATCH_NORM, RECIPE, TINY, Pictures, Stop, StopAfter, changed, run, without_timings

from fastalex import AlexNet, alexnet, checkpoint
from fastalex.checkpoint import MODEL, PREVIOUS_STATE, STATE
from fastalex.data.augmentation import augment
from fastalex.data.image_sets import FashionMNIST
from fastalex.data.preprocessing import Colours
from fastalex.evaluation.metrics import evaluate, in_top
from fastalex.files import replacing
from fastalex.training import loop
from fastalex.training.options import Options
from fastalex.training.progress import METRICS
from fastalex.training.recipes import RECIPES

pytest.importorskip("safetensors")


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
    assert {file.name for file in finished[0].iterdir()} == {MODEL, STATE, PREVIOUS_STATE, METRICS}


def test_checkpoint_rebuilds_the_model(finished):
    folder, model, history = finished
    loaded, card = checkpoint.load_model(folder / MODEL)
    assert loaded.variant == RECIPE.variant
    assert card.classes == Pictures.classes
    assert card.preprocessing == Pictures.preprocessing
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    scores = evaluate(loaded, Pictures())
    assert scores.top1 == pytest.approx(history[-1]["top1"])


@pytest.mark.parametrize(
    ("schedule", "amp", "variant"),
    [("plateau", "off", TINY), ("step", "fp16", TINY), ("cosine", "bf16", TINY), ("poly", "off", BATCH_NORM)],
)
def test_resumed_run_ends_with_the_same_weights(tmp_path, schedule, amp, variant):
    """Also where the state has the scale of fp16's loss in it, which the first steps halve; running statistics too."""
    recipe = changed(
        variant=variant, schedule=schedule, amp=amp, warmup_epochs=0.5, patience=1, step_epochs=1, lr_in_velocity=True
    )
    whole, history = run(tmp_path / "whole", recipe)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", recipe, save_steps=1, callback=StopAfter(6))
    torch.rand(7)  # whatever else the process draws must not matter
    resumed, resumed_history = run(tmp_path / "stopped", recipe, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert without_timings(history) == without_timings(resumed_history)
    loaded, _ = checkpoint.load_model(tmp_path / "whole" / MODEL)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    norms = [module for module in whole.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [norm.num_batches_tracked.item() for norm in norms] == ([12, 12] if variant is BATCH_NORM else [])
    if norms:  # and in plain alexnet(), where a count of batches is no weight
        assert torch.equal(alexnet(tmp_path / "whole" / MODEL).features[3].running_mean, norms[0].running_mean)


def test_it_learns(tmp_path):
    _, history = run(tmp_path, changed(epochs=20))
    assert history[-1]["top1"] == 1


def test_accumulation_changes_nothing_without_dropout(tmp_path):
    """In float64.  Crops, mirror images and colours belong to the picture, not to the micro-batch."""
    recipe = changed(dropout=0.0, colours=True)
    one, _ = run(tmp_path / "one", recipe, data=Coloured(), wide=True)
    three, _ = run(tmp_path / "three", recipe, data=Coloured(), wide=True, accumulate=3)
    for first, second in zip(one.parameters(), three.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-11)


class Coloured(Pictures):
    colours = Colours((0.1, 0.02, 0.01), ((0.6, 0.8, 0.0), (-0.8, 0.6, 0.0), (0.0, 0.0, 1.0)))


def test_inputs_change_from_epoch_to_epoch_and_with_the_recipe(tmp_path, monkeypatch):
    inputs = []

    def record(*arguments, **options):
        inputs.append((arguments[1], augment(*arguments, **options)))
        return inputs[-1][1]

    monkeypatch.setattr(loop, "augment", record)

    def seen(**recipe):
        """The inputs of each epoch, in the order of the pictures' numbers."""
        inputs.clear()
        run(tmp_path, changed(epochs=2, **recipe), data=Coloured())
        epochs = []
        for part in (inputs[:4], inputs[4:]):
            order = torch.cat([indices for indices, _ in part])
            epochs.append(torch.cat([images for _, images in part])[order.argsort()])
        return epochs

    first, second = seen()
    assert first.shape == (70, 3, 16, 16)
    assert (first != second).flatten(1).any(1).float().mean() > 0.9
    again = seen()
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)
    assert not torch.equal(seen(seed=1)[0], first)
    coloured = seen(colours=True)[0] - first
    # one shift for all pixels of a picture, and another for the next
    assert coloured.flatten(2).std(2).max() < 1e-5
    assert coloured[:, 0, 0, 0].std() > 0.01
    assert seen(amp="bf16")[0].dtype == torch.bfloat16


def test_micro_batches_draw_different_dropout(tmp_path):
    drawn = []

    forward = AlexNet.forward

    def recording(self, input):
        if self.training:
            drawn.append(torch.rand(1).item())
        return forward(self, input)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlexNet, "forward", recording)
        run(tmp_path, changed(epochs=2), accumulate=2)
    assert len(set(drawn)) == len(drawn) == 2 * 4 * 2
    seeds = {
        loop.seed_of(seed, "step", step, micro_batch) & 0xFFFFFFFF
        for seed in (0, 1)
        for step in (0, 1, 2**20)
        for micro_batch in (0, 1)
    }
    assert len(seeds) == 12  # the low half, which is all that PyTorch's CPU generator looks at


def test_every_picture_once_an_epoch(tmp_path):
    seen = []

    class Recording(Pictures):
        def batches(self, split, indices):
            if split == "train":
                seen.append([chosen.tolist() for chosen in indices])
            return super().batches(split, indices)

    run(tmp_path, changed(epochs=2), data=Recording())
    first, second = ([i for batch in epoch for i in batch] for epoch in seen)
    assert sorted(first) == sorted(second) == list(range(70))
    assert first != second
    assert [len(batch) for batch in seen[0]] == [20, 20, 20, 10]
    seen.clear()
    run(tmp_path, changed(epochs=1, drop_last=True), data=Recording())
    assert [len(batch) for batch in seen[0]] == [20, 20, 20]


def test_another_seed_gives_other_weights(finished, tmp_path):
    other, _ = run(tmp_path, changed(seed=1))
    assert not torch.equal(other.state_dict()["features.0.weight"], finished[1].state_dict()["features.0.weight"])


def test_label_smoothing_is_trained_and_not_reported(tmp_path):
    (plain, before), (smooth, after) = (
        run(tmp_path / str(share), changed(epochs=1, batch_size=70, label_smoothing=share)) for share in (0.0, 0.5)
    )
    assert before[0]["train_loss"] == after[0]["train_loss"]  # of one step: the same weights, the same dropout
    assert not torch.equal(plain.classifier[6].bias, smooth.classifier[6].bias)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_learns_as_well(tmp_path, amp):
    _, history = run(tmp_path, changed(epochs=20, amp=amp))
    assert history[-1]["top1"] > 0.9


def test_lars_learns(tmp_path):
    recipe = changed(epochs=20, trust=0.02, lr=2.0, schedule="cosine", warmup_epochs=2, drop_last=True)
    _, history = run(tmp_path, recipe)
    assert history[-1]["top1"] > 0.9


@pytest.mark.slow
def test_compiled_training_computes_the_same(tmp_path):
    recipe = changed(dropout=0.0)
    plain, _ = run(tmp_path / "plain", recipe)
    compiled, _ = run(tmp_path / "compiled", recipe, compile=True)
    for first, second in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_options_are_checked(tmp_path):
    for name, value in (("accumulate", 0), ("save_steps", 0), ("save_minutes", -1.0)):
        with pytest.raises(ValueError, match=name):
            Options(**{name: value})
    with pytest.raises(ValueError, match=r"batch_size must be at least .* 21, got 20"):
        run(tmp_path, accumulate=21)


def test_metrics_say_how_the_time_went(finished):
    for line in finished[2]:
        assert line["images_per_second"] == pytest.approx(70 / line["seconds"])
        assert 0 < line["data_wait"] < 1
        assert line["peak_memory_bytes"] > 1e8  # PyTorch alone takes more


def test_waiting_for_pictures_is_counted(tmp_path):
    class Slow(Pictures):
        def batches(self, split, indices):
            for batch in super().batches(split, indices):
                time.sleep(0.3 if split == "train" else 0)
                yield batch

    _, history = run(tmp_path, changed(epochs=1), data=Slow())
    assert history[0]["data_wait"] > 0.5


def test_tensorboard(tmp_path, monkeypatch):
    """With a writer of its own, because the real one is an extra; and what is said where that is missing."""
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, epoch):
            written.append((name, epoch))

        def flush(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(tmp_path, changed(epochs=2), tensorboard=True)
    assert written[0] == (str(tmp_path / "tensorboard"), 1)
    assert {("train_loss", 1), ("top1", 2), ("data_wait", 2)} <= set(written)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'fastalex\[tensorboard\]'"):
        run(tmp_path, tensorboard=True)


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
    """The kernel refuses to write past 5 kB, as a full disk would; the message names the file and the reason."""
    resource = pytest.importorskip("resource")
    model, card = checkpoint.load_model(finished[0] / MODEL)
    (tmp_path / MODEL).write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
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
    for recipe in RECIPES.values():
        looks = FashionMNIST.preprocessing_for(recipe.variant.in_channels, 64)
        card = checkpoint.ModelCard(recipe.variant, ("a", "b"), looks, recipe.dropout)
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
