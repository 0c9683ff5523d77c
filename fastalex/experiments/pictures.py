"""Small labelled pictures that fit in memory: what the experiments train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalex.data import fashion_mnist

CIFAR_BINARY = "cifar-10-batches-bin"
CIFAR_PYTHON = "cifar-10-batches-py"
CIFAR_RECORD = 1 + 3 * 32 * 32


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
        std = self.train.float().std((0, 2, 3), keepdim=True)
        train, test = (
            ((images.float() - mean) / std).to(device, memory_format=torch.channels_last)
            for images in (self.train, self.test)
        )
        return train, self.train_labels.to(device), test, self.test_labels.to(device)


def load_pictures(data: Path | None = None) -> Pictures:
    """The Fashion-MNIST sample that ships with the package, or CIFAR-10 in one of its two published forms.

    data: the folder `cifar-10-batches-bin` or `cifar-10-batches-py`, or the one that holds it.  The second form is
        pickled; torchvision reads it, and only if its checksums are the published ones.
    Raises FileNotFoundError where neither is, ValueError for files of another size or content.
    """
    if data is None:
        (train, train_labels), (test, test_labels) = fashion_mnist.load("train"), fashion_mnist.load("test")
        return Pictures(
            "Fashion-MNIST sample",
            torch.from_numpy(train)[:, None],
            torch.from_numpy(train_labels),
            torch.from_numpy(test)[:, None],
            torch.from_numpy(test_labels),
        )
    for folder in (data, data / CIFAR_BINARY, data / CIFAR_PYTHON):
        if (folder / "data_batch_1.bin").is_file():
            train = np.concatenate([_records(folder / f"data_batch_{part}.bin") for part in range(1, 6)])
            return _cifar(train, _records(folder / "test_batch.bin"))
        if (folder / "data_batch_1").is_file():
            return _torchvisions_cifar(folder)
    raise FileNotFoundError(
        f"no CIFAR-10 in {data}: expected the folder {CIFAR_BINARY} or {CIFAR_PYTHON} of the published archives"
    )


def _records(path: Path) -> np.ndarray:
    """(N, 3073): the label, then 32x32 red, green and blue bytes, row by row."""
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % CIFAR_RECORD:
        raise ValueError(f"{path} has {content.size:,} bytes, which is no multiple of CIFAR-10's {CIFAR_RECORD:,}")
    records = content.reshape(-1, CIFAR_RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} holds the label {records[:, 0].max()}; CIFAR-10 has 0 to 9")
    return records


def _cifar(train: np.ndarray, test: np.ndarray) -> Pictures:
    (images, labels), (test_images, test_labels) = (
        (torch.from_numpy(records[:, 1:]).view(-1, 3, 32, 32), torch.from_numpy(records[:, 0]).long())
        for records in (train, test)
    )
    return Pictures("CIFAR-10", images, labels, test_images, test_labels)


def _torchvisions_cifar(folder: Path) -> Pictures:
    from torchvision.datasets import CIFAR10

    if folder.name != CIFAR_PYTHON:
        raise ValueError(f"the folder {folder} must be called {CIFAR_PYTHON}")
    try:
        train, test = CIFAR10(str(folder.parent), train=True), CIFAR10(str(folder.parent), train=False)
    except RuntimeError as error:
        raise ValueError(f"{folder} does not hold CIFAR-10 as published: {error}") from None
    (images, labels), (test_images, test_labels) = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    )
    return Pictures("CIFAR-10", images, labels, test_images, test_labels)
