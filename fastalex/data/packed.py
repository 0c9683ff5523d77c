"""Packed pictures: what `fastalex pack` writes, read through memory maps.

A folder holds, for each split S ("train", "test"):

    S.images       uint8 (slots, size, size, 3), nothing else: picture i lies at i * size * size * 3
    S.labels.npy   int32 (slots,), indices into the classes; -1 where a picture could not be read
    S.paths.json   where each slot came from

and `meta.json`: sizes, classes, colour statistics of the training pictures, SHA-256 of everything, one for each chunk
of images.  The folder gets its name when all of that is on the disk, so a set is whole or not there.

Training pictures were shuffled when they were packed.  Neighbours are therefore a fair sample, and an epoch may read
the disk in long runs: `PackedSet.order` shuffles blocks of BLOCK neighbours, then pictures within WINDOW of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import mmap
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastalex.data.image_sets import epoch_generator
from fastalex.data.preprocessing import Colours, Preprocessing

META = "meta.json"
FORMAT, VERSION = "fastalex packed pictures", 1
# Neighbours that are read together: 12.6 MB at 256x256, so that a disk that needs 10 ms to find them and reads
# 150 MB/s spends nine tenths of its time reading.
BLOCK = 64
# Pictures that are mixed, and asked for ahead of their use: 200 MB at 256x256.
WINDOW = 1024


class Split(NamedTuple):
    """images: uint8 (slots, size, size, 3), a memory map; slots, labels: int64, of the pictures that are there."""

    images: np.ndarray
    memory: mmap.mmap
    slots: Tensor
    labels: Tensor


def is_packed(root: Path) -> bool:
    """Whether a folder is a packed set."""
    return (root / META).is_file()


def checksum(content: dict[str, Any]) -> str:
    """Of meta.json without its last entry."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_meta(root: Path) -> dict[str, Any]:
    """Raises FileNotFoundError where there is no packed set, ValueError for one that is damaged or of the future."""
    path = root / META
    if not path.is_file():
        hint = "; packing has not finished: run the same command again" if root.name.endswith(".partial") else ""
        raise FileNotFoundError(f"no packed pictures in {root}: it has no {META}{hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError("another format")
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this fastalex reads {VERSION}")
        if content.pop("checksum") != checksum(content):
            raise ValueError("its checksum is another")
    except (KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    return content


def read_file(root: Path, name: str, sha256: str) -> bytes:
    content = (root / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{root / name} is damaged: its checksum is not the one in {META}")
    return content


def images_of(root: Path, split: str, meta: dict[str, Any]) -> tuple[np.ndarray, mmap.mmap]:
    """The memory map of a split's pictures.  Raises ValueError where the file is cut."""
    path = root / f"{split}.images"
    shape = (meta["splits"][split]["slots"], meta["size"], meta["size"], 3)
    with path.open("rb") as file:
        found, wanted = os.fstat(file.fileno()).st_size, math.prod(shape)
        if found != wanted:
            raise ValueError(f"{path} has {found:,} bytes, expected {wanted:,}: it is damaged or was not copied whole")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(memory, np.uint8).reshape(shape), memory


class PackedSet:
    """A packed set as an `ImageSet`.

    preprocessing: what the model expects; its `resize` is overruled by the size of the records.  By default, crops of
    7/8 of the size, normalised by mean and deviation of the training pictures.  splits: those to open; threads: that
    copy pictures, one batch each, ahead of their use (by default one per core, 8 at most).

    classes: as the source called them; names: for people; colours: the principal components for `augment`.
    Raises FileNotFoundError where there is no packed set or split, ValueError for a damaged one or a preprocessing
    that does not fit.
    """

    def __init__(
        self,
        root: Path,
        preprocessing: Preprocessing | None = None,
        *,
        splits: tuple[str, ...] = ("train", "test"),
        threads: int | None = None,
    ) -> None:
        meta = read_meta(root)
        size, statistics = meta["size"], meta["statistics"]
        mean, std = tuple(statistics["mean"]), tuple(statistics["std"])
        preprocessing = preprocessing or Preprocessing(3, size, size * 7 // 8, mean, std)
        if preprocessing.channels != 3 or preprocessing.crop > size:
            raise ValueError(
                f"{root} holds pictures of 3 channels and {size}x{size} pixels; "
                f"the model takes {preprocessing.channels} channels and {preprocessing.crop}x{preprocessing.crop}"
            )
        self.root = root
        self.preprocessing = dataclasses.replace(preprocessing, resize=size)
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.names: tuple[str, ...] = tuple(meta["names"])
        self.colours = Colours(
            tuple(statistics["eigenvalues"]), tuple(tuple(vector) for vector in statistics["eigenvectors"])
        )
        self._meta = meta
        self._splits = {}
        for split in splits:
            if split not in meta["splits"]:
                raise FileNotFoundError(f"{root} has no pictures of the split {split!r}, only {list(meta['splits'])}")
            images, memory = images_of(root, split, meta)
            content = read_file(root, f"{split}.labels.npy", meta["splits"][split]["labels"])
            labels = np.load(io.BytesIO(content), allow_pickle=False)
            slots = np.flatnonzero(labels >= 0)
            self._splits[split] = Split(
                images, memory, torch.from_numpy(slots), torch.from_numpy(labels[slots].astype(np.int64))
            )
        if threads is not None and threads < 0:
            raise ValueError(f"threads must be at least 0, got {threads}")
        # reading ahead needs one of its own
        self._threads = min(8, os.cpu_count() or 1) if threads is None else max(1, threads)

    def count(self, split: str) -> int:
        return len(self._splits[split].labels)

    def labels(self, split: str) -> Tensor:
        """int64 (count,)."""
        return self._splits[split].labels

    def paths(self, split: str) -> list[str]:
        """The file, below the packed folder, that each picture was made of."""
        content = read_file(self.root, f"{split}.paths.json", self._meta["splits"][split]["paths"])
        paths = json.loads(content)
        return [paths[slot] for slot in self._splits[split].slots.tolist()]

    def order(self, split: str, seed: int, epoch: int) -> Tensor:
        """The order of one epoch, int64 (count,): blocks of neighbours shuffled, then pictures within a window."""
        count = self.count(split)
        generator = epoch_generator(seed, epoch)
        blocks = torch.randperm(-(-count // BLOCK), generator=generator)
        order = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        order = order[order < count]
        window = torch.arange(count) // WINDOW
        return order[(window + torch.rand(count, dtype=torch.float64, generator=generator)).argsort(stable=True)]

    def batches(self, split: str, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch for each tensor of indices: uint8 (N, 3, size, size) in channels_last, int64 labels (N,).

        Pinned memory where there is a GPU.  Raises ValueError for an index out of range.
        """
        count = self.count(split)
        for chosen in indices:
            if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
                raise ValueError(f"indices of {split!r} must lie in [0, {count}), got {chosen}")
        group = max(1, WINDOW // max(1, len(indices[0]))) if len(indices) else 1
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="packed")
        try:
            pending: deque[Future[tuple[Tensor, Tensor]]] = deque()
            self._read_ahead(split, indices[:group])
            for i, chosen in enumerate(indices):
                if i % group == 0:
                    pool.submit(self._read_ahead, split, indices[i + group : i + 2 * group])
                pending.append(pool.submit(self._read, split, chosen))
                if len(pending) > self._threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def mapped(self, split: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """The file as a tensor, uint8 (slots, 3, size, size) in channels_last, which nobody may write to.

        And int64 labels (slots,), -1 where there is no picture, and the slots of the pictures, None where none is
        missing.
        """
        images, _, slots, labels = self._splits[split]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
        by_slot = torch.full((len(images),), -1, dtype=torch.int64)
        by_slot[slots] = labels
        return pictures, by_slot, None if len(slots) == len(images) else slots

    def load(self, split: str, target: Tensor, first: int, *, progress: Callable[[int], None]) -> None:
        """Fill uint8 (n, size, size, 3), on any device, with n pictures from number `first` on.

        progress: told of bytes that are done.  Raises ValueError, naming the place, for a wrong checksum.
        """
        self._each_chunk(split, first, first + len(target), target, progress)

    def check(self, split: str, first: int, last: int, *, progress: Callable[[int], None]) -> None:
        """Read these pictures and compare the checksums, as `load`."""
        self._each_chunk(split, first, last, None, progress)

    def _each_chunk(
        self, split: str, first: int, last: int, target: Tensor | None, progress: Callable[[int], None]
    ) -> None:
        images, described = self._splits[split].images, self._meta["splits"][split]
        slots, size = self._splits[split].slots[first:last].numpy(), self._meta["chunk"]
        if not len(slots):
            return

        def one(start: int) -> int:
            chunk = images[start : start + size]
            if hashlib.sha256(chunk.data).hexdigest() != described["sha256"][start // size]:
                where = f"{split}.images, pictures {start} to {start + len(chunk) - 1}"
                raise ValueError(f"{self.root} is damaged: {where}")
            begin, end = np.searchsorted(slots, (start, start + size))
            if target is not None:
                # a copy from pinned memory runs beside the next chunk, and PyTorch keeps that memory until it is over
                staged = torch.empty((end - begin, *chunk.shape[1:]), dtype=torch.uint8, pin_memory=target.is_cuda)
                np.take(chunk, slots[begin:end] - start, axis=0, out=staged.numpy(), mode="clip")
                target[begin:end].copy_(staged, non_blocking=True)
            return int(end - begin) * chunk[0].nbytes

        starts = range(int(slots[0]) // size * size, int(slots[-1]) + 1, size)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="packed") as pool:
            try:
                for done in pool.map(one, starts):
                    progress(done)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _read(self, split: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        images, _, slots, labels = self._splits[split]
        batch = torch.empty((len(chosen), *images.shape[1:]), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        # mode="clip" writes to `out` at once; indices were checked
        np.take(images, slots[chosen].numpy(), axis=0, out=batch.numpy(), mode="clip")
        return batch.permute(0, 3, 1, 2), labels[chosen]

    def _read_ahead(self, split: str, indices: Sequence[Tensor]) -> None:
        """Ask the system to read these pictures in the order of the disk."""
        if not indices or not hasattr(mmap, "MADV_WILLNEED"):
            return
        images, memory, slots, _ = self._splits[split]
        record = images[0].nbytes
        wanted = slots[torch.cat(list(indices))].unique()  # sorted
        for run in torch.tensor_split(wanted, (torch.nonzero(wanted.diff() != 1).flatten() + 1).tolist()):
            start = int(run[0]) * record // mmap.PAGESIZE * mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, start, (int(run[-1]) + 1) * record - start)


def verify(root: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Read everything again and compare with the checksums; returns the number of bytes of pictures.

    progress: told (bytes done, bytes in all).  Raises ValueError that names the damaged files and places.
    """
    meta = read_meta(root)
    record = meta["size"] ** 2 * 3
    total = sum(split["slots"] for split in meta["splits"].values()) * record
    done = 0
    damaged = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for split, described in meta["splits"].items():
            for name in ("labels.npy", "paths.json"):
                read_file(root, f"{split}.{name}", described[name.partition(".")[0]])
            images, _ = images_of(root, split, meta)
            size = meta["chunk"]
            chunks = [images[start : start + size] for start in range(0, len(images), size)]
            digests = pool.map(lambda chunk: hashlib.sha256(chunk).hexdigest(), chunks)
            for number, (digest, wanted) in enumerate(zip(digests, described["sha256"], strict=True)):
                if digest != wanted:
                    damaged.append(
                        f"{split}.images, pictures {number * size} to {number * size + len(chunks[number]) - 1}"
                    )
                done += chunks[number].nbytes
                if progress:
                    progress(done, total)
    if damaged:
        raise ValueError(f"{root} is damaged: {'; '.join(damaged)}")
    return total
