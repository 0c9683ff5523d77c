"""Training recipes, as data."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

from fastalex.alexnet import PAPER, Conv, Variant
from fastalex.functional import ResponseNorm


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: SGD with momentum, and a learning rate that follows `schedule`.

    "one-cycle" rises to `lr` over the first quarter of all steps and falls to almost nothing (Smith and Topin 2017);
    "plateau" divides it by 10 when the test loss has not improved for `patience` epochs (the 2012 paper, where the
    authors did so by hand).
    """

    variant: Variant
    epochs: int
    batch_size: int
    lr: float
    schedule: Literal["one-cycle", "plateau"]
    momentum: float = 0.9
    weight_decay: float = 5e-4
    dropout: float = 0.5
    patience: int = 5
    seed: int = 0


def _he_std(inputs: int, kernel_size: int = 1) -> float:
    """The standard deviation that keeps the size of activations through ReLU layers (He et al. 2015, section 2.2)."""
    return sqrt(2 / (inputs * kernel_size**2))


def demo_variant(channels: int = 1) -> Variant:
    """All stages of the paper's network, for 64x64 images and two CPU cores: a third of the channels, 256 hidden units.

    The first convolution has stride 3, because the paper's 4 would leave 15x15 of such an image.  The paper's
    N(0, 0.01) needs the paper's widths: here deviations are He's, but smaller in the first layer, whose filters show
    what they learnt more clearly then.
    """
    norm = ResponseNorm(5, 5e-4, 0.75, 2.0)
    return Variant(
        "demo",
        (
            Conv(32, 11, stride=3, padding=4, norm=norm, pool=3, std=0.05),
            Conv(96, 5, padding=2, groups=2, norm=norm, pool=3, std=_he_std(16, 5)),
            Conv(128, 3, padding=1, std=_he_std(96, 3)),
            Conv(96, 3, padding=1, groups=2, std=_he_std(64, 3)),
            Conv(96, 3, padding=1, groups=2, pool=3, std=_he_std(48, 3)),
        ),
        crop=64,
        in_channels=channels,
        hidden=(256, 256),
        hidden_std=_he_std(256),
        features_size=1,
    )


# Krizhevsky et al. 2012, section 5: about 90 epochs, the rate divided three times.
PAPER_RECIPE = Recipe(PAPER, epochs=90, batch_size=128, lr=0.01, schedule="plateau")
DEMO_RECIPE = Recipe(demo_variant(), epochs=24, batch_size=50, lr=0.025, schedule="one-cycle", dropout=0.3)
