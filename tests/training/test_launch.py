"""What `fastalex train` chooses for those who do not say: recipe, device, processes that read."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")

from fastalex import AlexNet
from fastalex.alexnet import parameter_shapes
from fastalex.data.image_sets import FashionMNIST
from fastalex.data.preprocessing import Preprocessing
from fastalex.training import launch, recipes
from fastalex.training.prepare import Initial
from fastalex.variants import VARIANTS


def chosen(recipe=None, variant=None, *, own=None, initial=None, **changes):
    flags = {"recipe": recipe, "variant": variant, "init": "some.pth", **changes}
    return launch.choose_recipe(flags, own=own, initial=initial)


def test_the_recipe_follows_from_the_variant_and_the_other_way_round():
    assert chosen() == chosen(variant="demo") == ("demo", recipes.DEMO_RECIPE)
    assert chosen(variant="caffenet") == chosen("paper", "caffenet")
    assert chosen(variant="caffenet")[1].variant == VARIANTS["caffenet"]
    assert chosen("paper") == ("paper", recipes.PAPER_RECIPE)
    name, narrow = chosen("paper", "demo", own=(100, 6))
    assert (name, narrow.variant.name, narrow.variant.in_channels) == ("paper", "demo", 3)
    assert narrow.batch_size == recipes.PAPER_RECIPE.batch_size


def test_the_recipe_follows_from_the_size_of_ones_own_data():
    for own, epochs, batch_size in (
        ((114, 6), 100, 25),
        ((999, 6), 100, 25),
        ((3_000, 9), 40, 50),
        ((10**6, 9), 24, 50),
    ):
        name, recipe = chosen(own=own)
        assert (name, recipe.variant.name, recipe.variant.in_channels) == ("photos", "demo", 3)
        assert (recipe.epochs, recipe.batch_size) == (epochs, batch_size)
    assert chosen(own=(5_000, 10))[1].epochs == recipes.DEMO_RECIPE.epochs
    assert chosen(own=(1_281_167, 1000)) == ("paper", recipes.PAPER_RECIPE)
    assert chosen(own=(1_281_167, 1000), variant="demo")[0] == "photos"
    assert chosen(own=(114, 6), epochs=3, recipe="photos")[1].epochs == 3


def test_full_size_on_few_pictures_starts_with_weights_that_keep_signals():
    """The names and shapes are the variant's: only what is drawn at first is another."""
    for name in VARIANTS:
        chosen_name, recipe = chosen(own=(114, 6), variant=name)
        assert (chosen_name, recipe.lr, recipe.variant.name) == ("photos", 0.002, name)
        assert recipe.variant.hidden_bias == 0
        assert parameter_shapes(recipe.variant, 6) == parameter_shapes(VARIANTS[name], 6)
    model = AlexNet(6, 0.0, variant=replace(chosen(own=(114, 6), variant="paper")[1].variant, hidden=(512, 512)))
    sizes = []
    for layer in (*model.features, *model.classifier):
        layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.square().mean().item()))
    with torch.no_grad():
        model(torch.randn(4, 3, 224, 224))
    assert 0.1 < sizes[-2] / sizes[1] < 10


def test_a_model_to_start_from_brings_its_variant():
    initial = Initial({}, VARIANTS["caffenet"], Preprocessing.for_photos(3, 227), None)
    name, recipe = chosen(own=(114, 6), initial=initial)
    assert (name, recipe.variant, recipe.backbone_lr) == ("fine-tune", VARIANTS["caffenet"], 0.1)
    assert chosen("caffe", own=(114, 6), initial=initial)[1].variant == VARIANTS["caffenet"]
    narrow = initial._replace(variant=recipes.demo_variant(1))
    assert chosen(own=(114, 6), initial=narrow)[0] == "photos"
    assert chosen(own=(114, 6), initial=narrow)[1].variant.in_channels == 1
    assert chosen(initial=narrow)[0] == "demo"
    with pytest.raises(ValueError, match=r'weights some\.pth are of variant "caffenet", not "paper"'):
        chosen(variant="paper", initial=initial)
    assert launch.choose_looks(None, recipe, initial) is initial.preprocessing


def test_what_is_not_given_stays_the_recipes():
    assert chosen("paper", lr=None, epochs=3)[1].lr == recipes.PAPER_RECIPE.lr
    assert chosen("paper", lr=None, epochs=3)[1].epochs == 3
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        chosen(epochs=0)


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.choose_device(None) == torch.device("cuda")
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert launch.choose_device(None) == torch.device("cuda:1")
    assert launch.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("cores", "asked", "expected"), [(32, None, 4), (256, None, 8), (4, None, 1), (32, 0, 0)])
def test_the_processes_of_a_machine_share_its_cores(monkeypatch, cores, asked, expected):
    opened = {}

    def open_images(data, looks, **options):
        opened.update(options)
        return FashionMNIST(looks)

    monkeypatch.setattr(launch, "open_images", open_images)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    looks = launch.choose_looks(None, recipes.DEMO_RECIPE, None)
    launch.choose_data(None, looks, workers=asked, on_error="stop")
    assert opened["workers"] == asked
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    launch.choose_data(None, looks, workers=asked, on_error="stop")
    assert opened["workers"] == expected
