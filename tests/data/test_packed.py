"""Reading packed sets: the same pictures in any order, orders that depend on nothing but their numbers, damage."""

import json

import numpy as np
import pytest
import torch
import trees

pytest.importorskip("PIL")

from fastalex import cli
from fastalex.data import packed as module
from fastalex.data.pack import Chunk, pack, pack_chunk
from fastalex.data.packed import PackedSet, is_packed, verify
from fastalex.data.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 training and 60 test pictures of 32x32."""
    root = tmp_path_factory.mktemp("set")
    trees.cifar(root / "in", "binary", per_file=60)
    patch = pytest.MonkeyPatch()

    def run(missing, entries, *rest):
        entries.update({chunk.entry: pack_chunk(chunk) for chunk in missing})

    patch.setattr("fastalex.data.pack.run", run)
    patch.setattr("fastalex.data.pack.CHUNK", 16)
    pack(root / "in", root / "out")
    patch.undo()
    return root / "out"


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy to break."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def raw(folder, split="train"):
    return np.fromfile(folder / f"{split}.images", np.uint8).reshape(-1, 32, 32, 3)


def test_batches(folder):
    packed = PackedSet(folder, threads=3)
    indices = [torch.tensor([5]), torch.tensor([299, 0, 0, 17]), torch.empty(0, dtype=torch.int64), torch.arange(100)]
    for chosen, (images, labels) in zip(indices, packed.batches("train", indices), strict=True):
        assert images.shape == (len(chosen), 3, 32, 32)
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), raw(folder)[chosen.numpy()])
        assert torch.equal(labels, packed.labels("train")[chosen])
        assert labels.dtype == torch.int64


def test_a_batch_belongs_to_its_reader(folder):
    """A caller may write into a batch, and keep it."""
    packed = PackedSet(folder)
    first, second = (images for images, _ in packed.batches("test", [torch.arange(4)] * 2))
    first.zero_()
    assert second.any()
    assert raw(folder, "test")[:4].any()


def test_a_reader_may_stop(folder):
    for _ in PackedSet(folder).batches("train", torch.arange(300).split(10)):
        break


def test_nothing_to_read(folder):
    assert list(PackedSet(folder).batches("train", [])) == []


@pytest.mark.parametrize("index", [-1, 300])
def test_indices_out_of_range(folder, index):
    with pytest.raises(ValueError, match=r"indices of 'train' must lie in \[0, 300\)"):
        list(PackedSet(folder).batches("train", [torch.tensor([0, index])]))


# --------------------------------------------------------------------------------------------------- orders
def test_orders(folder, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(module, "WINDOW", 32)
    packed = PackedSet(folder)
    orders = [packed.order("train", seed, epoch) for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(orders[0], orders[1])
    for order in orders:
        assert order.sort().values.tolist() == list(range(300))
    assert not any(torch.equal(orders[0], other) for other in orders[2:])


def test_an_order_reads_whole_blocks(folder, monkeypatch):
    """Every window of 32 is four blocks of eight neighbours, but where the short last block shifts them."""
    monkeypatch.setattr(module, "BLOCK", 10)
    monkeypatch.setattr(module, "WINDOW", 40)
    order = PackedSet(folder).order("train", 3, 1)
    for window in order.split(40):
        blocks = (window // 10).unique(return_counts=True)[1]
        assert (blocks == 10).all()
        assert not torch.equal(window, window.sort().values)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1025])
def test_orders_of_any_length(count, monkeypatch):
    monkeypatch.setattr(PackedSet, "__init__", lambda self: None)
    monkeypatch.setattr(PackedSet, "count", lambda self, split: count)
    assert PackedSet().order("train", 0, 1).sort().values.tolist() == list(range(count))


@pytest.mark.skipif(not hasattr(module.mmap, "MADV_WILLNEED"), reason="no madvise here")
def test_what_is_read_ahead(folder, monkeypatch):
    """Runs of neighbours, each in one call that starts at a page, and every picture before it is copied."""
    packed = PackedSet(folder, threads=1)
    asked = []

    class Memory:
        def madvise(self, option, start, length):
            assert start % module.mmap.PAGESIZE == 0
            asked.append((start, length))

    split = packed._splits["train"]
    packed._splits["train"] = split._replace(memory=Memory())
    packed._read_ahead("train", [torch.tensor([9, 8]), torch.tensor([20, 10])])
    record = 32 * 32 * 3
    begin = 8 * record // module.mmap.PAGESIZE * module.mmap.PAGESIZE
    far = 20 * record // module.mmap.PAGESIZE * module.mmap.PAGESIZE
    assert asked == [(begin, 11 * record - begin), (far, 21 * record - far)]

    asked.clear()
    monkeypatch.setattr(module, "WINDOW", 30)
    for _ in packed.batches("train", torch.arange(300).split(10)):
        pass
    covered = sum(length for _, length in asked)
    assert 300 * record <= covered <= 300 * record + len(asked) * module.mmap.PAGESIZE
    assert len(asked) == 10


# ------------------------------------------------------------------------------------------- preprocessing
def test_preprocessing(folder):
    looks = PackedSet(folder).preprocessing
    assert (looks.channels, looks.resize, looks.crop) == (3, 32, 28)
    # a network that takes 27x27 of pictures of any size
    assert PackedSet(folder, Preprocessing.for_photos(3, 27)).preprocessing.resize == 32


@pytest.mark.parametrize("looks", [Preprocessing.for_photos(1, 28), Preprocessing.for_photos(3, 33)])
def test_a_model_that_does_not_fit(folder, looks):
    with pytest.raises(ValueError, match=rf"32x32 pixels; the model takes {looks.channels} channels and {looks.crop}x"):
        PackedSet(folder, looks)


# -------------------------------------------------------------------------------------------------- damage
def test_verify(folder, capsys):
    pytest.importorskip("tyro")
    assert verify(folder) == 360 * 32 * 32 * 3
    cli.main(["verify", str(folder)])
    assert "as they were written" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 20 * 3072 + 5, -1])
def test_one_damaged_byte(damaged, place):
    content = bytearray((damaged / "train.images").read_bytes())
    content[place] ^= 1
    (damaged / "train.images").write_bytes(content)
    number = place % len(content) // 3072 // 16
    with pytest.raises(ValueError, match=rf"damaged: train\.images, pictures {number * 16} to "):
        verify(damaged)


@pytest.mark.parametrize("name", ["train.labels.npy", "test.paths.json"])
def test_damaged_index(damaged, name):
    content = bytearray((damaged / name).read_bytes())
    content[-1] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        verify(damaged)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        PackedSet(damaged).paths("test")


def test_a_set_that_was_not_copied_whole(damaged):
    with (damaged / "test.images").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"test\.images has 1,000 bytes, expected 184,320"):
        PackedSet(damaged)
    (damaged / "test.images").unlink()
    with pytest.raises(FileNotFoundError):
        PackedSet(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(version=2), "version 2, this fastalex reads 1"),
        (lambda meta: meta.update(format="parquet"), "another format"),
        (lambda meta: meta["classes"].reverse(), "its checksum is another"),
        (lambda meta: meta.clear(), "'format'"),
    ],
)
def test_other_meta(damaged, change, message):
    meta = json.loads((damaged / "meta.json").read_text())
    change(meta)
    (damaged / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=rf"meta\.json cannot be used: {message}"):
        PackedSet(damaged)


def test_half_of_meta(damaged):
    text = (damaged / "meta.json").read_text()
    (damaged / "meta.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"meta\.json cannot be used"):
        verify(damaged)


def test_no_packed_set(tmp_path, folder):
    assert is_packed(folder)
    assert not is_packed(tmp_path)
    with pytest.raises(FileNotFoundError, match="no packed pictures in"):
        PackedSet(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no pictures of the split 'val', only \['train', 'test'\]"):
        PackedSet(folder, splits=("val",))


def test_a_chunk_whose_file_is_missing(tmp_path):
    """Workers never create the file of pictures: a folder that was removed under them is an error."""
    chunk = Chunk("folders", tmp_path, tmp_path, "train", 0, [], 8, "stop", tmp_path / "entry.json")
    with pytest.raises(OSError, match=r"cannot write .*train\.images: No such file"):
        pack_chunk(chunk)
