"""Weights from elsewhere: torchvision's published ones, and the files of any program that trained an AlexNet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastalex.alexnet import AlexNet, check_shapes, fitting_variants
from fastalex.card import METADATA_KEY, read_weights
from fastalex.foreign import caffe, zoo
from fastalex.variants import VARIANTS, Variant, VariantName, find_variant

TORCHVISION_WEIGHTS = {
    "IMAGENET1K_V1": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}
# what reads a file of this suffix
FOREIGN = {".caffemodel": caffe.read, ".onnx": zoo.read}


class Named(Protocol):
    """A member of `torchvision.models.AlexNet_Weights`."""

    @property
    def name(self) -> str: ...


def alexnet(
    weights: str | os.PathLike[str] | Named | None = None,
    *,
    variant: VariantName | Variant | None = None,
    num_classes: int | None = None,
    dropout: float = 0.5,
    progress: bool = True,
) -> AlexNet:
    """An AlexNet, with weights if asked for, in training mode.

        >>> model = fastalex.alexnet("IMAGENET1K_V1", num_classes=6)  # all but the last layer know ImageNet

    weights: None (fresh initialisation); a name of torchvision's ("IMAGENET1K_V1", "DEFAULT", or the members of
        `torchvision.models.AlexNet_Weights`), downloaded once to torch's hub directory; or a path to a `.safetensors`,
        to a `.caffemodel` or `.onnx` of Caffe's AlexNets (docs/weights.md), or to what torch.save wrote (read with
        weights_only=True): a state_dict in any precision, or a dict that holds one, see `plain_state`.  The model is
        in float32 and takes pictures as `Preprocessing.for_photos` has them, Caffe's too.
    variant: as for `AlexNet`; by default the one that the weights were made for, else "paper".
    num_classes: outputs of the last layer, by default as many as in the weights, without weights 1000.  Another number
        than theirs makes it a new layer, as `AlexNet` initialises it, under the layers that the weights fill.
    dropout: as for `AlexNet`.

    Raises FileNotFoundError for a missing path, OSError, naming the file to fetch by hand, where a download fails, and
    ValueError for weights that do not fit the variant, naming the one that they do fit.
    """
    if weights is None:
        return AlexNet(1000 if num_classes is None else num_classes, dropout, variant=variant or "paper")
    state, made_for = load_weights(weights, progress=progress)
    fitting = fitting_variants(state)
    chosen: str | Variant = made_for or (fitting[0] if fitting else "paper") if variant is None else variant
    if isinstance(chosen, str) and chosen == made_for and chosen not in VARIANTS:
        raise ValueError(
            f'the weights {weights} are of variant "{chosen}", which is none of {", ".join(VARIANTS)}, and the file '
            "does not describe it: call alexnet(weights, variant=Variant(...)) with the variant that was trained"
        )
    wanted = find_variant(chosen)
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
    check_shapes(state, wanted, classes, weights)
    model = AlexNet(classes if num_classes is None else num_classes, dropout, variant=wanted)
    try:
        model.load_state_dict(state if model.num_classes == classes else {**state, **head_of(model)})
    except RuntimeError as error:
        raise ValueError(f'the weights {weights} do not fit variant "{wanted.name}": {error}') from None
    return model


def head_of(model: AlexNet) -> dict[str, Tensor]:
    """The part of a model's state_dict that depends on its classes: the last layer's."""
    return {f"classifier.6.{name}": value for name, value in model.classifier[6].state_dict().items()}


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
    if path.suffix in FOREIGN:
        return FOREIGN[path.suffix](path)
    content = read_pickle(path)
    variant = content.get("variant") if isinstance(content, Mapping) else None
    return plain_state(content, path), variant if isinstance(variant, str) else None


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, on the CPU.  Raises ValueError, naming the file, for what weights_only=True refuses."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever PyTorch trips over in foreign bytes
        # PyTorch's advice, to trust the file, comes first
        reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split()) or type(error).__name__
        raise ValueError(
            f"{path} holds no weights that PyTorch reads with weights_only=True: {reason[:300]}"
        ) from error


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
        # BatchNorm counts its batches
        if not value.is_floating_point() and not name.endswith(".num_batches_tracked"):
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
    state, metadata = read_weights(path)
    # what `fastalex train` writes describes its variant, listed or not
    if METADATA_KEY in metadata:
        try:
            return state, Variant.from_dict(json.loads(metadata[METADATA_KEY])["variant"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its description of the model is damaged: {error}") from None
    return state, metadata.get("variant")
