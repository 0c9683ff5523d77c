"""Training runs of milliseconds: a network with every kind of layer, on pictures of 20x20 made from noise."""

from dataclasses import replace

import torch

from fastalex import AlexNet
from fastalex.data.image_sets import epoch_generator
from fastalex.data.preprocessing import Preprocessing
from fastalex.functional import ResponseNorm
from fastalex.training import loop
from fastalex.training.options import Options
from fastalex.training.progress import Callback
from fastalex.training.recipes import Recipe
from fastalex.variants import BatchNorm, Conv, Variant

TINY = Variant(
    "tiny",
    (
        Conv(8, 3, padding=1, norm=ResponseNorm(5, 5e-4, 0.75, 2.0), pool=3, std=0.2),
        Conv(8, 3, padding=1, groups=2, pool=3, std=0.2),
    ),
    crop=16,
    hidden=(16, 8),
    hidden_std=0.2,
    features_size=3,
)
BATCH_NORM = replace(TINY, convs=tuple(replace(conv, norm=BatchNorm(1e-4)) for conv in TINY.convs), pool_first=True)
RECIPE = Recipe(TINY, epochs=3, batch_size=20, lr=0.05, schedule="one-cycle", dropout=0.2)


class Stop(Exception):
    """A crash."""


class StopAfter(Callback):
    """Leaves the run after so many steps, as if it had crashed."""

    def __init__(self, steps):
        self.left = steps

    def batch_done(self, images):
        self.left -= 1
        if self.left == 0:
            raise Stop


class Pictures:
    """Four classes, each with a colour of its own under the noise; 70 pictures for training, 30 for testing."""

    classes = ("a", "b", "c", "d")
    preprocessing = Preprocessing(3, 20, 16, (0.5,) * 3, (0.25,) * 3)

    def __init__(self, train=70):
        self.counts = {"train": train, "test": 30}
        generator = torch.Generator().manual_seed(1)
        self.sets = {}
        for split, count in self.counts.items():
            labels = torch.arange(count) % 4
            colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200], [130, 130, 130]])[labels]
            noise = torch.randint(-55, 56, (count, 3, 20, 20), generator=generator)
            self.sets[split] = (colours[:, :, None, None] + noise).to(torch.uint8), labels

    def count(self, split):
        return self.counts[split]

    def order(self, split, seed, epoch):
        return torch.randperm(self.count(split), generator=epoch_generator(seed, epoch))

    def batches(self, split, indices):
        images, labels = self.sets[split]
        for chosen in indices:
            yield images[chosen], labels[chosen]


class Wide(AlexNet):
    """In float64, where rounding is out of the way of a comparison."""

    def forward(self, input):
        return super().forward(input.double())


def run(folder, recipe=RECIPE, *, data=None, wide=False, device="cpu", **options):
    """(model, lines of metrics.jsonl) of a run; `options` are those of `loop.train` and of `Options`."""
    mine = {name: options.pop(name) for name in ("resume", "callback") if name in options}
    data = data or Pictures()
    torch.manual_seed(recipe.seed)
    model = (Wide if wide else AlexNet)(len(data.classes), recipe.dropout, variant=recipe.variant)
    model = (model.double() if wide else model).to(device)
    return model, loop.train(model, data, recipe, folder, options=Options(**options), **mine)


def without_timings(history):
    timings = {"seconds", "images_per_second", "data_wait", "peak_memory_bytes"}
    return [{name: value for name, value in line.items() if name not in timings} for line in history]


def changed(**changes):
    return replace(RECIPE, **changes)
