"""Where things run."""

from __future__ import annotations

import torch


def find_device(name: str | None) -> torch.device:
    """The device of this name; by default a GPU if there is one.

    Raises ValueError for a device that PyTorch does not know or cannot reach.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {error}") from None
    return torch.device(name)
