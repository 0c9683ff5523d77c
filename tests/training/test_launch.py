"""What `fastalex train` chooses for those who do not say: recipe, device, processes that read."""

import pytest
import torch

pytest.importorskip("rich")

from fastalex.training import launch, recipes
from fastalex.variants import VARIANTS


def chosen(name=None, variant=None, channels=1, **changes):
    return launch.choose_recipe(name, variant, channels=channels, changes=changes)


def test_the_recipe_follows_from_the_variant_and_the_other_way_round():
    assert chosen() == chosen(variant="demo") == recipes.DEMO_RECIPE
    assert chosen(channels=3).variant.in_channels == 3
    assert chosen(variant="caffenet") == chosen("paper", "caffenet")
    assert chosen(variant="caffenet").variant == VARIANTS["caffenet"]
    assert chosen("paper") == recipes.PAPER_RECIPE
    narrow = chosen("paper", "demo", channels=3)
    assert (narrow.variant.name, narrow.variant.in_channels) == ("demo", 3)
    assert narrow.batch_size == recipes.PAPER_RECIPE.batch_size


def test_what_is_not_given_stays_the_recipes():
    assert chosen("paper", lr=None, epochs=3).lr == recipes.PAPER_RECIPE.lr
    assert chosen("paper", lr=None, epochs=3).epochs == 3
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
    monkeypatch.setattr(launch, "open_images", lambda data, preprocessing, **options: opened.update(options))
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    launch.choose_data(None, recipes.DEMO_RECIPE, workers=asked, on_error="stop")
    assert opened["workers"] == asked
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    launch.choose_data(None, recipes.DEMO_RECIPE, workers=asked, on_error="stop")
    assert opened["workers"] == expected
