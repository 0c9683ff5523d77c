"""Where pictures come from: folders of classes, the layout of ILSVRC, the files of CIFAR-10, WebDataset tars.

`find` looks at a folder and lists what is in it, `Source.load` reads one picture of the list.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastalex.words import counted

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TAR_ENDINGS = ("jpg", "jpeg", "png")
GROUND_TRUTHS = ("LOC_val_solution.csv", "val.txt", "ILSVRC2012_validation_ground_truth.txt")
WORDS = ("synset_words.txt", "LOC_synset_mapping.txt")

CIFAR_SIZE = 32
CIFAR_BYTES = 3 * CIFAR_SIZE**2
CIFAR_CLASSES: tuple[str, ...] = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR_FOLDERS = {"cifar10-binary": "cifar-10-batches-bin", "cifar10-python": "cifar-10-batches-py"}


class Item(NamedTuple):
    """One picture: `length` bytes at `offset` of `file`, a path relative to the source (0: the whole file).

    `member` names it where the file holds several; in a CIFAR-10 pickle, `offset` is its row.
    """

    file: str
    label: int
    offset: int = 0
    length: int = 0
    member: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}: {self.member}" if self.member else self.file


@dataclass(frozen=True)
class Source:
    """Labelled pictures.  kind: "folders", "ilsvrc", "cifar10-binary", "cifar10-python" or "webdataset".

    classes: what labels point to, as the source calls them; names: for people.  splits: "train", "test" or both.
    ignored: files among the pictures that do not look like one.
    """

    kind: str
    root: Path
    classes: tuple[str, ...]
    names: tuple[str, ...]
    splits: dict[str, list[Item]]
    ignored: int = 0

    @property
    def size(self) -> int:
        """Height and width of the records that this source is usually packed to."""
        return CIFAR_SIZE if self.kind.startswith("cifar10") else 256


def load(kind: str, root: Path, item: Item) -> bytes | np.ndarray:
    """An encoded picture, or uint8 pixels (H, W, 3) where the source has pixels."""
    path = root / item.file
    if kind == "cifar10-python":
        pixels = read_cifar_pickle(path)[0][item.offset]
    else:
        with path.open("rb") as file:
            file.seek(item.offset)
            content = file.read(item.length or -1)
        if kind != "cifar10-binary":
            return content
        pixels = np.frombuffer(content, np.uint8)
    return pixels.reshape(3, CIFAR_SIZE, CIFAR_SIZE).transpose(1, 2, 0)


def find(root: Path, val_labels: Path | None = None) -> Source:
    """What a folder holds.

    `val_labels`: ground truth of a flat ILSVRC validation folder, where it is not one of GROUND_TRUTHS in the root or
    in the devkit beside it.  Raises FileNotFoundError where there is no folder, ValueError, naming the place, for
    what cannot be understood.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    for kind, name in CIFAR_FOLDERS.items():
        first = "data_batch_1.bin" if kind == "cifar10-binary" else "data_batch_1"
        for folder in (root, root / name):
            if (folder / first).is_file():
                return find_cifar(kind, folder)
    if any(root.glob("*.tar")) or any(root.glob("train/*.tar")):
        return find_webdataset(root)
    return find_folders(root, val_labels)


# ------------------------------------------------------------------------------------------------------ folders
def subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def pictures_below(root: Path, folder: str) -> tuple[list[str], int]:
    """Paths relative to `root` of all pictures below `root/folder`, sorted, and how many other files there are."""
    found = []
    others = 0
    for place, _, files in os.walk(root / folder, followlinks=True):
        for name in files:
            if name.lower().endswith(ENDINGS):
                found.append(os.path.relpath(os.path.join(place, name), root))
            elif not name.startswith("."):
                others += 1
    return sorted(found), others


def find_folders(root: Path, val_labels: Path | None) -> Source:
    """root/train/CLASS/..., root/val/CLASS/... (or test), or root/CLASS/...; val may be flat with a ground truth."""
    test = "test" if (root / "test").is_dir() and subfolders(root / "test") else "val"
    places = {split: name for split, name in (("train", "train"), ("test", test)) if (root / name).is_dir()}
    if not places:
        places = {"train": "."}
    # the labels of a flat folder are indices into the classes of the training pictures
    flat = "train" in places and "test" in places and not subfolders(root / places["test"])
    listed: dict[str, dict[str, list[str]]] = {}
    ignored = 0
    for split, place in places.items():
        listed[split] = {}
        if split == "test" and flat:
            continue
        for name in subfolders(root / place):
            files, others = pictures_below(root, os.path.normpath(os.path.join(place, name)))
            if not files:
                raise ValueError(f"no pictures in {root / place / name} (endings {', '.join(ENDINGS)})")
            listed[split][name] = files
            ignored += others
    classes = tuple(next(iter(listed.values())))
    if not classes:
        raise ValueError(
            f"nothing to pack in {root}: expected train/CLASS/*.jpg and val/CLASS/*.jpg, *.tar of a WebDataset, "
            "or the files of CIFAR-10"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    splits = {}
    for split, by_class in listed.items():
        unknown = sorted(set(by_class) - set(classes))
        if unknown:
            raise ValueError(f"{root / places[split]} holds classes that {root / places['train']} has not: {unknown}")
        splits[split] = [Item(file, numbers[name]) for name, files in by_class.items() for file in files]
    if flat:
        files, others = pictures_below(root, places["test"])
        ignored += others
        if not files:
            raise ValueError(f"no pictures in {root / places['test']}")
        splits["test"] = label_flat(root, files, numbers, val_labels)
    kind = "ilsvrc" if flat else "folders"
    return Source(kind, root, classes, words(root, classes), splits, ignored)


def words(root: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Names for people from lines "n01440764 tench, Tinca tinca" in one of WORDS; without it, the classes."""
    meanings = {}
    for path in (folder / name for folder in (root, root.parent) for name in WORDS):
        if path.is_file():
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            meanings = dict(line.strip().split(" ", 1) for line in lines if " " in line.strip())
            break
    return tuple(meanings.get(name, name) for name in classes)


def label_flat(root: Path, files: list[str], numbers: dict[str, int], given: Path | None) -> list[Item]:
    """Labels of a flat validation folder.

    The ground truth holds one line a picture: "NAME LABEL", "NAME,LABEL ..." (Kaggle's, with a heading), or LABEL
    alone for the sorted files.  LABEL is a class's folder name, its index from 0, or, where none is 0, the number
    that the development kit's meta.mat, beside the file, gives it.
    """
    if given is not None and not given.is_file():
        raise FileNotFoundError(f"no file {given}")
    places = [root, root / "val", *sorted(root.glob("*devkit*/data")), root.parent]
    candidates = [given] if given else [place / name for place in places for name in GROUND_TRUTHS]
    truth = next((path for path in candidates if path.is_file()), None)
    if truth is None:
        raise ValueError(
            f"{root / os.path.dirname(files[0])} is flat: its labels belong in {root}, in {', '.join(GROUND_TRUTHS)}, "
            "or name their file with --val-labels"
        )
    lines = truth.read_text(encoding="utf-8-sig").splitlines()
    if truth.suffix == ".csv":
        rows = [[row[0], row[1].split()[0]] for row in csv.reader(lines[1:]) if len(row) > 1 and row[1].split()]
    else:
        rows = [line.split() for line in lines if line.strip()]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(files):
            raise ValueError(f"{truth} has {counted(len(rows), 'label')} for {counted(len(files), 'picture')}")
        rows = [[file, *row] for file, row in zip(files, rows, strict=True)]
    labels = {Path(row[0]).stem: row[-1] for row in rows}
    if all(label.isdecimal() for label in labels.values()) and "0" not in labels.values():
        labels = by_devkit(truth, labels)
    items = []
    for file in files:
        label = labels.get(Path(file).stem)
        if label is None:
            raise ValueError(f"{truth} has no label for {file}")
        number = numbers.get(label, int(label) if label.isdecimal() else -1)
        if not 0 <= number < len(numbers):
            raise ValueError(f"{truth} gives {file} the label {label}, which is none of the {len(numbers)} classes")
        items.append(Item(file, number))
    return items


def by_devkit(truth: Path, labels: dict[str, str]) -> dict[str, str]:
    """ILSVRC's own numbers, from 1, as folder names."""
    meta = truth.with_name("meta.mat")
    if not meta.is_file():
        raise ValueError(
            f"{truth} numbers the classes from 1, in an order that only the development kit's meta.mat knows: "
            f"put that file beside it, or take a list of folder names or of indices from 0"
        )
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise ValueError(f"reading {meta} needs scipy: pip install scipy") from None
    synsets = loadmat(str(meta), squeeze_me=True, struct_as_record=False)["synsets"]
    folders = {str(int(synset.ILSVRC2012_ID)): str(synset.WNID) for synset in np.atleast_1d(synsets)}
    unknown = sorted(set(labels.values()) - set(folders))
    if unknown:
        raise ValueError(f"{meta} does not know the class numbers {unknown} of {truth}")
    return {name: folders[label] for name, label in labels.items()}


# ----------------------------------------------------------------------------------------------------- CIFAR-10
class PlainArrays(pickle.Unpickler):
    """Reads pickles of lists, strings and NumPy arrays, and refuses all others: a pickle may run any program."""

    ALLOWED = frozenset(
        [
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        ]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR-10 has no use for")
        return super().find_class(module, name)


def unpickle(path: Path) -> dict[bytes, Any]:
    try:
        content = PlainArrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # whatever a pickle of foreign bytes asks for
        raise ValueError(f"{path} is not one of CIFAR-10's pickles: {error or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not one of CIFAR-10's pickles: it holds a {type(content).__name__}")
    return content


# all six files are 180 MB, and a shuffled chunk needs every one
@functools.lru_cache(maxsize=6)
def read_cifar_pickle(path: Path) -> tuple[np.ndarray, list[int], list[bytes]]:
    """Pixels uint8 (N, 3072), labels and names of one file of the Python version."""
    content = unpickle(path)
    pixels, labels = content.get(b"data"), content.get(b"labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (CIFAR_BYTES,):
        raise ValueError(f"{path} is not one of CIFAR-10's pickles: no uint8 data of {CIFAR_BYTES} bytes a picture")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise ValueError(f"{path} is not one of CIFAR-10's pickles: no label for each picture")
    names = content.get(b"filenames") or [b"picture %d" % i for i in range(len(labels))]
    return pixels, labels, names


def find_cifar(kind: str, folder: Path) -> Source:
    ending = ".bin" if kind == "cifar10-binary" else ""
    files = {"train": [f"data_batch_{i}{ending}" for i in range(1, 6)], "test": [f"test_batch{ending}"]}
    missing = [name for names in files.values() for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}")
    classes = CIFAR_CLASSES
    if (folder / "batches.meta.txt").is_file():
        classes = tuple((folder / "batches.meta.txt").read_text(encoding="utf-8-sig").split()) or CIFAR_CLASSES
    elif kind == "cifar10-python" and (folder / "batches.meta").is_file():
        classes = tuple(name.decode() for name in unpickle(folder / "batches.meta")[b"label_names"])
    read = cifar_binary_items if kind == "cifar10-binary" else cifar_python_items
    splits = {split: [item for name in names for item in read(folder, name)] for split, names in files.items()}
    wrong = next((item for items in splits.values() for item in items if not 0 <= item.label < len(classes)), None)
    if wrong:
        raise ValueError(f"{folder / wrong.file}: {wrong.member} has label {wrong.label} of {len(classes)} classes")
    return Source(kind, folder, classes, classes, splits)


def cifar_binary_items(folder: Path, name: str) -> Iterator[Item]:
    content = np.fromfile(folder / name, np.uint8)
    if content.size % (1 + CIFAR_BYTES) or not content.size:
        raise ValueError(
            f"{folder / name} has {content.size:,} bytes, no whole number of records of {1 + CIFAR_BYTES}: is it cut?"
        )
    for i, label in enumerate(content[:: 1 + CIFAR_BYTES].tolist()):
        yield Item(name, label, i * (1 + CIFAR_BYTES) + 1, CIFAR_BYTES, f"picture {i}")


def cifar_python_items(folder: Path, name: str) -> Iterator[Item]:
    _, labels, names = read_cifar_pickle(folder / name)
    for i, (label, member) in enumerate(zip(labels, names, strict=True)):
        yield Item(name, int(label), i, CIFAR_BYTES, member.decode(errors="replace"))


# --------------------------------------------------------------------------------------------------- WebDataset
def find_webdataset(root: Path) -> Source:
    """Tars of KEY.jpg and KEY.cls.  Those whose path starts with val or test are the test split, others train."""
    tars = sorted(os.path.relpath(path, root) for path in (*root.glob("*.tar"), *root.glob("*/*.tar")))
    splits: dict[str, list[Item]] = {}
    ignored = 0
    for name in tars:
        items, others = tar_items(root, name)
        splits.setdefault("test" if name.startswith(("val", "test")) else "train", []).extend(items)
        ignored += others
    splits = {split: splits[split] for split in ("train", "test") if splits.get(split)}
    if not splits:
        raise ValueError(f"no pictures in the tars of {root}: expected members KEY.jpg and KEY.cls")
    classes = tuple(str(i) for i in range(1 + max(item.label for items in splits.values() for item in items)))
    return Source("webdataset", root, classes, classes, splits, ignored)


def tar_items(root: Path, name: str) -> tuple[list[Item], int]:
    pictures: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    others = 0
    try:
        # "r:" takes no compression: pictures are read at their offsets later
        with tarfile.open(root / name, "r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                key, _, ending = base.partition(".")
                key, ending = os.path.join(folder, key), ending.lower()
                if not member.isfile():
                    continue
                if ending in TAR_ENDINGS:
                    if key in pictures:
                        raise ValueError(f"{root / name} holds two pictures called {key}")
                    pictures[key] = member
                elif ending == "cls":
                    file = tar.extractfile(member)
                    text = file.read(32).removeprefix(codecs.BOM_UTF8).strip() if file else b""
                    if not text.isdigit():
                        raise ValueError(f"{root / name}: {member.name} must hold a class number, got {text!r}")
                    labels[key] = int(text)
                else:
                    others += 1
    except tarfile.ReadError as error:
        raise ValueError(f"{root / name} is not an uncompressed tar, or it is cut: {error}") from None
    missing = next((key for key in pictures if key not in labels), None)
    if missing is not None:
        raise ValueError(f"{root / name} holds {pictures[missing].name}, but no {missing}.cls with its label")
    items = [Item(name, labels[key], member.offset_data, member.size, member.name) for key, member in pictures.items()]
    return items, others
