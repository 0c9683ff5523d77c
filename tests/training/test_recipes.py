"""Recipes: their rates over time, and their update rules against the formulas of the papers, written out."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small_runs import RECIPE, TINY
from torch.optim.lr_scheduler import OneCycleLR

from fastalex.training.optimizer import lr_at, make_optimizer, plateaus, set_lr
from fastalex.training.recipes import RECIPES, Recipe


def rates(recipe, steps_per_epoch, errors=()):
    return [lr_at(recipe, step, steps_per_epoch, errors) for step in range(recipe.epochs * steps_per_epoch)]


def test_one_cycle_is_pytorchs():
    recipe = replace(RECIPE, epochs=7, schedule="one-cycle", lr=0.3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], recipe.lr)
    schedule = OneCycleLR(optimizer, recipe.lr, total_steps=7 * 9, pct_start=0.25, cycle_momentum=False)
    expected = []
    for _ in range(7 * 9):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 7 * 9:
            schedule.step()
    assert rates(recipe, 9) == pytest.approx(expected, rel=1e-9)
    assert rates(replace(recipe, epochs=1), 4)[0] == 0.3  # too few steps to rise


def test_caffe_divides_every_100_000_steps():
    """1,281,167 pictures of ImageNet in batches of 256: solver.prototxt's stepsize and max_iter, within an epoch."""
    recipe = RECIPES["caffe"]
    per_epoch = recipe.steps_per_epoch(1_281_167)
    changes = [
        s for s in range(1, recipe.epochs * per_epoch) if lr_at(recipe, s, per_epoch) != lr_at(recipe, s - 1, per_epoch)
    ]
    assert changes == pytest.approx([100_000, 200_000, 300_000, 400_000], abs=per_epoch)
    assert recipe.epochs * per_epoch == pytest.approx(450_000, abs=per_epoch)
    assert lr_at(recipe, changes[-1], per_epoch) == pytest.approx(1e-6)


def test_cosine_after_warm_up():
    recipe = replace(RECIPE, epochs=10, schedule="cosine", warmup_epochs=2, lr=1.0)
    found = rates(recipe, 5)
    assert found[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert found[10] == 1.0
    assert found[10 + 20] == pytest.approx(0.5)  # half way
    assert all(before > after for before, after in pairwise(found[10:]))
    assert found[-1] < 0.01


def test_plateaus():
    assert plateaus([], 2) == 0
    assert plateaus([0.5, 0.4, 0.4, 0.4], 2) == 0
    assert plateaus([0.5, 0.4, 0.4, 0.4, 0.41], 2) == 1
    assert plateaus([0.4] * 4, 2) == 1
    assert plateaus([0.4] * 7, 2) == 2  # the waiting starts again
    assert plateaus([0.4] * 6 + [0.3, 0.3, 0.3], 2) == 1
    assert plateaus([0.4] * 100, 2) == 3  # three times at most
    recipe = replace(RECIPES["paper"], patience=2)
    assert lr_at(recipe, 0, 100, [0.4] * 7) == pytest.approx(recipe.lr / 100)


def test_every_recipe_names_the_published_numbers():
    expected = {
        "paper": ("paper", 128, 0.01, 0.9, 5e-4, 0.5),
        "caffe": ("bvlc_alexnet", 256, 0.01, 0.9, 5e-4, 0.5),
        "torchvision": ("torchvision", 256, 0.01, 0.9, 1e-4, 0.5),
    }
    for name, numbers in expected.items():
        recipe = RECIPES[name]
        found = (
            recipe.variant.name,
            recipe.batch_size,
            recipe.lr,
            recipe.momentum,
            recipe.weight_decay,
            recipe.dropout,
        )
        assert found == numbers
        assert recipe.epochs == 90


def test_fast_is_the_8k_solver_of_you_et_al():
    """solver_8K.prototxt: base_lr 10, 15,600 steps for 100 epochs, lr (1 - share)^2 after the warm-up, momentum 0.9."""
    recipe = RECIPES["fast"]
    assert (recipe.variant.name, recipe.batch_size, recipe.trust, recipe.weight_decay) == ("bn", 8192, 0.001, 5e-4)
    per_epoch = recipe.steps_per_epoch(1_281_167)
    assert recipe.epochs * per_epoch == 15_600
    found = rates(recipe, per_epoch)
    warm = 5 * per_epoch
    assert found[:warm] == pytest.approx([10 * (i + 1) / warm for i in range(warm)])
    assert found[warm] == 10
    assert found[warm + (15_600 - warm) // 2] == pytest.approx(10 / 4, rel=1e-3)
    assert all(before > after for before, after in pairwise(found[warm:]))
    assert found[-1] < 1e-6


def two_layers():
    """A weight and a bias, twice; in float64."""
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).double()


def steps(model, recipe, rates):
    """The parameters after each step, the gradients being the same in every run."""
    optimizer = make_optimizer(model, recipe)
    for i, rate in enumerate(rates):
        for j, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(10 * i + j)
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        yield [p.grad.clone() for p in model.parameters()]
        set_lr(optimizer, rate, in_velocity=recipe.lr_in_velocity)
        optimizer.step()


@pytest.mark.parametrize("name", ["paper", "caffe"])
def test_momentum_with_the_rate_inside_the_velocity(name):
    """v = 0.9 v - 0.0005 lr w - lr g, w = w + v (2012, section 5), also across changes of the rate."""
    recipe, model = RECIPES[name], two_layers()
    weights = [p.detach().clone() for p in model.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    schedule = [0.01, 0.01, 0.001, 0.001, 0.0001]
    for rate, gradients in zip(schedule, steps(model, recipe, schedule), strict=True):
        for w, v, g in zip(weights, velocities, gradients, strict=True):
            bias = w.dim() == 1
            own = rate * (recipe.bias_lr if bias else 1)
            decay = 0 if bias and not recipe.bias_decay else 0.0005
            v.mul_(0.9).sub_(decay * own * w).sub_(own * g)
            w.add_(v)
    for found, wanted in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-14)


def test_lars():
    """Each layer's gradient and decay times trust |w| / (|g| + wd |w|), then momentum (You et al. 2017)."""
    recipe, model = replace(RECIPES["fast"], trust=0.02), two_layers()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()  # no norm: plain SGD
    weights = [p.detach().clone() for p in model.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    for i, gradients in enumerate(steps(model, recipe, [0.5, 0.5, 0.25])):
        rate = [0.5, 0.5, 0.25][i]
        for at in (0, 2):
            size = torch.cat([w.flatten() for w in weights[at : at + 2]]).norm()
            gradient_size = torch.cat([g.flatten() for g in gradients[at : at + 2]]).norm()
            factor = 0.02 * size / (gradient_size + 5e-4 * size) if size > 0 else 1.0
            for w, v, g, decay in zip(
                weights[at : at + 2], velocities[at : at + 2], gradients[at : at + 2], (5e-4, 0), strict=True
            ):
                v.mul_(0.9).add_(factor * (g + decay * w))
                w.sub_(rate * v)
    for found, wanted in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("dropout", -0.1),
        ("label_smoothing", 1.0),
        ("weight_decay", -1.0),
        ("warmup_epochs", 99.0),
        ("cuda_graphs", True),
    ],
)
def test_senseless_recipes_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        replace(RECIPE, **{field: value})


def test_steps_of_an_epoch():
    assert Recipe(TINY, 1, 20, 0.1, "step").steps_per_epoch(70) == 4
    assert Recipe(TINY, 1, 20, 0.1, "step", drop_last=True).steps_per_epoch(70) == 3
    with pytest.raises(ValueError, match="batch_size must be at most the number of training pictures, 70, got 71"):
        Recipe(TINY, 1, 71, 0.1, "step", drop_last=True).steps_per_epoch(70)
