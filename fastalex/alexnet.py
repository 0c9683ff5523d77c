"""AlexNet itself: the modules, and how a variant becomes a list of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastalex import functional, hub, private
from fastalex.card import METADATA_KEY, MODEL, ModelCard, read_weights, save_weights
from fastalex.data.preprocessing import Preprocessing
from fastalex.files import write_whole
from fastalex.kernels.geometry import output_size
from fastalex.nn import (
    ConvReLU2d,
    LinearReLUDropout,
    LocalResponseNorm,
    LRNMaxPool2d,
    MaxPool2d,
    convolution_of,
    is_traced,
)
from fastalex.variants import VARIANTS, BatchNorm, Conv, Variant, VariantName, find_variant


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
                input = functional.conv2d_relu_max_pool2d(
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
    if input.dim() != 4 or private.functorch_is_active():
        return input
    return input.contiguous(memory_format=torch.channels_last)


def _is_fusible(stage: list[nn.Module]) -> bool:
    if [type(m) for m in stage] not in ([ConvReLU2d, nn.Identity, LRNMaxPool2d], [ConvReLU2d, nn.Identity, MaxPool2d]):
        return False
    pool: Any = stage[2]
    plain = isinstance(pool, LRNMaxPool2d) or (
        pool.padding == 0 and pool.dilation == 1 and not pool.ceil_mode and not pool.return_indices
    )
    return plain and not any(private.has_hooks(module) for module in stage)


class BlockConv2d(nn.Conv2d):
    """nn.Conv2d whose input may also come after space-to-depth; see `fastalex.nn.convolution_of`."""

    def forward(self, input: Tensor) -> Tensor:
        weight, geometry = convolution_of(self, input)
        return nn.functional.conv2d(input, weight, self.bias, *geometry)


Model = TypeVar("Model", bound="AlexNet")


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

    card: of a model out of a file that describes it (`from_card`, `from_pretrained`): class names, preprocessing.
    """

    card: ModelCard | None = None

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, *, variant: VariantName | Variant = "paper"):
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

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

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

    @classmethod
    def from_card(cls: type[Model], card: ModelCard) -> Model:
        """A new model as a file describes it."""
        model = cls(len(card.classes), card.dropout, variant=card.variant)
        model.card = card
        return model

    @classmethod
    def from_file(cls: type[Model], path: Path) -> Model:
        """The model in a file that `fastalex train` or `save_pretrained` wrote, in evaluation mode.

        Raises FileNotFoundError, ValueError for a file of another kind, ImportError where the package safetensors is
        missing.
        """
        weights, metadata = read_weights(path)
        if METADATA_KEY not in metadata:
            raise ValueError(
                f"{path} does not say which variant and classes it holds; `fastalex train` writes files that do"
            )
        try:
            card = ModelCard.from_json(metadata[METADATA_KEY])
            check_shapes(weights, card.variant, len(card.classes), path)
            model = cls.from_card(card)
            model.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
            raise ValueError(f"{path} was written by another version of fastalex or is damaged: {error}") from error
        return model.eval()

    @classmethod
    def from_pretrained(
        cls: type[Model],
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Model:
        """A model from a folder with a `model.safetensors`, as `save_pretrained` and `fastalex train` write, or from a
        repository of the Hugging Face Hub ("owner/name"), in evaluation mode, with its `card`.

        The options are those of `huggingface_hub.hf_hub_download`, which asks for none where the folder exists.
        Raises FileNotFoundError for a folder without that file, ValueError for a file of another kind, ImportError
        where huggingface_hub is needed and missing, and its own errors.
        """
        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        flags = {"force_download": force_download, "local_files_only": local_files_only}
        return cls.from_file(hub.fetch(source, **options, **flags))

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """Write `model.safetensors`, for `from_pretrained` and `fastalex predict`, and `config.json`.

        classes: names, by default those of `card`, else "0", "1", ...  preprocessing: of pictures, by default that of
        `card`, else the usual one for photographs.  config.json says the same as the metadata of the weights, for
        readers and the Hub's counter of downloads.
        Raises ValueError for a wrong number of classes, OSError when the folder cannot be written.
        """
        layers: list[Any] = list(self.classifier)
        outputs = layers[-1].out_features
        names = tuple(classes or (self.card.classes if self.card else map(str, range(outputs))))
        if len(names) != outputs:
            raise ValueError(f"classes must be {outputs} names, one for each output, got {len(names)}: {names[:3]}...")
        looks = preprocessing or (self.card.preprocessing if self.card else None)
        looks = looks or Preprocessing.for_photos(self.variant.in_channels, self.variant.crop)
        dropout = max(layer.p for layer in layers if hasattr(layer, "p"))
        card = ModelCard(self.variant, names, looks, dropout)
        target = Path(folder)
        write_whole(target / "config.json", card.to_json())
        save_weights(target / MODEL, self.state_dict(), card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload AlexNet",
    ) -> str:
        """Send what `save_pretrained` writes to a repository of the Hugging Face Hub, made, with a README, if there is
        none.

        repo_id: "name" or "owner/name".  private, token: as in huggingface_hub.  Returns the commit's address.
        Raises ImportError where huggingface_hub is missing, ValueError as `save_pretrained` does, and its own errors.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, classes=classes, preprocessing=preprocessing)
            return hub.send(Path(folder), repo_id, private=private, token=token, message=commit_message)

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


ModelCard.model = AlexNet


def _feature_modules(variant: Variant) -> list[nn.Module]:
    modules: list[nn.Module] = [nn.ZeroPad2d((0, variant.pad_end, 0, variant.pad_end))] if variant.pad_end else []
    channels = variant.in_channels
    for conv in variant.convs:
        modules += _stage(variant, conv, channels)
        channels = conv.channels
    return modules


def _stage(variant: Variant, conv: Conv, channels: int) -> list[nn.Module]:
    """A convolution of so many input channels, and what follows it."""
    relu_first = variant.relu == "first" or not (conv.norm or conv.pool)
    modules: list[nn.Module] = [
        (ConvReLU2d if relu_first else nn.Conv2d if conv.stride == 1 else BlockConv2d)(
            channels, conv.channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups
        )
    ]
    if relu_first:
        modules.append(nn.Identity())
    lrn = conv.lrn
    if lrn and conv.pool and not variant.pool_first:
        modules.append(LRNMaxPool2d(*lrn[:4], conv.pool, conv.pool_stride, groups=lrn.groups, after_relu=relu_first))
    else:
        pool = [MaxPool2d(conv.pool, conv.pool_stride)] if conv.pool else []
        norm: list[nn.Module] = [LocalResponseNorm(*lrn[:4], groups=lrn.groups)] if lrn else []
        if isinstance(conv.norm, BatchNorm):
            norm = [nn.BatchNorm2d(conv.channels, *conv.norm, affine=False)]
        modules += [*pool, *norm] if variant.pool_first else [*norm, *pool]
    if not relu_first:
        modules.append(nn.ReLU())
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


def parameter_shapes(variant: Variant, num_classes: int) -> dict[str, torch.Size]:
    """The shapes of a variant's state_dict by its names, found without memory for them."""
    with torch.device("meta"):
        model = AlexNet(num_classes, variant=replace(variant, init="torch"))
    return {name: value.shape for name, value in model.state_dict().items()}


def fitting_variants(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the variants whose state_dict has these names and shapes, whatever the number of classes."""
    found = {key: value.shape for key, value in state.items() if isinstance(value, Tensor)}
    classes = (found.get("classifier.6.weight") or (1000,))[0]
    return [name for name, variant in VARIANTS.items() if parameter_shapes(variant, classes) == found]


def check_shapes(state: Mapping[str, Tensor], variant: Variant, classes: int, where: object) -> None:
    """Raises ValueError unless the variant's parameters have these names and shapes; needs no memory for them.

    A description in a file can ask for any amount.
    """
    for name, shape in parameter_shapes(variant, classes).items():
        if name not in state:
            raise ValueError(f'the weights {where} lack {name}, which variant "{variant.name}" has')
        if state[name].shape != shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)} in the weights {where}, "
                f'variant "{variant.name}" has {tuple(shape)}'
            )
