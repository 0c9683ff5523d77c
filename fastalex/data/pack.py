"""Packing: from encoded pictures of any size to the fixed-size records of `fastalex.data.packed`.

Each picture's short side is resized to the size of a record and the middle square is kept (Krizhevsky et al. 2012,
section 2), with torchvision's rules.  Processes decode chunks of CHUNK pictures; a chunk counts as done when its
pixels are on the disk and its entry in `progress/` has its name.  All that happens in `DST.partial`, which becomes
`DST` at the end: a run that was killed goes on with the chunks that are missing, and a set is whole or not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from PIL import Image

from fastalex.data import sources
from fastalex.data.decode import decode, square
from fastalex.data.packed import FORMAT, META, VERSION, checksum, is_packed, read_meta
from fastalex.data.sources import Item, Source
from fastalex.files import replacing, sync_folder
from fastalex.words import counted

# Pictures that one process packs at a time, and that one checksum covers: 50 MB at 256x256, less than a second.
CHUNK = 256
# Neighbours in a packed training set are a random sample of it.
ORDER_SEED = 2012
PLAN, PROGRESS, LOCK = "plan.json", "progress", "lock"


class Failure(NamedTuple):
    """A picture that could not be read."""

    picture: str
    reason: str


@dataclass(frozen=True)
class Packed:
    """What `pack` did.  pictures: readable ones by split; resumed: pictures that an earlier run had packed."""

    pictures: dict[str, int]
    failures: list[Failure]
    ignored: int
    resumed: int


Progress = Callable[[int, int, list[Failure]], None]
"""Told (pictures done, pictures in all, new failures) after each chunk."""


# ----------------------------------------------------------------------------------------------------- one picture
def moments(pixels: np.ndarray) -> np.ndarray:
    """Sums over uint8 pixels (..., 3) of the products of any two of (R, G, B, 1): float64 (4, 4), exact.

    float32 products, 256 pixels at a time: their sums stay below 256 * 255^2 < 2^24, and cost a third of float64's.
    """
    values = pixels.reshape(-1, 3)
    blocks = np.zeros((-(-len(values) // 256) * 256, 4), np.float32)
    blocks[: len(values), :3] = values
    blocks[: len(values), 3] = 1
    stacked = blocks.reshape(-1, 256, 4)
    return (stacked.transpose(0, 2, 1) @ stacked).sum(0, dtype=np.float64)


# -------------------------------------------------------------------------------------------------------- one chunk
@dataclass(frozen=True)
class Chunk:
    """Work for one process: the pictures of the slots from `first`, into the file `folder/split.images`.

    entry: the file that says that the chunk is done.
    """

    kind: str
    root: Path
    folder: Path
    split: str
    first: int
    items: list[Item]
    size: int
    on_error: Literal["stop", "skip"]
    entry: Path


def record_of(chunk: Chunk, item: Item) -> np.ndarray:
    """Raises OSError or ValueError for a picture that cannot be read."""
    content = sources.load(chunk.kind, chunk.root, item)
    if isinstance(content, bytes):
        return decode(content, chunk.size)
    if len(content) == chunk.size:
        return np.ascontiguousarray(content)
    return square(Image.fromarray(content), chunk.size)


def pack_chunk(chunk: Chunk) -> dict[str, Any]:
    """Write the chunk's records, then its entry; returns the entry."""
    digest = hashlib.sha256()
    labels, failures = [], []
    sums = np.zeros((4, 4))
    path = chunk.folder / f"{chunk.split}.images"
    try:
        with path.open("r+b") as file:
            file.seek(chunk.first * chunk.size**2 * 3)
            for item in chunk.items:
                pixels, label = np.zeros((chunk.size, chunk.size, 3), np.uint8), -1
                try:
                    pixels, label = record_of(chunk, item), item.label
                except (OSError, ValueError) as error:
                    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                    if chunk.on_error == "stop":
                        raise ValueError(
                            f"{chunk.root / item.name}: {reason} (--on-error skip leaves such pictures out)"
                        ) from None
                    failures.append(Failure(item.name, reason))
                labels.append(label)
                digest.update(pixels.data)
                file.write(pixels.data)
                if label >= 0:
                    sums += moments(pixels)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # those of reading are failures of their picture
        raise OSError(f"cannot write {path}: {error.strerror or error}; the same command goes on from here") from error
    entry = {
        "sha256": digest.hexdigest(),
        "labels": labels,
        "failures": failures,
        # integers, and exact: 256 pictures of 4096x4096 stay below 2^53
        "moments": sums.astype(np.int64).tolist(),
    }
    with replacing(chunk.entry) as temporary:
        temporary.write_text(json.dumps(entry))
    return entry


def start_worker() -> None:
    """Ends the worker with its parent, also one that was killed, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about EXIF data and large pictures
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow(sentinel: int) -> None:
            multiprocessing.connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()


# ---------------------------------------------------------------------------------------------------------- the set
def plan_of(source: Source, size: int) -> tuple[dict[str, list[Item]], str]:
    """The pictures of each split in the order of their slots, and a fingerprint of all that decides the result."""
    plan = dict(source.splits)
    if "train" in plan:
        order = np.random.default_rng(ORDER_SEED).permutation(len(plan["train"]))
        plan["train"] = [plan["train"][i] for i in order]
    digest = hashlib.sha256(repr((VERSION, size, CHUNK, source.kind, source.classes, source.names)).encode())
    for split, items in plan.items():
        for item in items:
            digest.update(repr((split, *item)).encode())
    return plan, digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises ValueError if another process holds the folder; a lock ends with its process, however that ends."""
    with (folder / LOCK).open("w") as file:
        if os.name != "nt":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is packing into {folder}") from None
        yield


def statistics(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, deviation and principal components of RGB values in [0, 1], from the exact sums of the chunks."""
    # Python's integers: those of a large set pass 2^63
    sums = np.sum([np.array(entry["moments"], object) for entry in entries], axis=0)
    mean = (sums[:3, 3] / sums[3, 3]).astype(np.float64)
    covariance = (sums[:3, :3] / sums[3, 3]).astype(np.float64) - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance / 255**2)
    # either sign is an eigenvector: take the one whose components sum to more
    vectors = vectors.T * np.where(vectors.sum(0) < 0, -1, 1)[:, None]
    return {
        "mean": (mean / 255).tolist(),
        "std": np.sqrt(covariance.diagonal().clip(0) / 255**2).tolist(),
        "eigenvalues": values[::-1].clip(0).tolist(),
        "eigenvectors": vectors[::-1].tolist(),
    }


def pack(
    source: Path,
    target: Path,
    *,
    size: int | None = None,
    workers: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    val_labels: Path | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Pack the pictures of a folder (see `fastalex.data.sources.find`) into the new folder `target`.

    size: height and width of the records, by default 256, and 32 for CIFAR-10. workers: processes, 0 for this one,
    by default one per core. on_error: "stop" at the first picture that cannot be read, or "skip" it and list it. A
    run that was stopped or killed goes on from its last chunks when it is called again; the result is the same, bit
    for bit, as is that of any number of workers. If `target` holds the same set already, nothing is done.

    Raises FileNotFoundError, OSError (a full disk), or ValueError: nothing to pack, a picture that cannot be read,
    another set in `target`, another process at work.
    """
    if size is not None and not 1 <= size <= 4096:
        raise ValueError(f"size must lie in [1, 4096], got {size}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ValueError(f"{target} lies in {source}: the packed set must be outside of what is packed")
    found = sources.find(source, val_labels)
    size = size or found.size
    plan, fingerprint = plan_of(found, size)
    if target.exists():
        if is_packed(target) and read_meta(target)["plan"] == fingerprint:
            remove_traces(target)
            return summary(read_meta(target), found, resumed=sum(map(len, plan.values())))
        raise ValueError(f"{target} exists and is not this set: choose another folder or remove it")

    partial = target.with_name(f"{target.name}.partial")
    (partial / PROGRESS).mkdir(parents=True, exist_ok=True)
    with locked(partial):
        begun = partial / PLAN
        if begun.exists() and json.loads(begun.read_text()) != fingerprint:
            raise ValueError(f"{partial} was begun with other pictures or options: remove it, or choose another target")
        with replacing(begun) as temporary:
            temporary.write_text(json.dumps(fingerprint))
        chunks = [
            Chunk(
                found.kind,
                found.root,
                partial,
                split,
                first,
                items[first : first + CHUNK],
                size,
                on_error,
                entry=partial / PROGRESS / f"{split}-{first // CHUNK:06d}.json",
            )
            for split, items in plan.items()
            for first in range(0, len(items), CHUNK)
        ]
        entries = {chunk.entry: json.loads(chunk.entry.read_text()) for chunk in chunks if chunk.entry.exists()}
        if on_error == "stop":  # what an earlier run skipped gets another chance
            entries = {path: entry for path, entry in entries.items() if not entry["failures"]}
        resumed = sum(len(chunk.items) for chunk in chunks if chunk.entry in entries)
        missing = [chunk for chunk in chunks if chunk.entry not in entries]
        make_room(partial, plan, missing, size)
        run(
            missing,
            entries,
            available_cores() if workers is None else workers,
            resumed,
            sum(map(len, plan.values())),
            progress,
        )
        meta = finish(partial, found, plan, chunks, entries, size, fingerprint)
        os.rename(partial, target)
        sync_folder(target.parent)
    remove_traces(target)
    return summary(meta, found, resumed)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_room(partial: Path, plan: dict[str, list[Item]], missing: list[Chunk], size: int) -> None:
    """Files of the final size.  Raises OSError where the disk cannot hold them."""
    record = size**2 * 3
    needed, free = sum(len(chunk.items) for chunk in missing) * record, shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(f"not enough room in {partial.parent}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    for split, items in plan.items():
        with (partial / f"{split}.images").open("ab") as file:
            file.truncate(len(items) * record)


def run(
    missing: list[Chunk],
    entries: dict[Path, dict[str, Any]],
    workers: int,
    done: int,
    total: int,
    progress: Progress | None,
) -> None:
    """Pack the missing chunks in processes, or without any in this one, and add their entries."""

    def report(new: list[Failure]) -> None:
        if progress:
            progress(done, total, new)

    def add(chunk: Chunk, entry: dict[str, Any]) -> None:
        nonlocal done
        entries[chunk.entry] = entry
        done += len(chunk.items)
        report([Failure(*failure) for failure in entry["failures"]])

    report([])
    if not missing:
        return
    if workers == 0:
        for chunk in missing:
            add(chunk, pack_chunk(chunk))
        return
    # a fork of this process would copy locks that its threads hold; the server imports everything once
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload([__name__])
    waiting = iter(missing)
    running: dict[Future[dict[str, Any]], Chunk] = {}
    workers = min(workers, len(missing))
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker)
    try:
        while True:
            # a queue as long as needed: the chunks of a large set are many
            for chunk in waiting:
                running[pool.submit(pack_chunk, chunk)] = chunk
                if len(running) == 2 * workers:
                    break
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                add(running.pop(future), future.result())
    except BrokenProcessPool:
        raise OSError(
            "a packing process ended abruptly, perhaps for lack of memory: the same command goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def finish(
    partial: Path,
    source: Source,
    plan: dict[str, list[Item]],
    chunks: list[Chunk],
    entries: dict[Path, dict[str, Any]],
    size: int,
    fingerprint: str,
) -> dict[str, Any]:
    """Labels, paths and, last, meta.json of a set whose chunks are all done; returns what meta.json holds."""
    splits: dict[str, dict[str, Any]] = {}
    failures = {}
    for split, items in plan.items():
        done = [entries[chunk.entry] for chunk in chunks if chunk.split == split]
        labels = np.array([label for entry in done for label in entry["labels"]], np.int32)
        failures[split] = [failure for entry in done for failure in entry["failures"]]
        if not (labels >= 0).any():
            first = failures[split][0]
            what = f"none of the {counted(len(items), 'picture')} of {split!r} could be read"
            raise ValueError(f"{what}: {first.picture} {first.reason}")
        content = io.BytesIO()
        np.save(content, labels)
        files = {"labels.npy": content.getvalue(), "paths.json": json.dumps([item.name for item in items]).encode()}
        for name, bytes_ in files.items():
            with replacing(partial / f"{split}.{name}") as temporary:
                temporary.write_bytes(bytes_)
        splits[split] = {
            "slots": len(items),
            "pictures": int((labels >= 0).sum()),
            "sha256": [entry["sha256"] for entry in done],
            "labels": hashlib.sha256(files["labels.npy"]).hexdigest(),
            "paths": hashlib.sha256(files["paths.json"]).hexdigest(),
        }
    measured = "train" if "train" in plan else "test"
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "size": size,
        "chunk": CHUNK,
        "source": {"kind": source.kind, "path": str(source.root)},
        "classes": list(source.classes),
        "names": list(source.names),
        "splits": splits,
        "statistics": {
            "split": measured,
            **statistics([entries[chunk.entry] for chunk in chunks if chunk.split == measured]),
        },
        "failures": failures,
        "decoder": f"Pillow {PIL.__version__}",
        "plan": fingerprint,
    }
    # through JSON, so that the checksum sees what a reader sees
    meta = json.loads(json.dumps(meta))
    with replacing(partial / META) as temporary:
        temporary.write_text(json.dumps({**meta, "checksum": checksum(meta)}, indent=1), encoding="utf-8")
    sync_folder(partial)
    return meta


def remove_traces(target: Path) -> None:
    """What only packing needed."""
    shutil.rmtree(target / PROGRESS, ignore_errors=True)
    for name in (PLAN, LOCK):
        (target / name).unlink(missing_ok=True)


def summary(meta: dict[str, Any], source: Source, resumed: int) -> Packed:
    return Packed(
        {split: described["pictures"] for split, described in meta["splits"].items()},
        [Failure(*failure) for failures in meta["failures"].values() for failure in failures],
        source.ignored,
        resumed,
    )
