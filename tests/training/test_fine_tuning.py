"""Training that starts from weights: which layers are new, which learn and how fast, and that it resumes."""

from dataclasses import replace

import pytest
import torch
from small_runs import BATCH_NORM, RECIPE, TINY, Pictures, Stop, StopAfter, changed, without_timings

pytest.importorskip("safetensors")

from fastalex import AlexNet
from fastalex.checkpoint import MODEL, STATE, ModelCard, save_model
from fastalex.data.preprocessing import Preprocessing
from fastalex.training import loop
from fastalex.training.optimizer import make_optimizer
from fastalex.training.options import Options
from fastalex.training.prepare import build_model, load_initial, prepare
from fastalex.variants import VARIANTS

LOOKS = Preprocessing(3, 20, 16, (0.4,) * 3, (0.3,) * 3)
HEAD = "classifier.6."


class Others(Pictures):
    """The same pictures, with five classes of other names, the last of them without pictures."""

    classes = ("v", "w", "x", "y", "z")


@pytest.fixture
def before(tmp_path):
    """The folder of a run with four classes, and its weights."""
    torch.manual_seed(7)
    model = AlexNet(4, variant=TINY)
    (tmp_path / "before").mkdir()
    save_model(tmp_path / "before" / MODEL, model, ModelCard(TINY, Pictures.classes, LOOKS))
    return tmp_path / "before", model.state_dict()


def tuned(folder, initial, *, resume=False, callback=None, save_steps=None, **recipe):
    recipe = changed(backbone_lr=0.1, **recipe)
    model = build_model(recipe, Others.classes, "cpu", initial)
    options = Options(save_steps=save_steps)
    return model, loop.train(model, Others(), recipe, folder, options=options, resume=resume, callback=callback)


def test_the_last_layer_is_new_for_other_classes(before):
    folder, weights = before
    for source in (folder, folder / MODEL):
        initial = load_initial(str(source))
        assert (initial.variant, initial.preprocessing, initial.classes) == (TINY, LOOKS, Pictures.classes)
        other, same = (build_model(RECIPE, c, "cpu", initial).state_dict() for c in (Others.classes, Pictures.classes))
        assert other[HEAD + "weight"].shape == (5, 8)
        assert other[HEAD + "weight"].std() == pytest.approx(0.01, rel=0.5)
        for name, tensor in weights.items():
            assert torch.equal(same[name], tensor), name
            assert name.startswith(HEAD) or torch.equal(other[name], tensor), name
    # as many, but others
    renamed = build_model(RECIPE, ("e", "f", "g", "h"), "cpu", load_initial(str(folder))).state_dict()
    assert not torch.equal(renamed[HEAD + "weight"], weights[HEAD + "weight"])


def test_weights_of_other_programs_name_no_classes(monkeypatch, tmp_path):
    """There the number decides, and the usual preprocessing applies."""
    twin = replace(TINY, name="caffenet", crop=227)
    monkeypatch.setitem(VARIANTS, "caffenet", twin)
    model = AlexNet(5, variant=twin)
    torch.save({"state_dict": model.state_dict(), "variant": "caffenet"}, tmp_path / "x.pth")
    initial = load_initial(str(tmp_path / "x.pth"))
    assert (initial.variant, initial.classes) == (twin, None)
    assert initial.preprocessing == Preprocessing.for_photos(3, 227)
    kept = build_model(replace(RECIPE, variant=twin), Others.classes, "cpu", initial).state_dict()
    assert torch.equal(kept[HEAD + "weight"], model.state_dict()[HEAD + "weight"])
    with pytest.raises(FileNotFoundError, match=r"existing file, got .*nowhere"):
        load_initial("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"got .*empty/model\.safetensors"):
        load_initial(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("freeze", "frozen"), [("features", ("features.",)), ("backbone", ("features.", "classifier."))]
)
def test_what_is_frozen_neither_learns_nor_costs(freeze, frozen, before, tmp_path):
    folder, weights = before
    model, _ = tuned(tmp_path, load_initial(str(folder)), freeze=freeze, epochs=1)
    velocity = torch.load(tmp_path / STATE)["velocity"]
    for name, parameter in model.named_parameters():
        still = name.startswith(frozen) and not name.startswith(HEAD)
        assert parameter.requires_grad != still
        assert (parameter.grad is None) == still
        assert (name in velocity) != still
        assert (name in weights and torch.equal(parameter, weights[name])) == still, name


def test_statistics_of_frozen_layers_stay(tmp_path):
    model = AlexNet(4, variant=BATCH_NORM)
    save_model(tmp_path / MODEL, model, ModelCard(BATCH_NORM, Pictures.classes, LOOKS))
    for freeze in ("features", "nothing"):
        initial = load_initial(str(tmp_path))
        learnt, _ = tuned(tmp_path / freeze, initial, variant=BATCH_NORM, freeze=freeze, epochs=1)
        before, after = (dict(m.named_buffers()) for m in (model, learnt))
        assert all(torch.equal(before[name], after[name]) == (freeze == "features") for name in before)


def test_two_rates():
    """And the biases' own beside them; LARS leaves out what is frozen."""
    recipe = changed(backbone_lr=0.1, bias_lr=2.0)
    model = build_model(recipe, Others.classes, "cpu")
    groups = make_optimizer(model, recipe).param_groups
    rates = {id(p): group["relative_lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        own = 2.0 if name.endswith("bias") else 1.0
        assert rates[id(parameter)] == pytest.approx(own * (1.0 if name.startswith(HEAD) else 0.1)), name
    assert len(rates) == len(list(model.parameters()))
    assert len(groups) == 4
    assert len(make_optimizer(model, changed()).param_groups) == 2  # each is a launch of its own
    lars = changed(trust=0.01, freeze="backbone")
    assert make_optimizer(build_model(lars, Others.classes, "cpu"), lars).layers[0][0].shape == (5, 8)


@pytest.mark.parametrize("freeze", ["nothing", "features"])
def test_a_resumed_run_ends_with_the_same_bits(freeze, before, tmp_path):
    """The weights that it started from are not needed again."""
    initial = load_initial(str(before[0]))
    whole, history = tuned(tmp_path / "whole", initial, freeze=freeze)
    with pytest.raises(Stop):
        tuned(tmp_path / "stopped", initial, freeze=freeze, save_steps=1, callback=StopAfter(6))
    resumed, resumed_history = tuned(tmp_path / "stopped", None, freeze=freeze, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert without_timings(history) == without_timings(resumed_history)


def test_frozen_layers_and_hybrid_parallelism_exclude_each_other(monkeypatch):
    monkeypatch.setattr("fastalex.distributed.size", lambda: 2)
    recipe = changed(freeze="features")
    with pytest.raises(ValueError, match="parallel must be data with freeze features, got hybrid"):
        prepare(AlexNet(4, variant=TINY), LOOKS, recipe, Options(parallel="hybrid"), torch.device("cpu"))


def test_it_beats_starting_anew(tmp_path):
    """After two epochs on pictures of other classes: those of the colours that the first run told apart, renamed."""
    first = tmp_path / "first"
    loop.train(build_model(changed(epochs=20), Pictures.classes, "cpu"), Pictures(), changed(epochs=20), first)
    _, after = tuned(tmp_path / "tuned", load_initial(str(first)), epochs=2)
    _, anew = tuned(tmp_path / "anew", None, epochs=2)
    assert after[-1]["top1"] >= anew[-1]["top1"] + 0.2
    assert after[-1]["test_loss"] < anew[-1]["test_loss"]
