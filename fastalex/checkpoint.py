"""Checkpoints: a model that describes itself, and the state that lets a training run go on.

`model.safetensors` holds the weights and, in the file's metadata, everything needed to use them (`ModelCard`).
`state.pt` holds what only training needs.  Both are replaced in one step: a run killed at any moment leaves the old
file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalex import fields
from fastalex.alexnet import AlexNet
from fastalex.data.preprocessing import Preprocessing
from fastalex.files import replacing
from fastalex.variants import Variant
from fastalex.weights import METADATA_KEY, check_shapes

MODEL, STATE, PREVIOUS_STATE = "model.safetensors", "state.pt", "state.previous.pt"
STATE_FORMAT = 2
# where `fastalex demo` leaves its model: what the other commands take when they are given none
DEMO_MODEL = Path("runs/demo") / MODEL


@dataclass(frozen=True)
class ModelCard:
    """What a weights file must say for its model to be built and used."""

    variant: Variant
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    dropout: float = 0.5

    def build(self) -> AlexNet:
        return AlexNet(len(self.classes), self.dropout, variant=self.variant)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """Raises ValueError, naming the field, for one that is missing, unknown or wrong."""
        found = fields.complete("the description", cls, json.loads(text))
        values = fields.complete("preprocessing", Preprocessing, found["preprocessing"])
        values |= {name: fields.listed(f"preprocessing.{name}", values[name]) for name in ("mean", "std")}
        try:
            preprocessing = Preprocessing(**values)
        except ValueError as error:
            raise ValueError(f"preprocessing.{error}") from None
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


def save_model(path: Path, model: AlexNet, card: ModelCard) -> None:
    """Raises OSError when the file cannot be written."""
    save_weights(path, model.state_dict(), card)


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], card: ModelCard) -> None:
    """As `save_model`, for the state_dict of a model that is elsewhere."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = save(plain, metadata={"variant": card.variant.name, METADATA_KEY: card.to_json()})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def load_model(path: Path) -> tuple[AlexNet, ModelCard]:
    """The model in a file that `save_model` wrote, in evaluation mode.

    Raises FileNotFoundError, or ValueError for a file of another kind.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except Exception as error:  # whatever the package trips over in foreign bytes
        raise ValueError(f"{path} is not a safetensors file ({error})") from None
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} does not say which variant and classes it holds; `fastalex train` writes files that do"
        )
    try:
        card = ModelCard.from_json(metadata[METADATA_KEY])
        check_shapes(weights, card.variant, len(card.classes), path)
        model = card.build()
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{path} was written by another version of fastalex or is damaged: {error}") from error
    return model.eval(), card


def save_state(path: Path, **state: Any) -> None:
    """Writes `path`, and keeps the file that was there as its predecessor.  Raises OSError if it cannot be written."""
    # through memory, because torch.save to a full disk does not say what was wrong
    content = io.BytesIO()
    torch.save({"format": STATE_FORMAT, **state}, content)
    with replacing(path) as temporary:
        write_buffer(temporary, content)
        if path.exists():
            link = path.with_name(f".{PREVIOUS_STATE}.partial")
            # some file systems have no hard links; there only the current state is kept
            with contextlib.suppress(OSError):
                link.unlink(missing_ok=True)
                os.link(path, link)
                os.replace(link, path.with_name(PREVIOUS_STATE))


def write_buffer(path: Path, content: io.BytesIO) -> None:
    """Not Path.write_bytes: the frame of one that fails keeps a view, and collecting that ends Python 3.12.1."""
    with path.open("wb") as file:
        file.write(content.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises FileNotFoundError where there is nothing to go on from, ValueError for a file that is damaged or of another
    kind, naming its predecessor if there is one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: no {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch itself does not compare the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum in {damaged}")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except Exception as error:  # whatever PyTorch trips over in foreign bytes
        previous = path.with_name(PREVIOUS_STATE)
        remedy = f"; {previous} is the one before it: rename it to {path.name}" if previous.exists() else ""
        raise ValueError(f"{path} cannot be read ({error}){remedy}") from error
    if state.get("format") != STATE_FORMAT:
        raise ValueError(f"{path} was written by another version of fastalex")
    return state
