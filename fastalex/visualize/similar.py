"""Similar pictures: nearest neighbours by Euclidean distance in the last hidden layer (the paper, section 6.1).

The features of a collection are kept in an index file.  It is used again for the same weights, preprocessing and
pictures; of a folder that changed, only the new and changed files are computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastalex.alexnet import AlexNet
from fastalex.checkpoint import ModelCard
from fastalex.data import fashion_mnist
from fastalex.data.image_sets import FashionMNIST
from fastalex.data.packed import PackedSet, is_packed, read_meta
from fastalex.data.preprocessing import Preprocessing
from fastalex.data.sources import ENDINGS, pictures_below
from fastalex.evaluation.classifier import read_picture
from fastalex.files import replacing
from fastalex.visualize.activations import hidden_features

BATCH = 32
INDEX = "index.safetensors"
FORMAT = "fastalex features 1"


class Collection(Protocol):
    names: list[str]
    stamps: list[str]
    """One text a picture that changes when the picture does."""

    def pictures(self, places: Sequence[int]) -> Iterator[Tensor | ValueError]:
        """uint8 (C, H, W), or what is wrong with the file, in this order."""
        ...


class Folder:
    """All picture files below a folder.  Raises FileNotFoundError for a missing one, ValueError for one without any."""

    def __init__(self, root: Path, preprocessing: Preprocessing) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}")
        self.root, self._preprocessing = root, preprocessing
        self.names, _ = pictures_below(root, ".")
        if not self.names:
            raise ValueError(f"no pictures in {root} (endings {', '.join(ENDINGS)})")
        states = [(root / name).stat() for name in self.names]
        self.stamps = [f"{state.st_size} {state.st_mtime_ns}" for state in states]

    def pictures(self, places: Sequence[int]) -> Iterator[Tensor | ValueError]:
        def read(place: int) -> Tensor | ValueError:
            try:
                return read_picture(self.root / self.names[place], self._preprocessing)
            except ValueError as error:
                return error

        with ThreadPoolExecutor(4) as pool:  # Pillow decodes without holding Python's lock
            yield from pool.map(read, places)


class OfSet:
    """The test pictures of a packed set or of the Fashion-MNIST sample; training pictures where there are no others."""

    def __init__(self, root: Path | None, preprocessing: Preprocessing) -> None:
        if root is None:
            self._split = "test"
            self._set: FashionMNIST | PackedSet = FashionMNIST(preprocessing)
            labels = fashion_mnist.load(self._split).labels.tolist()
            self.names = [f"{fashion_mnist.CLASSES[label]} {i}" for i, label in enumerate(labels)]
            self.stamps = [fashion_mnist.SHA256] * len(self.names)
            return
        meta = read_meta(root)
        self._split = "test" if "test" in meta["splits"] else "train"
        self._set = packed = PackedSet(root, preprocessing, splits=(self._split,))
        self.names = packed.paths(self._split)
        # of the pixels: a packed folder that was copied or touched is the same
        digest = hashlib.sha256(json.dumps(meta["splits"][self._split], sort_keys=True).encode()).hexdigest()
        self.stamps = [digest] * len(self.names)

    def pictures(self, places: Sequence[int]) -> Iterator[Tensor | ValueError]:
        batches = torch.tensor(places, dtype=torch.int64).split(BATCH)
        for images, _ in self._set.batches(self._split, batches):
            yield from images


def open_collection(data: Path | None, preprocessing: Preprocessing) -> Collection:
    """A folder of pictures, a packed set, or (None) the sample that ships with the package."""
    return Folder(data, preprocessing) if data is not None and not is_packed(data) else OfSet(data, preprocessing)


class Index(NamedTuple):
    """features: fp32 (N, D).  places: the picture of the collection behind each row.  computed: rows made anew."""

    features: Tensor
    places: list[int]
    computed: int


def identity(model: AlexNet, preprocessing: Preprocessing) -> str:
    """A hash of everything that the features depend on apart from the pictures."""
    digest = hashlib.sha256(json.dumps([asdict(model.variant), asdict(preprocessing)]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


@torch.inference_mode()
def features_of(model: AlexNet, pictures: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    """uint8 pictures (C, H, W) -> fp32 (N, D) on the CPU, one centre crop each."""
    device = next(model.parameters()).device
    inputs = torch.cat([preprocessing.for_evaluation(picture[None].to(device)) for picture in pictures])
    return hidden_features(model, inputs).float().cpu()


def build(
    path: Path,
    model: AlexNet,
    card: ModelCard,
    collection: Collection,
    report: Callable[[str], None] = print,
) -> Index:
    """The index of a collection, from the file `path` as far as that still holds, which is written anew otherwise.

    Unreadable pictures are reported and left out.  Raises ValueError if none can be read.
    """
    same = identity(model, card.preprocessing)
    known, old = _load(path, same)
    rows: dict[int, Tensor] = {}
    missing = []
    for place, key in enumerate(zip(collection.names, collection.stamps, strict=True)):
        if key in known:
            rows[place] = old[known[key]]
        else:
            missing.append(place)
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        good: dict[int, Tensor] = {}
        for place, picture in zip(batch, collection.pictures(batch), strict=True):
            if isinstance(picture, ValueError):
                report(f"left out: {picture}")
            else:
                good[place] = picture
        if good:
            rows.update(zip(good, features_of(model, list(good.values()), card.preprocessing), strict=True))
        if start % (10 * BATCH) == 0 and start:
            report(f"{start:,} of {len(missing):,} pictures")
    if not rows:
        raise ValueError("none of the pictures can be read")
    places = sorted(rows)
    index = Index(torch.stack([rows[place] for place in places]), places, len(set(missing) & set(places)))
    if index.computed or len(known) != len(places):
        _save(path, same, index, collection)
    return index


def _save(path: Path, same: str, index: Index, collection: Collection) -> None:
    from safetensors.torch import save_file

    keys = [[collection.names[place], collection.stamps[place]] for place in index.places]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(
            {"features": index.features},
            temporary,
            metadata={"format": FORMAT, "identity": same, "pictures": json.dumps(keys)},
        )


def _load(path: Path, same: str) -> tuple[dict[tuple[str, str], int], Tensor]:
    """Rows of an index file by picture; none from a file of other weights, or that cannot be read."""
    from safetensors import SafetensorError, safe_open

    nothing: dict[tuple[str, str], int] = {}
    if not path.is_file():
        return nothing, torch.empty(0)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("identity") != same:
                return nothing, torch.empty(0)
            features = file.get_tensor("features")
        return {(name, stamp): row for row, (name, stamp) in enumerate(json.loads(metadata["pictures"]))}, features
    except (SafetensorError, OSError, KeyError, ValueError):
        return nothing, torch.empty(0)


def nearest(features: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest rows of (N, D) for each of (Q, D): distances fp32 (Q, count), ascending, and rows int64.

    By differences, not by products: equal rows have distance 0 exactly.  An index of faiss is not worth its weight
    here: 6 queries among 50,000 rows of 4096 took 1.0 s of one core, with faiss's flat index 0.3 s and 0.5 s to build
    it, where computing the features of 50,000 pictures takes tens of minutes.
    Raises ValueError if there are fewer rows.
    """
    if not 0 < count <= len(features):
        raise ValueError(f"count must lie in [1, {len(features)}], got {count}")
    distances = torch.cdist(queries, features, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(count, largest=False)


class Match(NamedTuple):
    name: str
    picture: Tensor
    distance: float


class Sheet(NamedTuple):
    """A query and its neighbours, the nearest first."""

    name: str
    picture: Tensor
    matches: list[Match]


def find_similar(
    model: AlexNet, card: ModelCard, collection: Collection, index: Index, queries: Sequence[Path], count: int
) -> list[Sheet]:
    """The neighbours of picture files, or, without any, of six pictures of the collection; never of itself."""
    if queries:
        pictures = [read_picture(path, card.preprocessing) for path in queries]
        names = [path.name for path in queries]
        vectors = features_of(model, pictures, card.preprocessing)
        root = collection.root.resolve() if isinstance(collection, Folder) else None
        own: list[int | None] = [_place(collection.names, root, path) for path in queries]
    else:
        # evenly spread, from the middle of each part: collections are often sorted by class
        shown = min(6, len(index.places))
        chosen = [(2 * i + 1) * len(index.places) // (2 * shown) for i in range(shown)]
        places = [index.places[row] for row in chosen]
        pictures = [picture for picture in collection.pictures(places) if isinstance(picture, Tensor)]
        names = [collection.names[place] for place in places]
        own = [*places]
        vectors = index.features[chosen]
    most = min(count + 1, len(index.places))
    distances, rows = nearest(index.features, vectors, most)
    sheets = []
    for name, picture, self_place, lengths, found in zip(
        names, pictures, own, distances.tolist(), rows.tolist(), strict=True
    ):
        pairs = [(index.places[row], length) for row, length in zip(found, lengths, strict=True)]
        pairs = [pair for pair in pairs if pair[0] != self_place][:count]
        others = collection.pictures([place for place, _ in pairs])
        matches = [
            Match(collection.names[place], other, length)
            for (place, length), other in zip(pairs, others, strict=True)
            if isinstance(other, Tensor)
        ]
        sheets.append(Sheet(name, picture, matches))
    return sheets


def _place(names: list[str], root: Path | None, path: Path) -> int | None:
    """Where a file is in the collection, if it is."""
    if root is None or root not in path.resolve().parents:
        return None
    name = str(path.resolve().relative_to(root))
    return names.index(name) if name in names else None
