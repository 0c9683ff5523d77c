"""Checkpoints: a model that describes itself, and the state that lets a training run go on.

`model.safetensors` holds the weights and, in the file's metadata, everything needed to use them (`fastalex.card`).
`state.pt` holds what only training needs.  Both are replaced in one step: a run killed at any moment leaves the old
file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastalex.alexnet import AlexNet
from fastalex.card import METADATA_KEY, MODEL, ModelCard, save_weights
from fastalex.files import replacing

STATE, PREVIOUS_STATE = "state.pt", "state.previous.pt"
STATE_FORMAT = 2
# where `fastalex demo` leaves its model: what the other commands take when they are given none
DEMO_MODEL = Path("runs/demo") / MODEL


def save_model(path: Path, model: AlexNet, card: ModelCard) -> None:
    """Raises OSError when the file cannot be written."""
    save_weights(path, model.state_dict(), card)


def describes_itself(path: Path) -> bool:
    """Whether `save_model` wrote a file, as far as its heading says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_model(path: Path) -> tuple[AlexNet, ModelCard]:
    """The model in a file that `save_model` wrote, in evaluation mode.

    Raises FileNotFoundError, or ValueError for a file of another kind.
    """
    model = AlexNet.from_file(path)
    assert model.card is not None
    return model, model.card


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
