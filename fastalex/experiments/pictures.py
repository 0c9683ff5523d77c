"""Small labelled pictures that fit in memory: what the experiments train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalex.data import fashion_mnist, sources


@dataclass(frozen=True)
class Pictures:
    """Ten classes.  Pictures are uint8 (N, C, S, S), labels int64 (N,)."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def is_cifar(self) -> bool:
        return self.name == "CIFAR-10"

    def normalised(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training pictures and labels, test pictures and labels; float32 in channels_last, and per channel a mean of 0
        and a deviation of 1 over the training pictures."""
        mean = self.train.float().mean((0, 2, 3), keepdim=True)
        std = self.train.float().std((0, 2, 3), keepdim=True).clamp_min(1)  # of 255: a constant channel stays finite
        train, test = (
            ((images.float() - mean) / std).to(device, memory_format=torch.channels_last)
            for images in (self.train, self.test)
        )
        return train, self.train_labels.to(device), test, self.test_labels.to(device)


def load_pictures(data: Path | None = None) -> Pictures:
    """The Fashion-MNIST sample that ships with the package, or CIFAR-10.

    data: `cifar-10-batches-bin` or `cifar-10-batches-py` of the published archives, or the folder that holds it.
    Raises FileNotFoundError for a missing folder, ValueError for one that holds something else or damaged files.
    """
    if data is None:
        parts = [torch.from_numpy(array) for split in ("train", "test") for array in fashion_mnist.load(split)]
        train, train_labels, test, test_labels = parts
        return Pictures("Fashion-MNIST sample", train[:, None], train_labels, test[:, None], test_labels)
    source = sources.find(data)
    if not source.kind.startswith("cifar10"):
        folders = " or ".join(sources.CIFAR_FOLDERS.values())
        raise ValueError(f"--data must be the folder {folders} of CIFAR-10, or hold it; {data} does not")
    parts = []
    for split in ("train", "test"):
        items = source.splits[split]
        pixels = np.stack([np.asarray(sources.load(source.kind, source.root, item)) for item in items])
        parts += [torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([item.label for item in items])]
    return Pictures("CIFAR-10", *parts)
