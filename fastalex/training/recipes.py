"""Training recipes, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import sqrt
from typing import Any, Literal

from fastalex import fields
from fastalex.functional import ResponseNorm
from fastalex.variants import BN, BVLC_ALEXNET, PAPER, TORCHVISION, Conv, Variant


@dataclass(frozen=True)
class Recipe:
    """What a model is trained with: SGD with momentum, and a learning rate that follows `schedule`.

    "plateau" divides the rate by 10 when the test error has not improved for `patience` epochs, three times at most
    (the 2012 paper, where the authors did so by hand); "step" divides it by 10 every `step_epochs`; "one-cycle" rises
    to `lr` over the first quarter of all steps and falls to almost nothing (Smith and Topin 2017); "cosine" falls to
    nothing along half a cosine, "poly" along a parabola (You et al. 2017).  Whatever the schedule, the first
    `warmup_epochs` rise to it linearly.

    batch_size: pictures per step, of all processes together.
    bias_lr, bias_decay: the rate of biases, relative to that of weights, and whether they decay.
    lr_in_velocity: v = m v + lr (g + wd w), w -= v, as the 2012 paper and Caffe write it, instead of PyTorch's
        v = m v + g + wd w, w -= lr v.  The two differ only in the first steps after the rate changes.
    trust: LARS's coefficient (You et al. 2017), which makes each layer's rate proportional to its weights' norm over
        its gradient's; None for the same rate everywhere.
    label_smoothing: share of the target that is spread over all classes; metrics tell the loss without it.
    colours: the 2012 paper's change of each picture's colours along the principal components of all pixels, for sets
        that know them (`fastalex pack`'s).
    freeze: layers that keep their weights: "features" are the convolutions, "backbone" is all but the last layer.
    backbone_lr: the rate of all layers but the last, relative to the last's.
    drop_last: leave out an epoch's last batch if it is not full.
    cuda_graphs: on a GPU, replay the forward and backward pass from a CUDA graph.  Needs `drop_last`.
    amp: automatic mixed precision: bf16, or fp16 with loss scaling.
    """

    variant: Variant
    epochs: int
    batch_size: int
    lr: float
    schedule: Literal["plateau", "step", "one-cycle", "cosine", "poly"]
    momentum: float = 0.9
    weight_decay: float = 5e-4
    dropout: float = 0.5
    patience: int = 5
    step_epochs: int = 30
    warmup_epochs: float = 0.0
    bias_lr: float = 1.0
    bias_decay: bool = True
    lr_in_velocity: bool = False
    freeze: Literal["nothing", "features", "backbone"] = "nothing"
    backbone_lr: float = 1.0
    trust: float | None = None
    label_smoothing: float = 0.0
    colours: bool = False
    drop_last: bool = False
    cuda_graphs: bool = False
    amp: Literal["off", "bf16", "fp16"] = "off"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "step_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be a positive number, got {self.lr}")
        for name in ("momentum", "dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        fields.one_of("freeze", self.freeze, "nothing", "features", "backbone")
        if not 0 < self.backbone_lr < float("inf"):
            raise ValueError(f"backbone_lr must be a positive number, got {self.backbone_lr}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs must be between 0 and epochs = {self.epochs}, got {self.warmup_epochs}")
        if self.cuda_graphs and not self.drop_last:
            raise ValueError("cuda_graphs needs drop_last: a graph takes batches of one size only")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that `dataclasses.asdict` took apart, also after a trip through JSON.

        Raises ValueError, naming the field, for one that is missing, unknown or wrong.
        """
        found = fields.complete("recipe", cls, values)
        try:
            return cls(**{**found, "variant": Variant.from_dict(found["variant"])})
        except TypeError as error:  # a text where a number belongs
            raise ValueError(f"recipe: {error}") from None

    def steps_per_epoch(self, pictures: int) -> int:
        """Raises ValueError for a set that is smaller than the only batches it may use."""
        steps = pictures // self.batch_size if self.drop_last else -(-pictures // self.batch_size)
        if steps == 0:
            raise ValueError(
                f"batch_size must be at most the number of training pictures, {pictures}, got {self.batch_size}"
            )
        return steps


def _he_std(inputs: int, kernel_size: int = 1) -> float:
    """The standard deviation that keeps the size of activations through ReLU layers (He et al. 2015, section 2.2)."""
    return sqrt(2 / (inputs * kernel_size**2))


def demo_variant(channels: int = 1) -> Variant:
    """All stages of the paper's network, for 64x64 images and two CPU cores: a third of the channels, 256 hidden units.

    The first convolution has stride 3, because the paper's 4 would leave 15x15 of such an image.  The paper's
    N(0, 0.01) needs the paper's widths: here deviations are He's, but smaller in the first layer, whose filters show
    what they learnt more clearly then; most of all for one channel, the sample's, whose enlarged pictures have no fine
    detail that would change the fine part of a random beginning.
    """
    norm = ResponseNorm(5, 5e-4, 0.75, 2.0)
    return Variant(
        "demo",
        (
            Conv(32, 11, stride=3, padding=4, norm=norm, pool=3, std=0.01 if channels == 1 else 0.05),
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


# label smoothing: 87.2 and 86.7 % of the test pictures with it, 85.0 and 85.6 % without, in two runs each
DEMO_RECIPE = Recipe(
    demo_variant(), epochs=24, batch_size=50, lr=0.025, schedule="one-cycle", dropout=0.3, label_smoothing=0.1
)

# Own pictures, as a rule few; see `sized`.
PHOTOS_RECIPE = replace(DEMO_RECIPE, variant=demo_variant(3))


# From so many pictures and classes on, own pictures take the network and the recipe of 2012 instead.
MANY_PICTURES, MANY_CLASSES = 100_000, 100


def sized(recipe: Recipe, pictures: int) -> Recipe:
    """The recipe "photos" for so many training pictures: small steps for small sets, and 120,000 pictures in all.

    At least 24 epochs and at most 100; from 5,000 pictures on it is the recipe "demo".  On 114 photographs of 6 classes
    (24 pieces each of 6 pictures that scikit-image ships, 30 held out), accuracy in two runs each: 0.63 and 0.53 with
    24 epochs of 50 a step at 0.025; 0.77 and 0.73 with 100 epochs of 25; 0.83 and 0.83 with those at 0.01.

    A network of full size gets He's initial weights without biases, whose signals do not fade, and the rate 0.002: its
    hidden layers are 16 times as wide, and the largest stable rate falls with that.
    """
    few = pictures < 1000
    recipe = replace(
        recipe,
        epochs=min(100, max(24, round(120_000 / max(1, pictures)))),
        batch_size=recipe.batch_size // 2 if few else recipe.batch_size,
        lr=0.01 if few else recipe.lr,
    )
    if recipe.variant.name == "demo":
        return recipe
    return replace(recipe, variant=_with_he_weights(recipe.variant), lr=0.002)


def _with_he_weights(variant: Variant) -> Variant:
    """The first layer's deviation stays: pictures are no sum of ReLUs."""
    inputs = [conv.channels // after.groups for conv, after in pairwise(variant.convs)]
    first, *others = variant.convs
    convs = [replace(c, std=_he_std(n, c.kernel_size), bias=0.0) for n, c in zip(inputs, others, strict=True)]
    hidden_std = _he_std(variant.hidden[0])
    return replace(variant, convs=(first, *convs), hidden_std=hidden_std, hidden_bias=0.0, init="normal")


# The two rates of Caffe's example of fine-tuning (models/finetune_flickr_style): 0.001, and 10 times that for the new
# layer.
FINE_TUNE_RECIPE = Recipe(TORCHVISION, epochs=20, batch_size=32, lr=0.01, schedule="cosine", backbone_lr=0.1)

# Krizhevsky et al. 2012, section 5: about 90 epochs, the rate divided three times.
PAPER_RECIPE = Recipe(PAPER, epochs=90, batch_size=128, lr=0.01, schedule="plateau", lr_in_velocity=True, colours=True)

# BVLC/caffe, models/bvlc_alexnet/{solver,train_val}.prototxt: 450,000 steps of 256 pictures, the rate divided every
# 100,000; biases with twice the rate and no decay.
CAFFE_RECIPE = Recipe(
    BVLC_ALEXNET,
    epochs=90,
    batch_size=256,
    lr=0.01,
    schedule="step",
    step_epochs=20,
    bias_lr=2.0,
    bias_decay=False,
    lr_in_velocity=True,
)

# pytorch/vision, references/classification: 8 processes with 32 pictures each.  Its crops have random sizes and
# shapes, which this recipe leaves out.
TORCHVISION_RECIPE = Recipe(
    TORCHVISION, epochs=90, batch_size=256, lr=0.01, schedule="step", step_epochs=30, weight_decay=1e-4
)

# Large batches for many GPUs: the solvers of You, Gitman and Ginsburg 2017 (arXiv:1708.03888, borisgin/nvcaffe,
# models/alexnet_bn/solver_{8K,16k,32k}.prototxt): 100 epochs, lr (1 - share)^2, and with 8,192 pictures a step lr 10,
# with 16,384 lr 24, with 32,768 lr 32, after 4, 5 and 10 epochs of warm-up.  `lr` is relative to `trust`: a layer's
# step is at most lr * trust = 1 % of its weights' norm, before momentum.  Theirs decays biases and gives each a factor
# of its own; here they do not decay, as in Jia et al. 2018 (arXiv:1807.11205).
FAST_RECIPE = Recipe(
    BN,
    epochs=100,
    batch_size=8192,
    lr=10.0,
    schedule="poly",
    warmup_epochs=5,
    bias_decay=False,
    trust=0.001,
    drop_last=True,
    cuda_graphs=True,
    amp="bf16",
)

RECIPES: Mapping[str, Recipe] = {
    "photos": PHOTOS_RECIPE,
    "fine-tune": FINE_TUNE_RECIPE,
    "demo": DEMO_RECIPE,
    "paper": PAPER_RECIPE,
    "caffe": CAFFE_RECIPE,
    "torchvision": TORCHVISION_RECIPE,
    "fast": FAST_RECIPE,
}
