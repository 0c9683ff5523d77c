"""Packing: what is understood, what is refused, and that a set is whole or not there."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
import trees
from PIL import Image

from fastalex import cli
from fastalex.data import pack as module
from fastalex.data import sources
from fastalex.data.decode import decode, square
from fastalex.data.pack import moments, pack, pack_chunk
from fastalex.data.packed import PackedSet, read_meta, verify


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Chunks are packed here, one after the other: a pool of processes takes seconds to start."""

    def run(missing, entries, workers, done, total, progress):
        for chunk in missing:
            entries[chunk.entry] = pack_chunk(chunk)
            done += len(chunk.items)
            if progress:
                progress(done, total, [module.Failure(*f) for f in entries[chunk.entry]["failures"]])

    monkeypatch.setattr(module, "run", run)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)


def content(folder):
    """{path: hash} of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pictures(packed, split):
    """{path: (pixels, label)} of a split."""
    paths = packed.paths(split)
    [(images, labels)] = packed.batches(split, [torch.arange(len(paths))])
    return {p: (i.permute(1, 2, 0).numpy(), int(n)) for p, i, n in zip(paths, images, labels, strict=True)}


# ------------------------------------------------------------------------------------------------ layouts
@pytest.mark.parametrize("ground_truth", ["val.txt", "LOC_val_solution.csv"])
def test_imagenet(tmp_path, ground_truth):
    labels = trees.imagenet(tmp_path / "in", ground_truth=ground_truth)
    (tmp_path / "in/train/n01440764/notes.txt").write_text("not a picture")
    done = pack(tmp_path / "in", tmp_path / "out", size=24)
    assert done == module.Packed({"train": 12, "test": 6}, [], 1, 0)
    packed = PackedSet(tmp_path / "out")
    assert packed.classes == tuple(trees.SYNSETS)
    assert packed.names == tuple(trees.SYNSETS.values())
    assert packed.labels("test").tolist() == labels
    assert packed.paths("test") == [f"val/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(6)]
    for split in ("train", "test"):
        for path, (pixels, label) in pictures(packed, split).items():
            trees.assert_is_torchvisions(pixels, Image.open(tmp_path / "in" / path), 24)
            if split == "train":
                assert packed.classes[label] == path.split("/")[1]
    # neighbours are no longer of one class
    assert packed.labels("train").tolist() != sorted(packed.labels("train").tolist())
    assert verify(tmp_path / "out") == 18 * 24 * 24 * 3


def ilsvrc_numbers(root):
    """The ground truth of the development kit: numbers in an order of its own, and meta.mat that explains them."""
    labels = trees.imagenet(root, ground_truth=None)
    numbers = [3, 1, 2]  # of the sorted classes
    kit = root / "ILSVRC2012_devkit_t12/data"
    lines = "".join(f"{numbers[label]}\n" for label in labels)
    trees.write(kit / "ILSVRC2012_validation_ground_truth.txt", lines.encode())
    return labels, kit, dict(zip(numbers, trees.SYNSETS, strict=True))


def test_development_kit(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    labels, kit, wnids = ilsvrc_numbers(tmp_path)
    dtype = [("ILSVRC2012_ID", object), ("WNID", object)]
    synsets = np.array([(number, wnids[number]) for number in sorted(wnids)], dtype)
    scipy_io.savemat(kit / "meta.mat", {"synsets": synsets})
    assert [item.label for item in sources.find(tmp_path).splits["test"]] == labels


def test_development_kit_without_its_key(tmp_path):
    ilsvrc_numbers(tmp_path)
    with pytest.raises(ValueError, match=r"numbers the classes from 1.*meta\.mat"):
        sources.find(tmp_path)


@pytest.mark.parametrize("lines", ["0\n1\n2\n0\n1\n2\n", "n01440764\nn02123045\nn07920052\n" * 2])
def test_labels_in_the_order_of_the_files(tmp_path, lines):
    trees.imagenet(tmp_path, ground_truth=None)
    (tmp_path / "labels").write_text(lines)
    found = sources.find(tmp_path, tmp_path / "labels")
    assert [item.label for item in found.splits["test"]] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (None, r"val is flat: its labels belong in .*LOC_val_solution\.csv, val\.txt"),
        ("0\n1\n", "has 2 labels for 6 pictures"),
        ("ILSVRC2012_val_00000001.JPEG 0\n", "no label for val/ILSVRC2012_val_00000002.JPEG"),
        ("0\n1\n2\n0\n1\n3\n", "the label 3, which is none of the 3 classes"),
        ("n01440764\n" * 5 + "n00000000\n", "the label n00000000"),
    ],
)
def test_wrong_ground_truth(tmp_path, truth, message):
    trees.imagenet(tmp_path, ground_truth=None)
    if truth:
        (tmp_path / "val.txt").write_text(truth)
    with pytest.raises(ValueError, match=message):
        sources.find(tmp_path)


def test_folders_of_classes(tmp_path):
    trees.folders(tmp_path / "in", width=30, height=50)
    pack(tmp_path / "in", tmp_path / "out", size=16)
    packed = PackedSet(tmp_path / "out")
    assert packed.classes == packed.names == ("cat", "dog")
    for path, (pixels, label) in pictures(packed, "test").items():
        trees.assert_is_torchvisions(pixels, Image.open(tmp_path / "in" / path), 16)
        assert path.split("/")[1] == packed.classes[label]


def test_classes_without_a_split_are_training_pictures(tmp_path):
    trees.folders(tmp_path, splits=("a",))
    found = sources.find(tmp_path / "a")
    assert found.classes == ("cat", "dog")
    assert list(found.splits) == ["train"]
    assert found.splits["train"][0].file == "cat/0.jpg"


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("size", [None, 48])
def test_cifar(tmp_path, version, size):
    folder = {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}[version]
    pixels, labels = trees.cifar(tmp_path / "in" / folder, version)
    pack(tmp_path / "in", tmp_path / "out", size=size)
    packed = PackedSet(tmp_path / "out")
    assert packed.count("train") == 15
    assert packed.classes[3] == "cat"
    [(images, found)] = packed.batches("test", [torch.arange(3)])
    assert found.tolist() == labels[15:]
    wanted = pixels[15:] if size is None else [square(Image.fromarray(p), size) for p in pixels[15:]]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(wanted))
    train = sorted((image.tobytes(), label) for image, label in pictures(packed, "train").values())
    if size is None:
        assert train == sorted((image.tobytes(), label) for image, label in zip(pixels[:15], labels[:15], strict=True))


def test_webdataset(tmp_path):
    trees.webdataset(tmp_path / "in")
    done = pack(tmp_path / "in", tmp_path / "out", size=16)
    assert done.pictures == {"train": 7, "test": 7}
    assert done.ignored == 14  # the .json members
    packed = PackedSet(tmp_path / "out")
    assert packed.classes == ("0", "1", "2")
    for split, seed in (("train", 0), ("test", 1000)):
        for path, (pixels, label) in pictures(packed, split).items():
            number = int(path.rpartition("/")[2].partition(".")[0])
            assert label == number % 3
            assert np.array_equal(pixels, decode(trees.encoded(trees.picture(seed + number)), 16))


def cut_tar(root):
    trees.webdataset(root)
    whole = (root / "train-000001.tar").read_bytes()
    (root / "train-000001.tar").write_bytes(whole[: len(whole) // 3])


def tar_without_label(root):
    trees.webdataset(root)
    with tarfile.open(root / "train-000009.tar", "w") as tar:
        info = tarfile.TarInfo("x.jpg")
        tar.addfile(info)


def cut_cifar(root):
    trees.cifar(root, "binary")
    (root / "data_batch_2.bin").write_bytes(b"\0" * 5000)


def part_of_cifar(root):
    trees.cifar(root, "binary")
    (root / "data_batch_4.bin").unlink()


class Bad:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def evil_cifar(root):
    trees.cifar(root, "python")
    (root / "data_batch_1").write_bytes(pickle.dumps({b"data": Bad()}))


def other_classes(root):
    trees.folders(root, splits=("train",))
    trees.folders(root, splits=("val",), classes=("cat", "owl"))


def empty_class(root):
    trees.folders(root)
    (root / "train/eel").mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root.mkdir(), "nothing to pack in .*expected train/CLASS"),
        (empty_class, "no pictures in .*train/eel"),
        (other_classes, r"holds classes that .* has not: \['owl'\]"),
        (cut_tar, "train-000001.tar is not an uncompressed tar, or it is cut"),
        (tar_without_label, r"holds x\.jpg, but no x\.cls"),
        (cut_cifar, "data_batch_2.bin has 5,000 bytes, no whole number of records of 3073"),
        (part_of_cifar, "lacks data_batch_4.bin"),
        (evil_cifar, r"not one of CIFAR-10's pickles: it asks for \w+\.system"),
    ],
)
def test_sources_that_cannot_be_packed(tmp_path, make, message):
    make(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- statistics
def test_moments_are_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for part in (pixels, pixels[:, :63], np.full((32, 32, 3), 255, np.uint8)):
        values = np.insert(part.reshape(-1, 3), 3, 1, axis=1).astype(np.int64)
        assert moments(part).tolist() == (values.T @ values).tolist()


def test_statistics_of_the_training_pictures(tmp_path):
    trees.folders(tmp_path / "in", per_class=5)
    pack(tmp_path / "in", tmp_path / "out", size=16)
    packed = PackedSet(tmp_path / "out")
    pixels = np.concatenate([p.reshape(-1, 3) for p, _ in pictures(packed, "train").values()]) / 255
    covariance = np.cov(pixels.T, bias=True)
    assert np.allclose(packed.preprocessing.mean, pixels.mean(0))
    assert np.allclose(packed.preprocessing.std, pixels.std(0))
    values, vectors = np.array(packed.colours.values), np.array(packed.colours.vectors)
    assert (np.diff(values) < 0).all()
    assert np.allclose(vectors.T @ np.diag(values) @ vectors, covariance)
    assert np.allclose(vectors @ vectors.T, np.eye(3))


# ----------------------------------------------------------------------------------------- damaged pictures
@pytest.fixture
def damaged(tmp_path):
    """Two of six training pictures are damaged."""
    trees.folders(tmp_path / "in")
    whole = (tmp_path / "in/train/cat/1.jpg").read_bytes()
    (tmp_path / "in/train/cat/1.jpg").write_bytes(whole[:500])
    (tmp_path / "in/train/dog/2.jpg").write_bytes(b"")
    return tmp_path / "in"


def test_the_first_damaged_picture_stops(damaged, tmp_path, capsys):
    pytest.importorskip("tyro")
    with pytest.raises(ValueError, match=r"in/train/(cat/1|dog/2)\.jpg: cannot be decoded.*--on-error skip"):
        pack(damaged, tmp_path / "out", size=16)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="packing has not finished"):
        PackedSet(tmp_path / "out.partial")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pack", str(damaged), str(tmp_path / "out"), "--size", "16"])
    assert stopped.value.code == 2
    assert "cannot be decoded" in capsys.readouterr().err


def test_damaged_pictures_are_skipped_and_listed(damaged, tmp_path, capsys):
    pytest.importorskip("tyro")
    cli.main(["pack", str(damaged), str(tmp_path / "out"), "--size", "16", "--on-error", "skip"])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "skipped train/cat/1.jpg: cannot be decoded" in said
    assert "4 train, 6 test; 2 could not be read" in said
    cli.main(["pack", str(damaged), str(tmp_path / "out"), "--size", "16"])
    assert "was packed before: 4 train, 6 test; 2 could not be read" in capsys.readouterr().out.replace("\n", " ")
    packed = PackedSet(tmp_path / "out")
    assert packed.count("train") == 4
    sound = ["train/cat/0.jpg", "train/cat/2.jpg", "train/dog/0.jpg", "train/dog/1.jpg"]
    assert sorted(packed.paths("train")) == sound
    for path, (pixels, label) in pictures(packed, "train").items():
        trees.assert_is_torchvisions(pixels, Image.open(damaged / path), 16)
        assert packed.classes[label] == path.split("/")[1]
    failures = read_meta(tmp_path / "out")["failures"]["train"]
    assert sorted(path for path, _ in failures) == ["train/cat/1.jpg", "train/dog/2.jpg"]
    # the empty places are no part of the statistics
    pixels = np.concatenate([p.reshape(-1, 3) for p, _ in pictures(packed, "train").values()]) / 255
    assert np.allclose(packed.preprocessing.mean, pixels.mean(0))


def test_what_was_skipped_gets_another_chance(damaged, tmp_path, small_chunks):
    """A chunk that an earlier run packed with "skip" is not taken as sound by one with "stop"."""

    def stop(done, total, failures):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(damaged, tmp_path / "out", size=16, on_error="skip", progress=stop)
    with pytest.raises(ValueError, match="cannot be decoded"):
        pack(damaged, tmp_path / "out", size=16)
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (damaged / "train" / name).write_bytes(trees.encoded(trees.picture(7)))
    done = pack(damaged, tmp_path / "out", size=16)
    assert done.pictures == {"train": 6, "test": 6}
    assert done.failures == []
    assert done.resumed >= 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_disk_that_fills_up(tmp_path):
    trees.folders(tmp_path / "in")
    items = sources.find(tmp_path / "in").splits["train"]
    (tmp_path / "train.images").symlink_to("/dev/full")
    chunk = module.Chunk("folders", tmp_path / "in", tmp_path, "train", 0, items, 16, "skip", tmp_path / "entry.json")
    with pytest.raises(OSError, match=r"cannot write .*train\.images: No space left on device"):
        pack_chunk(chunk)
    assert not (tmp_path / "entry.json").exists()


def test_nothing_but_damaged_pictures(tmp_path):
    trees.folders(tmp_path / "in", splits=("train",))
    for path in (tmp_path / "in").rglob("*.jpg"):
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of the 6 pictures of 'train' could be read: train/.*jpg cannot be"):
        pack(tmp_path / "in", tmp_path / "out", on_error="skip", size=16)
    assert not (tmp_path / "out").exists()


def test_a_picture_that_disappears(tmp_path, monkeypatch):
    trees.folders(tmp_path / "in")
    found = sources.find(tmp_path / "in")
    (tmp_path / "in/val/dog/1.jpg").unlink()
    monkeypatch.setattr(sources, "find", lambda *_: found)
    with pytest.raises(ValueError, match=r"val/dog/1\.jpg: No such file"):
        pack(tmp_path / "in", tmp_path / "out", size=16)


# ------------------------------------------------------------------------------------------- whole or not there
def test_any_interruption_gives_the_same_set(tmp_path, small_chunks):
    trees.folders(tmp_path / "in", per_class=7)
    pack(tmp_path / "in", tmp_path / "whole", size=16)
    wanted = content(tmp_path / "whole")
    assert sorted(wanted) == [
        "meta.json",
        *(f"test.{e}" for e in ("images", "labels.npy", "paths.json")),
        *(f"train.{e}" for e in ("images", "labels.npy", "paths.json")),
    ]

    class Stop(Exception):
        pass

    for after in range(1, 9):
        target = tmp_path / f"stopped{after}"

        def stop(done, total, failures, limit=after, seen=[]):  # noqa: B006
            seen.append(done)
            if len(seen) == limit:
                seen.clear()
                raise Stop

        with pytest.raises(Stop):
            pack(tmp_path / "in", target, size=16, progress=stop)
        assert not target.exists()
        # what a chunk that was cut off leaves behind
        partial = target.with_name(target.name + ".partial")
        with (partial / "train.images").open("r+b") as file:
            if after < 4:
                file.seek(-100, os.SEEK_END)
                file.write(b"x" * 100)
        done = pack(tmp_path / "in", target, size=16)
        assert done.resumed == [4, 8, 12, 14, 18, 22, 26, 28][after - 1]
        assert content(target) == wanted
        assert not partial.exists()


def test_done_is_done(tmp_path):
    trees.folders(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "out", size=16)
    before = content(tmp_path / "out")
    (tmp_path / "out/progress").mkdir()  # of a run that was killed in its last step
    assert pack(tmp_path / "in", tmp_path / "out", size=16).resumed == 12
    assert content(tmp_path / "out") == before
    assert not (tmp_path / "out/progress").exists()


def test_other_pictures_or_options_are_noticed(tmp_path, damaged):
    with pytest.raises(ValueError, match="cannot be decoded"):
        pack(damaged, tmp_path / "out", size=16)
    with pytest.raises(ValueError, match="begun with other pictures or options"):
        pack(damaged, tmp_path / "out", size=24)
    pack(damaged, tmp_path / "out", size=16, on_error="skip")
    with pytest.raises(ValueError, match="exists and is not this set"):
        pack(damaged, tmp_path / "out", size=24)


@pytest.mark.skipif(os.name == "nt", reason="no flock")
def test_one_process_at_a_time(tmp_path):
    trees.folders(tmp_path / "in")
    (tmp_path / "out.partial").mkdir()
    with module.locked(tmp_path / "out.partial"), pytest.raises(ValueError, match="another process is packing into"):
        pack(tmp_path / "in", tmp_path / "out", size=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"size must lie in \[1, 4096\], got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    trees.folders(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "in", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="must be outside of what is packed"):
        pack(tmp_path / "in", tmp_path / "in/out")
    with pytest.raises(FileNotFoundError, match="no folder"):
        pack(tmp_path / "nowhere", tmp_path / "out")


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    trees.folders(tmp_path / "in")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="not enough room in"):
        pack(tmp_path / "in", tmp_path / "out", size=16)


# --------------------------------------------------------------------------------------------- real processes
PACK = """
import sys
from pathlib import Path
from fastalex.data import pack
if __name__ == "__main__":
    pack.CHUNK = 4
    pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), size=64, workers=2)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_processes(tmp_path, small_chunks, kills):
    """After SIGKILL what is there is whole, the next run goes on, and the workers have died with their parent."""
    trees.folders(tmp_path / "in", per_class=60, width=500, height=375)
    (tmp_path / "pack.py").write_text(PACK)
    pack(tmp_path / "in", tmp_path / "whole", size=64)
    command = [sys.executable, str(tmp_path / "pack.py"), str(tmp_path / "in"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}
    progress = tmp_path / "out.partial/progress"

    def entries():
        return len(list(progress.glob("*.json"))) if progress.exists() else 0

    for _ in range(kills):
        before = entries()
        run = subprocess.Popen(command, env=environment)
        # as soon as it has got on
        while entries() < before + 5 and run.poll() is None:
            time.sleep(0.002)
        assert not os.path.isdir("/proc") or len(workers_of(tmp_path)) >= 3
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert before + 5 <= entries() < 60
        assert not (tmp_path / "out").exists()
        deadline = time.monotonic() + 20
        while workers_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not workers_of(tmp_path)
    resumed = entries()
    assert subprocess.run(command, env=environment, timeout=120).returncode == 0
    assert resumed >= 5 * kills
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "out/meta.json").read_text())["splits"]["train"]["pictures"] == 120


def workers_of(folder):
    """Processes that inherited MARK=folder from the command."""
    found = []
    for process in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if process.isdigit() and int(process) != os.getpid():
            try:
                with open(f"/proc/{process}/environ", "rb") as file:
                    variables = file.read().split(b"\0")
            except OSError:
                continue
            if f"MARK={folder}".encode() in variables:
                found.append(process)
    return found
