"""AlexNet and its variants, as data.

The five variants differ in wiring, normalisation, padding and initialisation, not in code: a frozen `Variant` says
what is built, and `AlexNet` builds it.  Narrower networks for smaller images are other instances of `Variant`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalex import fields
from fastalex import functional as F
from fastalex.functional import ResponseNorm
from fastalex.kernels.geometry import output_size
from fastalex.nn import (
    ConvReLU2d,
    LinearReLUDropout,
    LocalResponseNorm,
    LRNMaxPool2d,
    MaxPool2d,
    convolution_of,
    has_hooks,
    is_traced,
)

# height and width of pictures, as `fastalex pack` has it
LARGEST = 4096


@dataclass(frozen=True)
class Conv:
    """One convolutional layer and what follows it, in the order of the fields (but see `Variant.relu`)."""

    channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    norm: ResponseNorm | None = None
    pool: int | None = None  # the window; its stride is `pool_stride`
    pool_stride: int = 2
    std: float = 0.01  # of the initial weights
    bias: float = 0.0  # initial

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value that makes no layer."""
        for name in ("channels", "kernel_size", "stride", "groups", "pool_stride"):
            fields.whole(name, getattr(self, name))
        fields.whole("padding", self.padding, 0, self.kernel_size)
        if self.pool is not None:
            fields.whole("pool", self.pool)
        if self.norm is not None:
            if not isinstance(self.norm, tuple) or len(self.norm) != len(ResponseNorm._fields):
                raise ValueError(f"norm must be a ResponseNorm or None, got {self.norm!r}")
            size, *numbers, groups = self.norm
            fields.whole("norm.size", size)
            fields.whole("norm.groups", groups)
            for name, value in zip(ResponseNorm._fields[1:-1], numbers, strict=True):
                fields.number(f"norm.{name}", value)
        fields.number("std", self.std, 0)
        fields.number("bias", self.bias)
        if self.channels % self.groups:
            raise ValueError(f"groups must divide the {self.channels} channels, got {self.groups}")


@dataclass(frozen=True)
class Variant:
    """What an AlexNet is made of.

    `relu` says where the ReLU stands in layers with normalisation or pooling: "first" (conv, ReLU, then those) or
    "last" (after pooling).  `pool_first` pools before normalising.  `crop` is the height and width of the images that
    the network was made for, `pad_end` what is added to their right and bottom.  `init` is "normal" (the paper's:
    weights from N(0, std), given biases) or "torch" (PyTorch's default for its layers, as torchvision's model).
    `features_size` is the height and width of the last feature map; other sizes are averaged to it.
    """

    name: str
    convs: tuple[Conv, ...]
    crop: int = 224
    in_channels: int = 3
    pad_end: int = 0
    relu: str = "first"
    pool_first: bool = False
    hidden: tuple[int, int] = (4096, 4096)
    hidden_std: float = 0.01
    hidden_bias: float = 0.0
    dropout_first: bool = False  # before the two hidden layers, as torchvision, instead of after them
    init: str = "normal"
    features_size: int = 6

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value that makes no network."""
        if not isinstance(self.name, str):
            raise ValueError(f"name must be a text, got {self.name!r}")
        if not isinstance(self.convs, tuple) or not self.convs or not all(isinstance(c, Conv) for c in self.convs):
            raise ValueError(f"convs must be a tuple of one Conv or more, got {self.convs!r}")
        fields.whole("crop", self.crop, most=LARGEST)
        fields.whole("features_size", self.features_size, most=LARGEST)
        fields.whole("in_channels", self.in_channels)
        fields.whole("pad_end", self.pad_end, 0, self.crop)
        fields.one_of("relu", self.relu, "first", "last")
        fields.one_of("init", self.init, "normal", "torch")
        fields.one_of("pool_first", self.pool_first, False, True)
        fields.one_of("dropout_first", self.dropout_first, False, True)
        if not isinstance(self.hidden, tuple) or len(self.hidden) != 2:
            raise ValueError(f"hidden must be two numbers, got {self.hidden!r}")
        for size in self.hidden:
            fields.whole("hidden", size)
        fields.number("hidden_std", self.hidden_std, 0)
        fields.number("hidden_bias", self.hidden_bias)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Variant:
        """The variant that `dataclasses.asdict` took apart, also after a trip through JSON.

        Raises ValueError, naming the field, for one that is missing, unknown or wrong.
        """
        found = fields.complete("variant", cls, values)
        convs = []
        for i, conv in enumerate(fields.listed("variant.convs", found["convs"])):
            conv = fields.complete(f"variant.convs[{i}]", Conv, conv)
            norm = conv["norm"]
            if norm is not None:
                norm = fields.listed(f"variant.convs[{i}].norm", norm)
                conv["norm"] = ResponseNorm(*norm) if len(norm) == len(ResponseNorm._fields) else norm
            try:
                convs.append(Conv(**conv))
            except ValueError as error:
                raise ValueError(f"variant.convs[{i}].{error}") from None
        found |= {"convs": tuple(convs), "hidden": fields.listed("variant.hidden", found["hidden"])}
        try:
            return cls(**found)
        except ValueError as error:
            raise ValueError(f"variant.{error}") from None


def _krizhevsky(norm: ResponseNorm, conv1_padding: int, bias: float, std: float = 0.01) -> tuple[Conv, ...]:
    """The five layers of the 2012 network, split over two GPUs in layers 2, 4 and 5."""
    return (
        Conv(96, 11, stride=4, padding=conv1_padding, norm=norm, pool=3),
        Conv(256, 5, padding=2, groups=2, norm=norm, pool=3, bias=bias),
        Conv(384, 3, padding=1, std=std),
        Conv(384, 3, padding=1, groups=2, std=std, bias=bias),
        Conv(256, 3, padding=1, groups=2, std=std, bias=bias, pool=3),
    )


# The 2012 text: section 3.3 prints a sum with alpha = 1e-4 over n = 5, which is alpha = 5e-4 in torch's mean.
PAPER = Variant(
    "paper",
    _krizhevsky(ResponseNorm(5, 5e-4, 0.75, 2.0), conv1_padding=2, bias=1.0),
    hidden_bias=1.0,
)
# What the authors' program ran (its layers-145.cfg): alpha / n, LRN inside each GPU's half, padding on the right and
# bottom only (224 -> 55 by rounding up), ReLU after pooling.  That file's additional spatial normalisation after the
# second LRN is left out.
CODE2012 = Variant(
    "code2012",
    _krizhevsky(ResponseNorm(5, 1e-4, 0.75, 2.0, groups=2), conv1_padding=0, bias=1.0, std=0.03),
    pad_end=3,
    relu="last",
    hidden_bias=1.0,
)
# torchvision.models.alexnet, the single column of "One weird trick" (Krizhevsky 2014) without LRN.
TORCHVISION = Variant(
    "torchvision",
    (
        Conv(64, 11, stride=4, padding=2, pool=3),
        Conv(192, 5, padding=2, pool=3),
        Conv(384, 3, padding=1),
        Conv(256, 3, padding=1),
        Conv(256, 3, padding=1, pool=3),
    ),
    dropout_first=True,
    init="torch",
)
# Caffe's two models (BVLC/caffe, models/): k = 1, alpha / n, 227x227 crops.  Their pooling rounds up, which is the
# same at 55, 27 and 13.
BVLC_ALEXNET = Variant(
    "bvlc_alexnet",
    _krizhevsky(ResponseNorm(5, 1e-4, 0.75, 1.0), conv1_padding=0, bias=0.1),
    crop=227,
    hidden_std=0.005,
    hidden_bias=0.1,
)
CAFFENET = Variant(
    "caffenet",
    _krizhevsky(ResponseNorm(5, 1e-4, 0.75, 1.0), conv1_padding=0, bias=1.0),
    crop=227,
    pool_first=True,
    hidden_std=0.005,
    hidden_bias=1.0,
)
VARIANTS: Mapping[str, Variant] = {v.name: v for v in (PAPER, CODE2012, TORCHVISION, BVLC_ALEXNET, CAFFENET)}


class Features(nn.Sequential):
    """The convolutional part.  Runs conv, ReLU, LRN and pooling of a stage as one node of the autograd graph.

    Modules stand where torchvision's stand, with an Identity in the place of each ReLU that is fused into its
    convolution.  A stage with a hook on one of its modules, or on all modules, runs module by module, so that the hook
    sees its tensors; so does torch.fx.

    Activations are channels_last.  An image in NCHW is read as it lies: the first weight is brought into that format.
    """

    def modules_for(self, input: Tensor) -> list[nn.Module]:
        """The modules that this input takes: images after space-to-depth come with their padding."""
        modules = list(self)
        if isinstance(modules[0], nn.ZeroPad2d) and input.shape[1] != modules[1].in_channels:
            return modules[1:]
        return modules

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            return super().forward(input)
        modules = self.modules_for(input)
        i = 0
        while i < len(modules):
            if _is_fusible(modules[i : i + 3]):
                conv: Any = modules[i]
                pool: Any = modules[i + 2]
                weight, geometry = convolution_of(conv, input)
                input = F.conv2d_relu_max_pool2d(
                    input if i == 0 else _channels_last(input),
                    _channels_last(weight) if i == 0 else weight,
                    conv.bias,
                    *geometry,
                    norm=getattr(pool, "norm", None),
                    kernel_size=pool.kernel_size,
                    pool_stride=pool.stride,
                )
                i += 3
            else:
                input = modules[i](_channels_last(input))
                i += 1
        return input


def _channels_last(input: Tensor) -> Tensor:
    """As it is, where torch.vmap hides a batch in it, of which it knows no memory format."""
    if input.dim() != 4 or torch._C._are_functorch_transforms_active():
        return input
    return input.contiguous(memory_format=torch.channels_last)


def _is_fusible(stage: list[nn.Module]) -> bool:
    if [type(m) for m in stage] not in ([ConvReLU2d, nn.Identity, LRNMaxPool2d], [ConvReLU2d, nn.Identity, MaxPool2d]):
        return False
    pool: Any = stage[2]
    plain = isinstance(pool, LRNMaxPool2d) or (
        pool.padding == 0 and pool.dilation == 1 and not pool.ceil_mode and not pool.return_indices
    )
    return plain and not any(has_hooks(module) for module in stage)


class BlockConv2d(nn.Conv2d):
    """nn.Conv2d whose input may also come after space-to-depth; see `fastalex.nn.convolution_of`."""

    def forward(self, input: Tensor) -> Tensor:
        weight, geometry = convolution_of(self, input)
        return nn.functional.conv2d(input, weight, self.bias, *geometry)


class AlexNet(nn.Module):
    """AlexNet (Krizhevsky, Sutskever, Hinton 2012): images (N, 3, 224, 224) -> logits (N, num_classes).

    A drop-in for `torchvision.models.AlexNet`: modules `features`, `avgpool`, `classifier` with the same positions and
    parameter names in every variant; with variant="torchvision" its state_dict loads with strict=True.
    Activations are channels_last whatever the input is.  Parameters are contiguous as torchvision's; the library brings
    a convolution's weight into its own order in every call, which `model.to(memory_format=torch.channels_last)` saves.
    Images may also come as `fastalex.kernels.space_to_depth.space_to_depth(images, 4, model.block_padding(H, W))` makes
    them, (N, 48, 57, 57) for both sizes of crop: a data pipeline that normalises can do that in the same pass.

    num_classes: outputs of the last layer.
    dropout: probability of the two dropout layers.
    variant: a name out of `VARIANTS`, or a `Variant`.
    Raises ValueError for an unknown variant.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, *, variant: str | Variant = "paper"):
        super().__init__()
        self.variant = find_variant(variant)
        self.num_classes = num_classes
        self.features = Features(*_feature_modules(self.variant))
        size = self.variant.features_size
        self.avgpool = AveragePoolTo((size, size))
        self.classifier = nn.Sequential(*_classifier_modules(self.variant, num_classes, dropout))
        if self.variant.init == "normal":
            self._initialise()

    def _initialise(self) -> None:
        layers: list[Any] = [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        values = [(conv.std, conv.bias) for conv in self.variant.convs]
        values += [(self.variant.hidden_std, self.variant.hidden_bias)] * 2 + [(0.01, 0.0)]
        for layer, (std, bias) in zip(layers, values, strict=True):
            nn.init.normal_(layer.weight, 0.0, std)
            nn.init.constant_(layer.bias, bias)

    def forward(self, input: Tensor) -> Tensor:
        if not is_traced(input):
            self._check(input)
        return self.classifier(torch.flatten(self.avgpool(self.features(input)), 1))

    def _check(self, input: Tensor) -> None:
        channels = [self.variant.in_channels]
        if self.variant.convs[0].stride > 1:
            channels.append(channels[0] * self.variant.convs[0].stride ** 2)
        if input.dim() != 4 or input.shape[1] not in channels:
            after = f" (or (N, {channels[1]}, H', W') after space-to-depth)" if channels[1:] else ""
            raise ValueError(f"input must be (N, {channels[0]}, H, W), got shape {tuple(input.shape)}{after}")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; the RuntimeError for weights of another variant says which one they fit."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            fitting = fitting_variants(state_dict)
            if not fitting or self.variant.name in fitting:
                raise
            classes = state_dict["classifier.6.weight"].shape[0]
            raise RuntimeError(
                f'these weights fit variant "{fitting[0]}", not "{self.variant.name}": '
                f'build AlexNet({classes}, variant="{fitting[0]}"). {error}'
            ) from None

    def block_padding(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)), the padding with which space-to-depth serves images of this size.

        Raises ValueError for a variant whose first convolution has stride 1.
        """
        conv = self.variant.convs[0]
        if conv.stride == 1:
            raise ValueError(f'variant "{self.variant.name}" starts with stride 1: it takes images as they are')

        def after(size: int) -> int:
            edges = (conv.padding, conv.padding + self.variant.pad_end)
            [windows] = output_size((size,), (conv.kernel_size,), (conv.stride,), (edges,), (1,))
            blocks = windows - 1 + -(-conv.kernel_size // conv.stride)
            return blocks * conv.stride - size - conv.padding

        return (conv.padding, after(height)), (conv.padding, after(width))

    def features_at(self, input: Tensor, *layers: str) -> dict[str, Tensor]:
        """The maps after the named ReLUs ("relu1" to "relu5"), as perceptual losses want them, in one pass.

        input: (N, C, H, W).  Returns {name: (N, K, H', W')}; runs no further than the last layer asked for and needs
        no hooks.  Raises ValueError for a name that is none of them.
        """
        known = [f"relu{i + 1}" for i in range(len(self.variant.convs))]
        for layer in layers:
            if layer not in known:
                raise ValueError(f"layers must be out of {', '.join(known)}, got {layer!r}")
        found: dict[str, Tensor] = {}
        relus = iter(known)
        for module in self.features.modules_for(input):
            if len(found) == len(set(layers)):
                break
            input = module(_channels_last(input))
            if isinstance(module, ConvReLU2d | nn.ReLU) and (name := next(relus)) in layers:
                found[name] = input
        return found


class AveragePoolTo(nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d that costs nothing at its own output size, where averaging changes nothing."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_traced(input) and input.shape[2:] == self.output_size:
            return input
        return super().forward(input)


def _feature_modules(variant: Variant) -> list[nn.Module]:
    modules: list[nn.Module] = [nn.ZeroPad2d((0, variant.pad_end, 0, variant.pad_end))] if variant.pad_end else []
    channels = variant.in_channels
    for conv in variant.convs:
        relu_first = variant.relu == "first" or not (conv.norm or conv.pool)
        modules.append(
            (ConvReLU2d if relu_first else nn.Conv2d if conv.stride == 1 else BlockConv2d)(
                channels, conv.channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups
            )
        )
        if relu_first:
            modules.append(nn.Identity())
        if conv.norm and conv.pool and not variant.pool_first:
            modules.append(
                LRNMaxPool2d(
                    *conv.norm[:4], conv.pool, conv.pool_stride, groups=conv.norm.groups, after_relu=relu_first
                )
            )
        else:
            if conv.pool:
                modules.append(MaxPool2d(conv.pool, conv.pool_stride))
            if conv.norm:
                modules.append(LocalResponseNorm(*conv.norm[:4], groups=conv.norm.groups))
        if not relu_first:
            modules.append(nn.ReLU())
        channels = conv.channels
    return modules


def _classifier_modules(variant: Variant, num_classes: int, dropout: float) -> list[nn.Module]:
    inputs = variant.convs[-1].channels * variant.features_size**2
    first, second = variant.hidden
    # positions as torchvision's: dropout, linear, ReLU, dropout, linear, ReLU, linear
    before, after = (dropout, 0.0) if variant.dropout_first else (0.0, dropout)
    return [
        nn.Dropout(before) if before else nn.Identity(),
        LinearReLUDropout(inputs, first, p=dropout),
        nn.Identity(),
        nn.Identity(),
        LinearReLUDropout(first, second, p=after),
        nn.Identity(),
        nn.Linear(second, num_classes),
    ]


def find_variant(variant: str | Variant) -> Variant:
    """The variant of this name (or the variant itself).  Raises ValueError for an unknown name."""
    if isinstance(variant, Variant):
        return variant
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return VARIANTS[variant]


METADATA_KEY = "fastalex"  # of the JSON in a safetensors file's metadata that describes the model: `checkpoint.py`
TORCHVISION_WEIGHTS = {
    "IMAGENET1K_V1": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}


def alexnet(
    weights: Any = None, *, variant: str | Variant | None = None, progress: bool = True, **kwargs: Any
) -> AlexNet:
    """An AlexNet, with weights if asked for, in training mode.

    weights: None (fresh initialisation); a name of torchvision's ("IMAGENET1K_V1", "DEFAULT", or the members of
        `torchvision.models.AlexNet_Weights`), downloaded once to torch's hub directory; or a path to a `.safetensors`,
        or to what torch.save wrote (read with weights_only=True): a state_dict in any precision, or a dict that holds
        one, see `plain_state`.  The model is in float32.
    variant: as for `AlexNet`; by default the one that the weights were made for, else "paper".
    kwargs: num_classes (by default the number in the weights) and dropout, for `AlexNet`.

    Raises FileNotFoundError for a missing path, OSError, naming the file to fetch by hand, where a download fails, and
    ValueError for weights that do not fit the variant, naming the one that they do fit.
    """
    if weights is None:
        return AlexNet(variant=variant or "paper", **kwargs)
    state, made_for = load_weights(weights, progress=progress)
    fitting = fitting_variants(state)
    if variant is None:
        variant = made_for or (fitting[0] if fitting else "paper")
    if isinstance(variant, str) and variant == made_for and variant not in VARIANTS:
        raise ValueError(
            f'the weights {weights} are of variant "{variant}", which is none of {", ".join(VARIANTS)}, and the file '
            "does not describe it: call alexnet(weights, variant=Variant(...)) with the variant that was trained"
        )
    wanted = find_variant(variant)
    name = made_for.name if isinstance(made_for, Variant) else made_for
    if name is not None and (name in VARIANTS or isinstance(made_for, Variant)) and name != wanted.name:
        raise ValueError(f'the weights {weights} are of variant "{name}", not "{wanted.name}"')
    if wanted.name in VARIANTS and wanted.name not in fitting:
        fits = f'variant "{fitting[0]}"' if fitting else "no variant of AlexNet"
        raise ValueError(f'the weights {weights} fit {fits}, not "{wanted.name}"')
    last = state.get("classifier.6.weight")
    if last is None or last.dim() != 2:
        raise ValueError(f"the weights {weights} have no matrix classifier.6.weight: they are of another network")
    classes = last.shape[0]
    if kwargs.setdefault("num_classes", classes) != classes:
        raise ValueError(f"num_classes is {kwargs['num_classes']}, but the weights {weights} have {classes} classes")
    check_shapes(state, wanted, classes, weights)
    model = AlexNet(variant=wanted, **kwargs)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f'the weights {weights} do not fit variant "{wanted.name}": {error}') from None
    return model


def load_weights(weights: Any, *, progress: bool = True) -> tuple[dict[str, Tensor], Variant | str | None]:
    """The state_dict behind a name or path, and the variant that it was made for.

    The variant is whole if the file describes it, its name if the file only names it, None if it does not say.
    """
    name = str(getattr(weights, "name", weights)).removeprefix("AlexNet_Weights.")
    name = "IMAGENET1K_V1" if name == "DEFAULT" else name
    if name in TORCHVISION_WEIGHTS:
        return download(name, TORCHVISION_WEIGHTS[name], progress=progress), "torchvision"
    path = Path(os.fspath(weights))
    if not path.is_file():
        known = ", ".join([*TORCHVISION_WEIGHTS, "DEFAULT"])
        raise FileNotFoundError(f"weights must be one of {known} or an existing file, got {str(weights)!r}")
    if path.suffix == ".safetensors":
        state, variant = _load_safetensors(path)
        return plain_state(state, path), variant
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever PyTorch trips over in foreign bytes
        # PyTorch's advice, to trust the file, comes first
        reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split()) or type(error).__name__
        raise ValueError(
            f"{path} holds no weights that PyTorch reads with weights_only=True: {reason[:300]}"
        ) from error
    variant = content.get("variant") if isinstance(content, Mapping) else None
    return plain_state(content, path), variant if isinstance(variant, str) else None


# where programs put the weights in what they save, in the order of preference
PLACES: tuple[str, ...] = (
    *("state_dict", "model_state_dict", "model", "model_state", "net", "network", "weights", "params", "module"),
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema"),
)


def plain_state(content: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict in what another program saved.

    It may lie in an entry of PLACES; names may have gone through DataParallel, AveragedModel or torch.compile
    ("module.", "features.module.", "_orig_mod."), or through a model around this one ("model.").
    Raises ValueError, naming the file and the entry, for what holds no weights.
    """
    while isinstance(content, Mapping):
        inner = next((content[name] for name in PLACES if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state_dict")
    if not content:
        raise ValueError(f"{path} holds no weights")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise ValueError(f"{path} holds no state_dict: its entry {name!r} is a {type(value).__name__}")
        if name != "n_averaged":  # AveragedModel's counter
            state[".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))] = value
    outer = {name.partition(".")[0] for name in state}
    while len(outer) == 1 and all("." in name for name in state) and not outer & {"features", "classifier"}:
        state = {name.partition(".")[2]: value for name, value in state.items()}
        outer = {name.partition(".")[0] for name in state}
    for name, value in state.items():
        if not value.is_floating_point():
            raise ValueError(f"{path}: {name} is {value.dtype}, no weights")
    return state


def download(name: str, url: str, *, progress: bool = True) -> dict[str, Tensor]:
    """A state_dict from the network, or from torch's hub directory where it lies already.

    Raises OSError, naming the file to fetch by hand, where that fails.
    """
    try:
        return dict(torch.hub.load_state_dict_from_url(url, progress=progress, check_hash=True, weights_only=True))
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        file = url.rpartition("/")[2]
        raise OSError(
            f"{name} could not be downloaded ({error}). Where there is a network: curl -LO {url}; "
            f"then move {file} to {folder}, or give its path instead of {name}"
        ) from error


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], Variant | str | None]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"reading {path} needs the safetensors package: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
            metadata = file.metadata() or {}
    except Exception as error:  # whatever the package trips over in foreign bytes
        raise ValueError(f"{path} is not a safetensors file ({error})") from None
    # what `fastalex train` writes describes its variant, listed or not
    if METADATA_KEY in metadata:
        try:
            return state, Variant.from_dict(json.loads(metadata[METADATA_KEY])["variant"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its description of the model is damaged: {error}") from None
    return state, metadata.get("variant")


def check_shapes(state: Mapping[str, Tensor], variant: Variant, classes: int, where: object) -> None:
    """Raises ValueError unless the variant's parameters have these names and shapes; needs no memory for them.

    A description in a file can ask for any amount.
    """
    with torch.device("meta"):
        wanted = AlexNet(classes, variant=replace(variant, init="torch")).state_dict()
    for name, value in wanted.items():
        if name not in state:
            raise ValueError(f'the weights {where} lack {name}, which variant "{variant.name}" has')
        if state[name].shape != value.shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)} in the weights {where}, "
                f'variant "{variant.name}" has {tuple(value.shape)}'
            )


def fitting_variants(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the variants whose parameters have these names and shapes, whatever the number of classes."""
    found = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    classes = (found.get("classifier.6.weight") or (1000,))[0]
    with torch.device("meta"):
        models = {name: AlexNet(classes, variant=replace(v, init="torch")) for name, v in VARIANTS.items()}
    return [
        name
        for name, model in models.items()
        if {key: tuple(value.shape) for key, value in model.state_dict().items()} == found
    ]
