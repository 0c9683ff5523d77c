"""Dead networks are noticed and stopped; those that learn, or wait on a plateau, are left alone."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small_runs import RECIPE, TINY, changed, run

pytest.importorskip("safetensors")

from fastalex import AlexNet
from fastalex.training.health import FEWEST_ALIVE, LEAST_SPREAD, DeadNetwork, Health, Watch, check_health
from fastalex.training.progress import METRICS


def test_what_is_seen_is_what_the_layers_return():
    """Over several batches, against the definitions, written out; a unit counts that answers a single picture."""
    model = AlexNet(4, variant=TINY).eval()
    with torch.no_grad():
        model.classifier[1].bias[:5] = -100.0
        model.classifier[4].bias[:3] = -100.0
    images = torch.randn(30, 3, 16, 16)
    with Watch(model) as watch:
        logits = torch.cat([model(batch) for batch in images.split(7)])
    model(images * 100)  # outside of the block
    hidden = torch.flatten(model.features(images), 1)
    alive = []
    for layer in (model.classifier[1], model.classifier[4]):
        hidden = torch.relu(hidden @ layer.weight.T + layer.bias)
        alive.append(sum(bool((unit > 0).any()) for unit in hidden.T) / hidden.shape[1])
    assert alive[0] <= 11 / 16
    spread = (logits.amax(0) - logits.amin(0)).mean().item()
    assert watch.health() == pytest.approx((*alive, spread), rel=1e-6)


def line(epoch, health):
    return {"epoch": epoch, **health._asdict()}


def test_a_network_is_given_up_when_it_is_dead_twice_in_a_row():
    dead, alive = Health(0.5, 0.01, 1e-4), Health(0.9, 0.8, 2.0)
    plateau, sparse = Health(0.9, 0.8, 1e-4), Health(0.5, 0.01, 2.0)
    for history in ([dead], [alive, dead], [dead, alive], [dead, alive, dead], [plateau] * 9, [sparse] * 9):
        check_health([line(i + 1, health) for i, health in enumerate(history)], RECIPE)
    with pytest.raises(DeadNetwork, match=r"dead since epoch 2: 50\.0% of fc6's units and 1\.0% of fc7's .* was 0\.05"):
        check_health([line(i + 1, health) for i, health in enumerate([alive, dead, dead])], RECIPE)


@pytest.mark.parametrize("layer", ["fc6", "fc7"])
def test_a_dead_network_ends_the_run(layer, tmp_path):
    """Its lines are written; a resumed run sees at its first epoch's end that nothing has changed."""
    generous = {"fc6": (16, 8), "fc7": (16, 8)}[layer]
    variant = replace(TINY, hidden=generous, hidden_bias=-50.0)
    with pytest.raises(DeadNetwork, match="dead since epoch 1"):
        run(tmp_path, changed(variant=variant, epochs=9))
    lines = [json.loads(text) for text in (tmp_path / METRICS).read_text().splitlines()]
    assert [entry["epoch"] for entry in lines] == [1, 2]
    assert all(entry["fc6_alive"] == entry["fc7_alive"] == 0 for entry in lines)
    with pytest.raises(DeadNetwork, match="dead since epoch 2"):
        run(tmp_path, changed(variant=variant, epochs=9), resume=True)


def test_too_large_a_rate_kills_and_is_noticed(tmp_path):
    """As it happens: finite losses, and then constants."""
    with pytest.raises(DeadNetwork):
        run(tmp_path, changed(epochs=60, schedule="step", lr=3.0))
    lines = [json.loads(text) for text in (tmp_path / METRICS).read_text().splitlines()]
    assert len(lines) < 60
    assert lines[-1]["logit_spread"] < LEAST_SPREAD


def test_runs_that_learn_or_wait_are_not_stopped(tmp_path):
    _, learning = run(tmp_path / "learning", changed(epochs=20))
    assert learning[-1]["top1"] == 1
    assert min(min(entry["fc6_alive"], entry["fc7_alive"]) for entry in learning) > FEWEST_ALIVE
    assert learning[-1]["logit_spread"] > 1
    # every unit answers, all alike: the plateau on which large networks begin
    flat = replace(TINY, hidden_std=1e-4, hidden_bias=1.0)
    _, waiting = run(tmp_path / "waiting", changed(variant=flat, epochs=4, lr=1e-6))
    assert max(entry["logit_spread"] for entry in waiting) < LEAST_SPREAD


def test_the_recipe_of_2012_is_too_fast_for_few_classes():
    """The cause of its death on few classes, computed: the curvature of the loss along the last layer's weights.

    Hidden biases of 1 make fc7 the same large vector h for all pictures.  Momentum SGD diverges where the rate is over
    2 (1 + 0.9) / curvature, which is |h|^2 p (1 - p) and so largest for few classes.
    """
    from fastalex.training.recipes import PAPER_RECIPE
    from fastalex.variants import PAPER

    generator = torch.Generator().manual_seed(0)
    sizes = (9216, *PAPER.hidden)
    hidden = torch.ones(sizes[0])  # what conv5 gives is of this order, with its bias of 1
    for inputs, outputs in pairwise(sizes):
        weight = torch.randn(outputs, inputs, generator=generator) * PAPER.hidden_std
        kept = torch.rand(outputs, generator=generator) < 0.5
        hidden = torch.relu(weight @ hidden + PAPER.hidden_bias) * kept * 2

    def limit(classes):
        return 2 * (1 + PAPER_RECIPE.momentum) / (hidden.square().sum().item() * (1 - 1 / classes) / classes)

    assert limit(6) < PAPER_RECIPE.lr < limit(1000)
