"""`model.safetensors`: weights, and in the file's metadata everything needed to use them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fastalex import fields
from fastalex.data.preprocessing import Preprocessing
from fastalex.files import replacing
from fastalex.variants import Variant

MODEL = "model.safetensors"
METADATA_KEY = "fastalex"  # of the JSON in the metadata


@dataclass(frozen=True)
class ModelCard:
    """What a weights file must say for its model to be built (`AlexNet.from_card`) and used."""

    variant: Variant
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    dropout: float = 0.5

    model: ClassVar[Any] = None  # the class AlexNet, which lies above and enters itself

    def build(self) -> Any:
        """A new AlexNet as it is described."""
        return self.model.from_card(self)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """Raises ValueError, naming the field, for one that is missing, unknown or wrong."""
        found = fields.complete("the description", cls, json.loads(text))
        preprocessing = Preprocessing.from_dict(found["preprocessing"])
        classes = fields.listed("classes", found["classes"])
        if not classes or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"classes must be one name or more, got {found['classes']!r}")
        fields.number("dropout", found["dropout"], 0)
        variant = Variant.from_dict(found["variant"])
        if preprocessing.channels != variant.in_channels:
            raise ValueError(
                f"preprocessing.channels must be variant.in_channels, {variant.in_channels}, "
                f"got {preprocessing.channels}"
            )
        return cls(variant, classes, preprocessing, found["dropout"])


def save_weights(path: Path, weights: Mapping[str, Tensor], card: ModelCard) -> None:
    """Raises OSError when the file cannot be written."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = save(plain, metadata={"variant": card.variant.name, METADATA_KEY: card.to_json()})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises FileNotFoundError, ValueError for a file of another kind, ImportError where the package is missing.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ModuleNotFoundError(
            f"reading {path} needs the safetensors package: pip install safetensors", name="safetensors"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118, not a dict
    except Exception as error:  # whatever the package trips over in foreign bytes
        raise ValueError(f"{path} is not a safetensors file ({error})") from None
