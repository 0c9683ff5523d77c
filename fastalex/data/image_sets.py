"""Sets of labelled pictures, in memory or in folders, that the training loop reads in the same way.

A set hands out whole batches of 8-bit pictures somewhat larger than the model's input; `Preprocessing` cuts the
input out of them, at random places for training and from the centre for evaluation.  That is the 2012 paper's
augmentation (pictures of 256x256, crops of 224x224, mirror images), done on batches and on the model's device.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex.data import fashion_mnist
from fastalex.data.preprocessing import Preprocessing
from fastalex.data.sources import subfolders

# A split of at most so many bytes is decoded once: 16,000 pictures for crops of 64x64, 1,300 for 224x224.
KEPT = 2**28
HELD_OUT = 0.2  # of each class, where a folder does not say which pictures are for testing


class ImageSet(Protocol):
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def count(self, split: str) -> int:
        """The number of pictures in the split "train" or "test"."""
        ...

    def order(self, split: str, seed: int, epoch: int) -> Tensor:
        """The order in which an epoch of training takes the pictures: int64 (count,), the same for the same numbers."""
        ...

    def batches(self, split: str, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch for each tensor of indices: uint8 pictures (N, C, H, W) and int64 labels (N,)."""
        ...


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers for one epoch of a run."""
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


class FashionMNIST:
    """The sample of Fashion-MNIST that ships with fastalex, enlarged from 28x28 to what `preprocessing` says.

    Three channels repeat the grey one.  A black margin of 1/32 of the crop leaves room for random crops; evaluation
    cuts it off again.
    """

    classes = fashion_mnist.CLASSES

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._pictures = {split: fashion_mnist.load(split) for split in fashion_mnist.PER_CLASS}

    @staticmethod
    def preprocessing_for(channels: int, size: int) -> Preprocessing:
        """The whole picture at `size` x `size`, with the mean and deviation of the training pictures."""
        return Preprocessing(channels, size, size, (0.286,) * channels, (0.353,) * channels)

    def count(self, split: str) -> int:
        return len(self._pictures[split].labels)

    def order(self, split: str, seed: int, epoch: int) -> Tensor:
        return torch.randperm(self.count(split), generator=epoch_generator(seed, epoch))

    def batches(self, split: str, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = (torch.from_numpy(array) for array in self._pictures[split])
        size, margin = self.preprocessing.resize, self.preprocessing.crop // 32
        for chosen in indices:
            enlarged = F.interpolate(images[chosen, None].float(), size=(size, size), mode="bilinear")
            batch = F.pad(enlarged.round().to(torch.uint8), (margin,) * 4)
            yield batch.expand(-1, self.preprocessing.channels, -1, -1), labels[chosen]


def outlive_signals(worker: int) -> None:
    """Ctrl-C, and schedulers, send signals to the processes that read pictures too; training wants to save first.

    They end with the process that started them, whatever becomes of it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Unreadable(NamedTuple):
    """A picture file that cannot be used, and why."""

    path: str
    reason: str


class _Files(torch.utils.data.Dataset[Any]):
    """Pictures and labels, or `Unreadable`: an exception would come out of a worker as a page of traceback."""

    def __init__(self, samples: list[tuple[str, int]], transform: Any) -> None:
        self.samples = samples
        self._transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        from fastalex.data.decode import decoded

        path, label = self.samples[index]
        try:
            return self._transform(decoded(Path(path).read_bytes()).convert("RGB")), label
        except OSError as error:
            return Unreadable(path, error.strerror or str(error))
        except ValueError as error:
            return Unreadable(path, str(error))


def _stacked(items: list[Any]) -> Any:
    """A batch, or the pictures of it that cannot be read."""
    wrong = [item for item in items if isinstance(item, Unreadable)]
    return wrong or torch.utils.data.default_collate(items)


class Listing(NamedTuple):
    """Picture files below a folder: {split: [(path, index of its class)]}; split_here: as `held_out` chose."""

    classes: tuple[str, ...]
    samples: dict[str, list[tuple[str, int]]]
    split_here: bool


def list_pictures(root: Path, splits: tuple[str, ...]) -> Listing:
    """What `root/train/CLASS/` and `root/val/CLASS/` (or `test`) hold, or `root/CLASS/`.

    Raises FileNotFoundError, naming the folder, where there is none or it holds no pictures, ValueError where the
    two folders hold different classes, or none of the pictures in `root/CLASS/` can be held out.
    """
    from torchvision import datasets

    folders = {"train": root / "train", "test": root / "test" if (root / "test").is_dir() else root / "val"}
    if root.is_dir() and subfolders(root) and not any(folder.is_dir() for folder in folders.values()):
        whole = datasets.ImageFolder(str(root))
        chosen = held_out(root, whole.samples)
        if not chosen:
            raise ValueError(f"{root} has no class with two pictures: none can be held out for testing")
        parts = {
            "train": [sample for sample in whole.samples if sample not in chosen],
            "test": [sample for sample in whole.samples if sample in chosen],
        }
        return Listing(tuple(whole.classes), {split: parts[split] for split in splits}, True)
    for split in splits:
        if not folders[split].is_dir():
            raise FileNotFoundError(
                f"no folder {folders[split]}: pictures belong in {folders[split]}/CLASS/, or all in {root}/CLASS/"
            )
    found = {split: datasets.ImageFolder(str(folders[split])) for split in splits}
    classes, *others = (tuple(pictures.classes) for pictures in found.values())
    if any(other != classes for other in others):
        raise ValueError(f"{folders['train']} and {folders['test']} must hold folders for the same classes")
    return Listing(classes, {split: pictures.samples for split, pictures in found.items()}, False)


def held_out(root: Path, samples: list[tuple[str, int]]) -> set[tuple[str, int]]:
    """A fifth of the pictures of each class, one at least of two, for testing.

    The choice follows from the names below `root`: it is the same wherever the folder lies and in every command, and a
    picture that is added moves few others.
    """
    by_class: dict[int, list[tuple[bytes, tuple[str, int]]]] = {}
    for sample in samples:
        name = Path(sample[0]).relative_to(root).as_posix()
        by_class.setdefault(sample[1], []).append((hashlib.blake2b(name.encode()).digest(), sample))
    return {
        sample
        for drawn in by_class.values()
        for _, sample in sorted(drawn)[: max(min(1, len(drawn) - 1), round(HELD_OUT * len(drawn)))]
    }


class Folders:
    """Pictures in folders as `list_pictures` finds them, read in worker processes: in every epoch, or where they are
    few, once (`KEPT`).

    The short side is resized as `preprocessing` says and the middle square is cut out, as in the 2012 paper.
    on_error: a picture that cannot be read ends `batches` with a ValueError that names it ("stop"), or is left out,
    and listed in `unreadable` ("skip"); for that every picture is read once before.
    split_here: as in `Listing`.  Raises as `list_pictures`.
    """

    def __init__(
        self,
        root: Path,
        preprocessing: Preprocessing,
        *,
        splits: tuple[str, ...] = ("train", "test"),
        workers: int | None = None,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        from torchvision.transforms import v2

        if workers is not None and workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self.preprocessing = preprocessing
        transform = v2.Compose(
            [
                v2.Resize(preprocessing.resize),
                v2.CenterCrop(preprocessing.resize),
                v2.PILToTensor(),
                *([v2.Grayscale()] if preprocessing.channels == 1 else []),
            ]
        )
        self.classes, samples, self.split_here = list_pictures(root, splits)
        self._workers = min(8, os.cpu_count() or 1) if workers is None else workers
        self._splits = {split: _Files(listed, transform) for split, listed in samples.items()}
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.unreadable: list[Unreadable] = []
        if on_error == "skip":
            for split, files in self._splits.items():
                everything = torch.arange(len(files)).split(64)
                wrong = [item for batch in self._loaded(files, everything) if isinstance(batch, list) for item in batch]
                wrong = [item for item in wrong if isinstance(item, Unreadable)]
                self.unreadable += wrong
                left_out = {item.path for item in wrong}
                files.samples = [sample for sample in files.samples if sample[0] not in left_out]
                if not files.samples:
                    where = f"{root} for {split}ing" if self.split_here else Path(wrong[0].path).parents[1]
                    raise ValueError(f"none of the pictures in {where} can be read: {wrong[0].reason}")

    def count(self, split: str) -> int:
        return len(self._splits[split])

    def order(self, split: str, seed: int, epoch: int) -> Tensor:
        return torch.randperm(self.count(split), generator=epoch_generator(seed, epoch))

    def batches(self, split: str, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """As of any set.  Raises ValueError, naming the file, for a picture that cannot be read."""
        files, preprocessing = self._splits[split], self.preprocessing
        if len(files) * preprocessing.channels * preprocessing.resize**2 > KEPT:
            yield from self._read(files, indices)
            return
        if split not in self._kept:
            everything = list(self._read(files, torch.arange(len(files)).split(64)))
            images, labels = (torch.cat(parts) for parts in zip(*everything, strict=True))
            self._kept[split] = images, labels
        images, labels = self._kept[split]
        for chosen in indices:
            yield images[chosen], labels[chosen]

    def _read(self, files: _Files, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loaded(files, indices):
            if isinstance(batch[0], Unreadable):
                path, reason = batch[0]
                raise ValueError(f"{path}: {reason} (--on-error skip leaves such pictures out)")
            yield tuple(batch)  # type: ignore[misc]

    def _loaded(self, files: _Files, indices: Sequence[Tensor]) -> Iterator[Any]:
        loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            files,
            batch_sampler=[chosen.tolist() for chosen in indices],
            num_workers=self._workers,
            worker_init_fn=outlive_signals,
            collate_fn=_stacked,
            pin_memory=torch.cuda.is_available(),
        )
        iterator = iter(loader)
        try:
            yield from iterator
        finally:
            # Whatever ended the reading: workers that ignore SIGTERM would be waited for when the process exits.
            end = getattr(iterator, "_shutdown_workers", None)
            if end is not None:
                end()
            for worker in getattr(iterator, "_workers", ()):
                worker.kill()
