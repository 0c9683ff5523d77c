"""A step as one graph computes what the plain loop computes, bit for bit: on a stand-in, and on a GPU where one is."""

from dataclasses import replace

import pytest
import recorded_graphs
import torch
from small_runs import BATCH_NORM, Pictures, Stop, StopAfter, changed, run, without_timings

from fastalex.data.image_sets import FashionMNIST
from fastalex.data.preprocessing import Colours
from fastalex.training import graphs, loop
from fastalex.training.options import Options
from fastalex.training.recipes import demo_variant

GRAPHED = {"drop_last": True, "cuda_graphs": True, "colours": True}


class Coloured(Pictures):
    colours = Colours((0.1, 0.02, 0.01), ((0.6, 0.8, 0.0), (-0.8, 0.6, 0.0), (0.0, 0.0, 1.0)))


@pytest.fixture
def stand_in(monkeypatch):
    """Graphs on the CPU; the list of those that were captured."""
    monkeypatch.setattr(loop, "is_one_graph", lambda *about: True)
    return recorded_graphs.install(monkeypatch)


@pytest.fixture
def plain_loop(monkeypatch):
    """A function that runs the same step without a capture."""

    def plain(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "Replayed", lambda function: function)
            return run(*args, **options)

    return plain


def same(first, second):
    for (name, weight), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


STEPS = {
    "off": {},
    "bf16": {"amp": "bf16", "label_smoothing": 0.1, "schedule": "step", "step_epochs": 1, "lr_in_velocity": True},
    "batch norm": {"variant": BATCH_NORM},
    "fp16": {"amp": "fp16", "schedule": "cosine", "warmup_epochs": 1},
}


def in_seconds(cases, kept):
    """The cases, slow but for one."""
    return [pytest.param(*case, marks=() if case == kept else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("amp", "keep"), in_seconds([(a, k) for a in STEPS for k in ("in-memory", "nothing")], ("bf16", "in-memory"))
)
def test_a_replayed_step_is_the_step(tmp_path, stand_in, plain_loop, amp, keep):
    """Its learning rate, crops, colours and dropout change from step to step, as the plain loop's do."""
    recipe = changed(**GRAPHED, **STEPS[amp])
    model, history = run(tmp_path / "graph", recipe, data=Coloured(), keep=keep)
    [graph] = stand_in
    assert graph.replays == 3 * 3 - graphs.WARM_UP
    other, expected = plain_loop(tmp_path / "plain", recipe, data=Coloured(), keep=keep)
    same(model, other)
    assert without_timings(history) == without_timings(expected)


@pytest.mark.slow
def test_pictures_of_one_channel(tmp_path, stand_in, plain_loop):
    """Their crops and mirror images are drawn by PyTorch's generators, within the graph."""
    looks = FashionMNIST.preprocessing_for(1, 64)
    recipe = changed(variant=replace(demo_variant(1), hidden=(8, 8)), batch_size=4, epochs=1, **GRAPHED)

    class Few(FashionMNIST):
        def count(self, split):
            return 24

    model, _ = run(tmp_path / "graph", recipe, data=Few(looks))
    assert stand_in[0].replays == 6 - graphs.WARM_UP
    same(model, plain_loop(tmp_path / "plain", recipe, data=Few(looks))[0])


@pytest.mark.parametrize("steps", in_seconds([(2,), (4,), (7,)], (4,)))
def test_killed_and_resumed(tmp_path, stand_in, steps):
    """Before, at and after the capture; the run that goes on captures anew, or not at all."""
    recipe = changed(**GRAPHED)
    whole, history = run(tmp_path / "whole", recipe, data=Coloured(), keep="in-memory")
    with pytest.raises(Stop):
        run(tmp_path / "killed", recipe, data=Coloured(), keep="in-memory", save_steps=1, callback=StopAfter(steps + 1))
    resumed, again = run(tmp_path / "killed", recipe, data=Coloured(), keep="in-memory", resume=True)
    same(whole, resumed)
    assert without_timings(history) == without_timings(again)


def test_the_stand_in_notices_what_a_capture_refuses(tmp_path, stand_in, monkeypatch):
    update = loop.Run.update
    monkeypatch.setattr(loop.Run, "update", lambda self, *a: (update(self, *a), self.state.loss.item()))
    with pytest.raises(RuntimeError, match="not permitted when a stream is capturing"):
        run(tmp_path, changed(**GRAPHED), data=Coloured(), keep="in-memory")


@pytest.mark.parametrize("sin", in_seconds([("lr",), ("seed",), ("indices",)], ("lr",)))
def test_the_comparison_notices_what_stays_behind_in_a_graph(tmp_path, stand_in, plain_loop, monkeypatch, sin):
    """A number of the host's where one of the device's should be."""
    recipe = changed(**GRAPHED, dropout=0.0)
    other, _ = plain_loop(tmp_path / "plain", recipe, data=Coloured(), keep="in-memory")
    if sin == "lr":
        monkeypatch.setattr(loop, "lr_on_device", lambda *about: None)
    elif sin == "seed":
        augment = loop.augment
        monkeypatch.setattr(loop, "augment", lambda images, i, seed, *a, **o: augment(images, i, int(seed), *a, **o))
    else:
        call = graphs.Replayed.__call__

        def baked(self, *inputs):
            self._inputs = inputs
            call(self, *inputs)
            self._calls = max(self._calls, 1)

        monkeypatch.setattr(graphs.Replayed, "__call__", baked)
    try:
        model, _ = run(tmp_path / "graph", recipe, data=Coloured(), keep="in-memory")
    except RuntimeError as error:
        if sin != "seed" or "not permitted" not in str(error):
            raise
        return
    with pytest.raises(AssertionError):
        same(model, other)


def test_when_a_step_is_one_graph():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    recipe = changed(**GRAPHED)
    assert graphs.is_one_graph(recipe, Options(), cuda)
    assert not graphs.is_one_graph(recipe, Options(), cpu)
    assert not graphs.is_one_graph(recipe, Options(accumulate=2), cuda)
    assert not graphs.is_one_graph(recipe, Options(compile=True), cuda)
    assert not graphs.is_one_graph(changed(), Options(), cuda)


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures on a GPU")
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_on_a_gpu(tmp_path, plain_loop, amp, monkeypatch):
    """Bit for bit, and between the first steps and the end of an epoch nothing waits for the device."""
    recipe = changed(**GRAPHED, amp=amp, epochs=4)
    torch.use_deterministic_algorithms(True)
    step = loop.Run.take_step

    def watched(self, *about):
        torch.cuda.set_sync_debug_mode("error" if self.state.step > graphs.WARM_UP else "default")
        try:
            step(self, *about)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Run, "take_step", watched)
    try:
        model, history = run(tmp_path / "graph", recipe, data=Coloured(), keep="on-device", device="cuda")
        other, expected = plain_loop(tmp_path / "plain", recipe, data=Coloured(), keep="on-device", device="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    same(model, other)
    assert without_timings(history) == without_timings(expected)
