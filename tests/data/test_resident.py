"""Sets whose pictures stay in memory: the same batches, the same training, and what is said where they do not fit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import TINY, Pictures, Stop, StopAfter, changed, run, without_timings

from fastalex import AlexNet, distributed
from fastalex.data import packed, resident
from fastalex.data.image_sets import FashionMNIST, Folders
from fastalex.data.packed import PackedSet
from fastalex.data.preprocessing import Preprocessing
from fastalex.data.resident import Resident, keep
from fastalex.evaluation.metrics import evaluate

CPU = torch.device("cpu")


def pack(root, train=70, test=30, size=20, missing=(), chunk=16, images=None):
    """A packed set of noise, or of the bytes of `images`, of which some slots hold no picture."""
    root.mkdir()
    splits, generator = {}, np.random.default_rng(1)
    for split, count in (("train", train), ("test", test)):
        pixels = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        labels = (np.arange(count) % 4).astype(np.int32)
        labels[[i for i in missing if i < count]] = -1
        pixels.tofile(root / f"{split}.images")
        np.save(root / f"{split}.labels.npy", labels)
        (root / f"{split}.paths.json").write_text(json.dumps([f"{i}.jpg" for i in range(count)]))
        sums = {name: packed.hashlib.sha256((root / f"{split}.{name}").read_bytes()).hexdigest() for name in FILES}
        splits[split] = {
            "slots": count,
            "labels": sums["labels.npy"],
            "paths": sums["paths.json"],
            "sha256": [packed.hashlib.sha256(pixels[i : i + chunk]).hexdigest() for i in range(0, count, chunk)],
        }
    write_meta(root, size, chunk, splits)
    return root


FILES = ("labels.npy", "paths.json")


def write_meta(root, size, chunk, splits):
    statistics = {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "eigenvalues": [0.1, 0.02, 0.01],
        "eigenvectors": [[0.6, 0.8, 0.0], [-0.8, 0.6, 0.0], [0.0, 0.0, 1.0]],
    }
    content = {
        **{"format": packed.FORMAT, "version": packed.VERSION, "size": size, "chunk": chunk, "splits": splits},
        **{"classes": list("abcd"), "names": list("abcd"), "statistics": statistics},
    }
    content["checksum"] = packed.checksum(content)
    (root / packed.META).write_text(json.dumps(content))


def opened(root):
    return PackedSet(root, Pictures.preprocessing)


@pytest.mark.parametrize("how", ["in-memory", "on-device"])
@pytest.mark.parametrize("missing", [(), (0, 3, 17, 69, 29)])
def test_a_packed_set_stays_what_it_was(tmp_path, how, missing):
    """Mapped, not copied, with gaps where a picture could not be read."""
    source = opened(pack(tmp_path / "set", missing=missing))
    told = []
    kept = keep(source, how, CPU, progress=lambda *bytes: told.append(bytes))
    assert isinstance(kept, Resident)
    assert kept.colours == source.colours
    assert told[-1] == (count := 1200 * (source.count("train") + source.count("test")), count)
    for split in ("train", "test"):
        indices = torch.randperm(source.count(split)).split(16)
        for (ours, labels), (theirs, expected) in zip(
            kept.batches(split, indices), source.batches(split, indices), strict=True
        ):
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()
            assert torch.equal(labels, expected)
        assert kept.held[split].images.data_ptr() == source.mapped(split)[0].data_ptr()
    assert torch.equal(kept.order("train", 3, 1), source.order("train", 3, 1))
    for number in (-1, source.count("test")):
        with pytest.raises(ValueError, match=rf"indices of 'test' must lie in \[0, {source.count('test')}\), got"):
            next(kept.batches("test", [torch.tensor([number])]))


@pytest.mark.parametrize("missing", [(), (0, 3, 17, 69, 29)])
@pytest.mark.parametrize("shares", [1, 4])
def test_loading_a_packed_set(tmp_path, missing, shares, monkeypatch):
    """As onto a GPU: a copy of what this process holds, its checksums compared, the others' pictures missing."""
    monkeypatch.setattr(distributed, "size", lambda: min(2, shares))
    monkeypatch.setattr(distributed, "rank", lambda: shares // 4)
    source = opened(pack(tmp_path / "set", missing=missing))
    told = []
    held = resident.loaded(source, CPU, shares, lambda *bytes: told.append(bytes))
    assert told[-1][0] == told[-1][1] == sum(part.images.numel() for part in held.values())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    for split in ("train", "test"):
        count = source.count(split)
        own = torch.arange(count) if shares == 1 else torch.arange(count).tensor_split(2)[1]
        if split == "train" and shares == 4:
            own = torch.cat(torch.arange(count).tensor_split(4)[2:])
        [(pictures, labels)] = source.batches(split, [own])
        assert torch.equal(held[split].images, pictures)
        assert torch.equal(held[split].labels, labels)
        places = held[split].slots_of(torch.arange(count))
        assert torch.equal(places[own], torch.arange(len(own)))
        assert int((places == -1).sum()) == count - len(own)


def test_a_damaged_set_is_not_loaded(tmp_path):
    root = pack(tmp_path / "set")
    with (root / "train.images").open("r+b") as file:
        file.seek(35 * 20 * 20 * 3)
        file.write(b"damaged")
    for call in (
        lambda: keep(opened(root), "in-memory", CPU),
        lambda: resident.loaded(opened(root), CPU, 1, lambda *bytes: None),
    ):
        with pytest.raises(ValueError, match=r"set is damaged: train.images, pictures 32 to 47"):
            call()


def test_the_sample_is_enlarged_once():
    source = FashionMNIST(FashionMNIST.preprocessing_for(1, 32))
    kept = keep(source, "auto", CPU)
    indices = [torch.tensor([4999, 0, 17])]
    for ours, theirs in zip(kept.batches("train", indices), source.batches("train", indices), strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert kept.held["train"].images.shape == (5000, 1, 34, 34)


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_and_unknown_sets_stay_with_their_loader(channels):
    assert keep(data := Pictures(), "auto", CPU) is data
    sample = FashionMNIST(FashionMNIST.preprocessing_for(channels, 32))
    assert keep(sample, "nothing", CPU) is sample


@pytest.mark.slow
def test_folders_are_decoded_once(tmp_path):
    trees = pytest.importorskip("trees")
    trees.folders(tmp_path / "pictures", per_class=3, width=40, height=30)
    looks = Preprocessing.for_photos(3, 24)
    source = Folders(tmp_path / "pictures", looks, workers=0)
    assert keep(source, "auto", CPU) is source
    kept = keep(source, "in-memory", CPU)
    for split in ("train", "test"):
        everything = [torch.arange(source.count(split))]
        for ours, theirs in zip(kept.batches(split, everything), source.batches(split, everything), strict=True):
            assert all(map(torch.equal, ours, theirs))
    damaged = next((tmp_path / "pictures" / "train").rglob("*.*"))
    damaged.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=damaged.name):
        keep(Folders(tmp_path / "pictures", looks, workers=0), "in-memory", CPU)


def test_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "free_memory", lambda device: 100_000)
    with pytest.raises(
        ValueError, match=r"keep must be auto or nothing: in-memory needs 0\.0 GB .*cpu has 0\.0 GB free"
    ):
        keep(Pictures(), "in-memory", CPU)
    sample = FashionMNIST(FashionMNIST.preprocessing_for(1, 32))
    assert keep(sample, "auto", CPU) is sample
    source = opened(pack(tmp_path / "set"))
    assert isinstance(keep(source, "in-memory", CPU), Resident)  # a map needs no memory of its own
    assert keep(source, "auto", CPU) is source
    # on a GPU that is not there: a set that does not fit into it
    gpu = torch.device("cuda")
    assert keep(source, "auto", gpu) is source
    assert keep(source, "in-memory", gpu) is source
    with pytest.raises(ValueError, match=r"on-device needs 0\.0 GB for the pictures, and cuda has 0\.0 GB free"):
        keep(source, "on-device", gpu)


def test_the_code_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "resident" in block]
    found = {}
    exec(code, found)
    assert found["held"].images.shape == (5000, 3, 68, 68)
    assert found["inputs"].shape == (128, 3, 64, 64)
    [(_, labels)] = found["sample"].batches("train", [found["indices"]])
    assert torch.equal(found["labels"], labels)


# ---- evaluation and training


def test_evaluation_is_the_same_bit_for_bit(tmp_path):
    source = opened(pack(tmp_path / "set", missing=(5, 6)))
    kept = keep(source, "in-memory", CPU)
    model = AlexNet(4, variant=TINY)
    for ten in (False, True):
        tables = [torch.zeros(4, 4, dtype=torch.int64) for _ in range(2)]
        options = {"batch_size": 70, "ten_crop": ten}
        expected = evaluate(model, source, confusion=tables[0], **options)
        assert evaluate(model, kept, confusion=tables[1], **options) == expected
        assert torch.equal(*tables)
        assert int(tables[0].sum()) == source.count("test")


@pytest.mark.parametrize("amp", [pytest.param("off", marks=pytest.mark.slow), "bf16"])
def test_training_is_the_same_bit_for_bit(tmp_path, amp):
    """Pictures that are read by their places, and those that a loader gathers."""
    recipe = changed(colours=True, amp=amp, epochs=2)
    source = opened(pack(tmp_path / "set", missing=(5, 6)))
    plain, history = run(tmp_path / "plain", recipe, data=source, keep="nothing")
    kept, again = run(tmp_path / "kept", recipe, data=source, keep="in-memory")
    for (name, first), second in zip(plain.state_dict().items(), kept.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    assert without_timings(history) == without_timings(again)
    assert all(line["data_wait"] == 0 for line in again)
    # a run may go on either way
    with pytest.raises(Stop):
        run(tmp_path / "both", recipe, data=source, keep="in-memory", save_steps=1, callback=StopAfter(6))
    other, _ = run(tmp_path / "both", recipe, data=source, keep="nothing", resume=True)
    for first, second in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


def test_any_set_may_be_kept(tmp_path):
    plain, _ = run(tmp_path / "plain", changed(epochs=1))
    kept, history = run(tmp_path / "kept", changed(epochs=1), keep="on-device")
    assert history[0]["data_wait"] == 0
    for first, second in zip(plain.parameters(), kept.parameters(), strict=True):
        assert torch.equal(first, second)


# ---- shares


@pytest.mark.parametrize(("count", "shares", "batch"), [(70, 4, 20), (71, 4, 20), (61, 2, 20), (64, 4, 16), (3, 4, 8)])
def test_batches_are_dealt_from_shares(count, shares, batch):
    """Part j of each batch, as the processes cut it, comes from share j, and every picture once."""
    order = torch.cat([share.flip(0) for share in torch.arange(count).tensor_split(shares)])
    dealt = distributed.dealt(order, shares, batch)
    assert dealt.sort().values.tolist() == list(range(count))
    of = torch.cat([torch.full((len(s),), j) for j, s in enumerate(torch.arange(count).tensor_split(shares))])
    for part in dealt.split(batch):
        for j, (indices, counting) in enumerate(distributed.equal_shares(part, shares)):
            assert (of[indices[:counting]] == j).all()


def test_shares_refuse_uneven_batches():
    with pytest.raises(ValueError, match="batch_size must be a multiple of the number of shares, 3, got 20"):
        distributed.dealt(torch.arange(60), 3, 20)


def test_the_order_of_shares_is_a_fair_shuffle():
    """Every picture once an epoch, at every place of its share as often as at another, and batches as the whole."""
    count, shares, batch, epochs = 240, 4, 40, 2000

    class Numbers(Pictures):
        def count(self, split):
            return count

    held = resident.Held(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1), None, range(count))
    data = Resident(Numbers(), {"train": held}, shares)
    places = torch.zeros(count, count // batch)
    means = []
    together = torch.zeros(2)
    for epoch in range(epochs):
        order = distributed.dealt(data.order("train", 3, epoch), shares, batch)
        assert torch.equal(order.sort().values, torch.arange(count))
        step = torch.empty(count, dtype=torch.int64)
        step[order] = torch.arange(count) // batch
        places[torch.arange(count), step] += 1
        means += order.view(-1, batch).double().mean(1).tolist()
        together += torch.stack([step[0] == step[1], step[0] == step[count - 1]])
    expected = epochs * batch / count
    assert (places - expected).abs().max() < 5.5 * expected**0.5
    means = torch.tensor(means)
    assert (means.mean() - (count - 1) / 2).abs() < 1e-9 * count
    # the variance of a batch's mean: of strata a part of that of a sample without replacement
    sample = count**2 / 12 / batch * (1 - batch / count)
    assert means.var() < sample
    # pairs of one share meet in a batch with (b - 1) / (n - 1) of a share, others with b / n
    of_share, share = batch // shares, count // shares
    for found, probability in zip(together.tolist(), ((of_share - 1) / (share - 1), of_share / share), strict=True):
        assert abs(found - epochs * probability) < 5 * (epochs * probability) ** 0.5


@pytest.mark.parametrize("shares", [1, 4])
def test_an_epoch_ends_in_the_order_in_which_it_began(tmp_path, shares):
    """A run of shares goes on without them, bit for bit, where everything is within reach; with others it refuses."""
    source = Pictures(72)

    def of(number):
        held = {
            split: resident.Held(images.contiguous(memory_format=torch.channels_last), labels, None, range(len(labels)))
            for split, (images, labels) in source.sets.items()
        }
        return Resident(source, held, number)

    recipe = changed(epochs=1)
    whole, _ = run(tmp_path / "whole", recipe, data=of(shares))
    with pytest.raises(Stop):
        run(tmp_path / "stopped", recipe, data=of(shares), save_steps=1, callback=StopAfter(2))
    with pytest.raises(ValueError, match=r"not that of 2 shares of the pictures: .* or with --keep nothing"):
        run(tmp_path / "stopped", recipe, data=of(2), resume=True)
    resumed, _ = run(tmp_path / "stopped", recipe, data=source, resume=True)
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)
    assert torch.load(tmp_path / "stopped" / "state.pt")["shares"] == 1  # of the epochs to come
