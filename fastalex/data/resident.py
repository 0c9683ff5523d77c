"""Sets whose pictures lie where they are read: each split one tensor of bytes, on the GPU or in memory.

No loader brings what an H100 trains on, 100,000 pictures of AlexNet a second (modelled): 20 GB/s of pixels of 256x256.
So they are loaded once, and `augment` reads them by their places.

A set that does not fit into the memory of one GPU may fit into that of all: each process then holds a share, and the
order of an epoch shuffles within shares.  Every batch takes as many pictures of each, which is what stratified sampling
does: every picture once an epoch, every picture as likely as another at every place of its share's order, and the mean
of a batch varies no more than that of one drawn from the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastalex import distributed
from fastalex.data.augmentation import moved
from fastalex.data.image_sets import FashionMNIST, Folders, ImageSet, epoch_generator
from fastalex.data.packed import PackedSet

Keep = Literal["auto", "on-device", "in-memory", "nothing"]
Progress = Callable[[int, int], None]

SPLITS = ("train", "test")
# Of a GPU's free memory, what "auto" may fill: the other half is for the model and its activations.
MODEST = 0.5
# Pictures that are decoded, or enlarged, at a time.
CHUNK = 256


class Held(NamedTuple):
    """What a process holds of a split.

    images: uint8 (slots, C, H, W) in channels_last; labels: int64 (slots,); slots: int64 (count,), where each picture
    lies, or -1 where another process holds it; None where picture i lies at i.  here: the numbers of the pictures.
    """

    images: Tensor
    labels: Tensor
    slots: Tensor | None
    here: range

    def slots_of(self, indices: Tensor) -> Tensor:
        """indices, and the result: int64 (N,) on the pictures' device."""
        return indices if self.slots is None else self.slots[indices]

    def nearest(self, indices: Tensor) -> Tensor:
        """The indices, or others that are here: what fills a share up may lie elsewhere."""
        return indices.clamp(self.here.start, self.here.stop - 1)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """A batch: uint8 (N, C, H, W) in channels_last and labels, for those who take no slots."""
        slots = self.slots_of(indices)
        return self.images.permute(0, 2, 3, 1)[slots].permute(0, 3, 1, 2), self.labels[slots]


class Resident:
    """An `ImageSet` of tensors.

    source: the set that they were made of, whose order of an epoch this is.  shares: into so many are the training
    pictures cut, and each process holds one for each of its micro-batches; 1 where every process holds all.
    """

    def __init__(self, source: ImageSet, held: dict[str, Held], shares: int = 1) -> None:
        self.classes, self.preprocessing = source.classes, source.preprocessing
        self.colours = getattr(source, "colours", None)
        self.held, self.shares = held, shares
        self.device = held["train"].images.device
        self._source = source

    def count(self, split: str) -> int:
        return self._source.count(split)

    def order(self, split: str, seed: int, epoch: int) -> Tensor:
        """That of the source; of shares, each shuffled on its own, one after the other."""
        if self.shares == 1:
            return self._source.order(split, seed, epoch)
        return order_of_shares(self.count(split), self.shares, seed, epoch)

    def batches(self, split: str, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """As of any set, on the set's device; in pinned memory where that is the host and there is a GPU.

        Raises ValueError for a picture that this process does not hold.
        """
        held = self.held[split]
        first, last = held.here.start, held.here.stop
        for chosen in indices:
            if len(chosen) and not first <= int(chosen.min()) <= int(chosen.max()) < last:
                raise ValueError(f"indices of {split!r} must lie in [{first}, {last}), got {chosen}")
            images, labels = held.take(moved(chosen, self.device))
            if self.device.type == "cpu" and torch.cuda.is_available():
                images, labels = images.pin_memory(), labels.pin_memory()
            yield images, labels


def order_of_shares(count: int, shares: int, seed: int, epoch: int) -> Tensor:
    """So many pictures in an epoch's order, int64 (count,): each share shuffled, one after the other."""
    generator = epoch_generator(seed, epoch)
    cut = torch.arange(count).tensor_split(shares)
    return torch.cat([share[torch.randperm(len(share), generator=generator)] for share in cut])


def held_on(data: ImageSet, split: str, device: torch.device) -> Held | None:
    """The split, where it lies in memory that the device computes on."""
    return data.held[split] if isinstance(data, Resident) and data.device.type == device.type else None


def keep(
    source: ImageSet,
    how: Keep,
    device: torch.device,
    *,
    micro_batches: int = 1,
    progress: Progress = lambda done, total: None,
) -> ImageSet:
    """The set as training on this device should read it.

    how: "on-device": in the device's memory; of a packed set that fits into no GPU each process holds a share.
    "in-memory": in the host's, of a packed set as the system maps its file.  "nothing": the source, which reads ahead
    from the disk.  "auto": the sample that ships with the package, and on a GPU a packed set that fits; others as
    "nothing", folders because they would be decoded for minutes before the first step.
    micro_batches: of a batch, in this process.  progress: told (bytes done, bytes in all).

    Every process must ask.  Raises ValueError, with the numbers, where what is asked for does not fit or a checksum is
    wrong, and as the source's `batches`.
    """
    if how == "nothing" or (how == "auto" and not isinstance(source, (FashionMNIST, PackedSet))):
        return source
    on_gpu = device.type == "cuda" and how != "in-memory"
    if isinstance(source, PackedSet) and not on_gpu:
        # for a GPU its batches are read from mapped memory anyway; no CPU computes faster than the loader reads ahead
        return mapped(source, progress) if device.type == "cpu" and how != "auto" else source
    place = device if on_gpu else torch.device("cpu")
    free = free_memory(place if on_gpu else None)
    room = free if how != "auto" else int(MODEST * free)
    needed = bytes_of(source)
    shares = distributed.size() * micro_batches
    if distributed.largest(int(needed > room), device) == 0:
        shares = 1
    elif not isinstance(source, PackedSet) or distributed.size() == 1:
        return refused(source, how, place, needed, free)
    elif distributed.largest(int(-(-needed // distributed.size()) > room), device):
        return refused(source, how, place, -(-needed // distributed.size()), free)
    problem: Exception | None = None
    held: dict[str, Held] = {}
    try:
        held = loaded(source, place, shares, progress)
    except (OSError, ValueError) as error:
        problem = error
    if distributed.largest(int(problem is not None), device):
        raise problem or ValueError("another process could not load its pictures")
    return Resident(source, held, shares)


def refused(source: ImageSet, how: Keep, place: torch.device, needed: int, free: int) -> ImageSet:
    """The source for "auto".  Raises ValueError for what was asked for."""
    if how == "auto":
        return source
    raise ValueError(
        f"keep must be auto or nothing: {how} needs {needed / 1e9:.1f} GB for the pictures, "
        f"and {place} has {free / 1e9:.1f} GB free"
    )


def record(source: ImageSet, split: str) -> tuple[int, ...]:
    """(C, H, W) of the set's pictures."""
    if isinstance(source, (PackedSet, Folders)):
        side = source.preprocessing.resize
        return source.preprocessing.channels, side, side
    images, _ = next(iter(source.batches(split, [torch.zeros(1, dtype=torch.int64)])))
    return tuple(images.shape[1:])


def bytes_of(source: ImageSet) -> int:
    """Of the pictures of both splits."""
    return sum(source.count(split) * torch.Size(record(source, split)).numel() for split in SPLITS)


def free_memory(device: torch.device | None) -> int:
    """Bytes that are free on a GPU, or (None) for this process in the memory of the machine."""
    if device is not None:
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    for path, name in (("/proc/meminfo", "MemAvailable:"), ("/sys/fs/cgroup/memory.max", "")):
        try:
            words = Path(path).read_text().split()
            value = words[words.index(name) + 1] if name else words[0]
            limits.append(int(value) * (1024 if name else 1))
        except (OSError, ValueError, IndexError):  # another system, or no limit
            continue
    return min(limits, default=2**62) // distributed.local_size()


def loaded(source: ImageSet, place: torch.device, shares: int, progress: Progress) -> dict[str, Held]:
    """Both splits on the device: everything, or this process's shares."""
    spans = {}
    for split in SPLITS:
        everything = torch.arange(source.count(split))
        if shares == 1:
            spans[split] = (0, len(everything))
        else:
            # of the test pictures, one for each process
            parts = everything.tensor_split(shares if split == "train" else distributed.size())
            own = len(parts) // distributed.size()
            mine = torch.cat(parts[distributed.rank() * own : (distributed.rank() + 1) * own])
            spans[split] = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
    sizes = {split: torch.Size(record(source, split)).numel() for split in SPLITS}
    total = sum((last - first) * sizes[split] for split, (first, last) in spans.items())
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    held = {}
    for split, (first, last) in spans.items():
        channels, height, width = record(source, split)
        images = torch.empty(last - first, height, width, channels, dtype=torch.uint8, device=place)
        if isinstance(source, PackedSet):
            source.load(split, images, first, progress=more)
            labels = source.labels(split)[first:last].to(place)
        else:
            labels = fill(source, split, images, more).to(place)
        slots = None
        if last - first < source.count(split):
            slots = torch.full((source.count(split),), -1, dtype=torch.int64)
            slots[first:last] = torch.arange(last - first)
            slots = slots.to(place)
        held[split] = Held(images.permute(0, 3, 1, 2), labels, slots, range(first, last))
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return held


def fill(source: ImageSet, split: str, images: Tensor, more: Callable[[int], None]) -> Tensor:
    """Every picture of the split, in order, into uint8 (count, H, W, C); returns the labels."""
    parts = torch.arange(len(images)).split(CHUNK)
    labels = []
    for chosen, (pictures, of_part) in zip(parts, source.batches(split, parts), strict=True):
        images[chosen[0] : chosen[-1] + 1].copy_(pictures.permute(0, 2, 3, 1))
        labels.append(of_part)
        more(pictures.numel())
    return torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)


def mapped(source: PackedSet, progress: Progress) -> Resident:
    """The set as the system maps its files, without a copy, once its checksums are compared.

    The processes of a machine share that work, as they share the memory.
    """
    total = bytes_of(source) // distributed.local_size()
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    problem: Exception | None = None
    try:
        for split in SPLITS:
            parts = torch.arange(source.count(split)).tensor_split(distributed.local_size())
            mine = parts[distributed.local_rank()]
            if len(mine):
                source.check(split, int(mine[0]), int(mine[-1]) + 1, progress=more)
    except (OSError, ValueError) as error:
        problem = error
    if distributed.largest(int(problem is not None), torch.device("cpu")):
        raise problem or ValueError("another process could not read its pictures")
    return Resident(source, {split: Held(*source.mapped(split), range(source.count(split))) for split in SPLITS})
