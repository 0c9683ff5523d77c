"""The two experiments: what differs between their runs, how rates are searched, what is concluded; and in miniature."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from fastalex import AlexNet
from fastalex.experiments import ablation, pictures, relu_vs_tanh, runs
from fastalex.experiments.relu_vs_tanh import RATES, Curve, Settings, search

SETTINGS = Settings("toy", threshold=0.2, iterations=600, seeds=2, batch_size=16, probe=64)


@pytest.fixture
def no_processes(monkeypatch):
    """Importing PyTorch in other processes takes longer than these runs."""
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))


@pytest.fixture
def cifar(tmp_path):
    """Five files of six records, and one of four: labels 0, 1, ..., each picture of one colour."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, count in [*((f"data_batch_{i}.bin", 6) for i in range(1, 6)), ("test_batch.bin", 4)]:
        records = np.zeros((count, 3073), np.uint8)
        records[:, 0] = np.arange(count)
        records[:, 1:1025], records[:, 1025:2049] = 200, np.arange(count)[:, None]
        records.tofile(folder / name)
    return folder


# ------------------------------------------------------------------------------------------------------ pictures
def test_the_sample():
    found = pictures.load_pictures()
    assert found.train.shape == (5000, 1, 28, 28)
    assert found.test_labels.bincount().tolist() == [100] * 10
    train, _, test, _ = found.normalised()
    assert train.mean() == pytest.approx(0, abs=1e-4)
    assert train.std() == pytest.approx(1, abs=1e-4)
    assert abs(test.mean()) > 0  # by the training pictures' numbers


@pytest.mark.parametrize("inside", [True, False])
def test_cifar(cifar, inside):
    found = pictures.load_pictures(cifar if inside else cifar.parent)
    assert found.is_cifar
    assert found.train.shape == (30, 3, 32, 32)
    assert found.test_labels.tolist() == [0, 1, 2, 3]
    assert found.train[7, :, 5, 5].tolist() == [200, 1, 0]  # second file, second record: red, green, blue


def test_other_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        pictures.load_pictures(tmp_path / "nowhere")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="cifar-10-batches-bin or cifar-10-batches-py"):
        pictures.load_pictures(tmp_path)


# -------------------------------------------------------------------------------------------------- ReLU and tanh
@pytest.mark.parametrize("best", [0.0003, 0.01, 0.03, 0.1, 3.0])
def test_search_finds_the_fastest_rate_and_its_slower_neighbours(best):
    limits = {}

    def run(rate, limit):
        limits[rate] = limit
        distance = abs(RATES.index(rate) - RATES.index(best))
        return Curve([0.5], 100 + 50 * distance)

    found, tried = search(run)
    assert found == best
    place = RATES.index(best)
    assert set(RATES[max(0, place - 1) : place + 2]) <= set(tried)
    assert limits[0.03] is None
    assert all(limit is not None and limit <= tried[0.03].reached for rate, limit in limits.items() if rate != 0.03)


def test_search_without_any_success_goes_by_the_last_error():
    found, tried = search(lambda rate, limit: Curve([0.9, 0.5 + abs(math.log10(rate))], None))
    assert found == 1.0
    assert 3.0 in tried


def toy():
    """64 pictures that differ by where they are bright."""
    labels = torch.arange(64) % 2
    images = torch.randn(64, 1, 16, 16) * 0.1
    images[labels == 1, :, :8] += 1
    return images, labels


@pytest.mark.parametrize("unit", relu_vs_tanh.UNITS)
def test_training_stops_at_the_threshold(unit):
    images, labels = toy()
    settings = replace(SETTINGS, iterations=180)
    curve = relu_vs_tanh.train(unit, 0.1 if unit == "sigmoid" else 0.03, 1, settings, images, labels)
    assert curve.reached is not None
    assert curve.reached == (len(curve.errors) - 1) * settings.every
    assert curve.errors[-1] <= settings.threshold < min(curve.errors[:-1])
    again = relu_vs_tanh.train(unit, 0.1 if unit == "sigmoid" else 0.03, 1, settings, images, labels)
    assert again == curve


def test_training_gives_up():
    images, labels = toy()
    settings = replace(SETTINGS, threshold=1e-9, iterations=60)
    assert relu_vs_tanh.train("relu", 1e-6, 1, settings, images, labels).reached is None
    assert len(relu_vs_tanh.train("relu", 1e-6, 1, settings, images, labels, limit=10).errors) == 11
    diverged = relu_vs_tanh.train("relu", 1e6, 1, settings, images, labels)
    assert diverged.reached is None
    assert len(diverged.errors) < 61


def made_up(relu, tanh, sigmoid):
    found = {}
    for unit, reached in (("relu", relu), ("tanh", tanh), ("sigmoid", sigmoid)):
        found[f"{unit} sweep"] = {"rate": 0.1, "tried": {}}
        for seed, number in enumerate(reached, 1):
            found[f"{unit} seed {seed}"] = {"errors": [0.9, 0.5, 0.3], "reached": number}
    return found


def test_conclusions():
    relu, tanh, sigmoid = relu_vs_tanh.findings(made_up([100, 200], [200, 800], [None, 400]), SETTINGS)
    assert relu.ratio == (1, 1, 1)
    mean, low, high = tanh.ratio
    assert mean == pytest.approx(math.sqrt(2 * 4))  # of ratios, seed by seed
    assert low < mean < high
    assert low * high == pytest.approx(mean**2)
    assert sigmoid.ratio is None
    assert sigmoid.at_least == pytest.approx(math.sqrt(6 * 2))  # the run that gave up counts as 600
    assert sigmoid.iterations is None
    text = relu_vs_tanh.table([relu, tanh, sigmoid], SETTINGS)
    assert "| tanh | 0.1 | 500 ± 3,812 | 2.83 (" in text
    assert "1 of 2 runs not within 600 | more than 3.5" in text
    assert text.count("\n|") == 2 + 3
    assert text.endswith("\n\nNo difference between ReLU and tanh is shown: the interval of the ratio contains 1.\n")


def test_what_is_said_about_tanh():
    def said(relu, tanh):
        return relu_vs_tanh.conclusion(relu_vs_tanh.findings(made_up(relu, tanh, tanh), SETTINGS))

    assert said([100, 101], [300, 303]) == "Shown: ReLU was faster than tanh, 3.00 times."
    assert said([300, 303], [100, 101]) == "Shown: tanh was faster than ReLU, 3.00 times."
    assert said([100, 100], [None, 400]) == "Shown: ReLU was faster than tanh, more than 4.9 times."
    assert said([None, 100], [200, 400]).startswith("Nothing is shown about tanh: runs gave up")


def test_what_is_said_about_ingredients():
    gains = {"no LRN": (0.5, 1.6), "pooling 2x2": (0.5, 0.2), "one tower": (-3.0, 1.0)}
    found = [
        ablation.Finding(change, runs.Interval(20, 1), None if change == ablation.EVERYTHING else gain, gain)
        for change in ablation.CHANGES
        for gain in [runs.Interval(*gains.get(change, (0.0, 1.0)))]
    ]
    said = ablation.conclusion(found)
    assert said.startswith("Shown to help: overlapping pooling (3x3, not 2x2); shown to cost accuracy: second tower (")
    assert "; not shown: LRN, separate towers (groups in conv2, 4, 5), dropout, random crops and mirroring." in said
    assert said.endswith("as small as the paper's: LRN (1.4 in the paper, ± 1.60 here).")


def test_nothing_is_concluded_where_relu_gave_up():
    _, tanh, _ = relu_vs_tanh.findings(made_up([None, 200], [200, 800], [None, 400]), SETTINGS)
    assert tanh.ratio is None
    assert tanh.at_least is None


@pytest.mark.parametrize("fields", [{"threshold": 0.0}, {"threshold": 25.0}, {"seeds": 0}, {"iterations": 0}])
def test_settings_out_of_range(fields):
    with pytest.raises(ValueError, match=f"--.*{next(iter(fields))}"):
        replace(SETTINGS, **fields)


def test_relu_vs_tanh_in_miniature(tmp_path, cifar, no_processes):
    """A run on a few pictures writes everything, and a second one computes nothing."""
    out, said = tmp_path / "out", []
    found = relu_vs_tanh.run(out, cifar, threshold=0.7, iterations=3, seeds=2, report=said.append)
    assert [finding.unit for finding in found] == ["relu", "tanh", "sigmoid"]
    assert len(said) == 3 + 6
    content = json.loads((out / "results.json").read_text())
    assert len(content["runs"]) == 3 + 6
    assert len(content["findings"]) == 3
    assert content["settings"]["pictures"] == "CIFAR-10"
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    relu_vs_tanh.run(out, cifar, threshold=0.7, iterations=3, seeds=2, report=said.append)
    assert len(said) == 9
    with pytest.raises(ValueError, match=r"other settings \(threshold\)"):
        relu_vs_tanh.run(out, cifar, threshold=0.6, iterations=3, seeds=2)


# ------------------------------------------------------------------------------------------------------ ablation
def test_each_change_takes_one_thing_away():
    full = ablation.variant_for(ablation.EVERYTHING, 3, 32)
    assert [conv.groups for conv in full.convs] == [1, 2, 1, 2, 2]
    assert [conv.channels for conv in full.convs] == [16, 32, 48, 32, 32]
    without = {change: ablation.variant_for(change, 3, 32) for change in ablation.CHANGES}

    def differing(change):
        pairs = zip(full.convs, without[change].convs, strict=True)
        return {name for a, b in pairs for name in vars(a) if vars(a)[name] != vars(b)[name]}

    assert differing("no LRN") == {"norm"}
    assert differing("pooling 2x2") == {"pool"}
    assert differing("joined towers") == {"groups", "std"}  # He's deviation follows from the number of inputs
    assert differing("one tower") == {"groups", "std", "channels"}
    assert differing("no dropout") == differing("no augmentation") == set()
    assert [conv.channels for conv in without["one tower"].convs] == [8, 16, 24, 16, 32]
    assert all(conv.norm is None for conv in without["no LRN"].convs)
    assert [conv.pool for conv in without["pooling 2x2"].convs] == [2, None, None, None, 2]


@pytest.mark.parametrize("change", ablation.CHANGES)
@pytest.mark.parametrize("size", [28, 32])
def test_networks_run(change, size):
    model = AlexNet(10, 0.0, variant=ablation.variant_for(change, 1, size))
    assert model(torch.randn(2, 1, size, size)).shape == (2, 10)
    maps = model.features(torch.randn(2, 1, size, size))
    assert maps.shape[2] >= model.variant.features_size


def test_gains_are_differences_within_a_seed():
    settings = ablation.Settings("toy", 1, 2)
    results = {}
    for change in ablation.CHANGES:
        for seed, base in ((1, 10.0), (2, 30.0)):
            worse = 2.0 + seed if change == "no LRN" else 0.0
            results[f"{change}, seed {seed}"] = {"top1_error": base + worse, "top5_error": 1.0}
    found = {finding.change: finding for finding in ablation.findings(results, settings)}
    assert found["no LRN"].gain.mean == 3.5
    assert found["no LRN"].gain.half_width == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert found["no dropout"].gain == (0, 0)
    assert found[ablation.EVERYTHING].error.mean == 20
    text = ablation.table(list(found.values()), settings)
    assert "| LRN | 23.50 ± " in text
    assert "| +3.50 ± 6.35 |" in text
    assert "1.4 / 1.2" in text
    assert text.count("\n|") == 2 + len(ablation.CHANGES)


def test_ablation_in_miniature(tmp_path, cifar, no_processes):
    out, said = tmp_path / "out", []
    found = ablation.run(out, cifar, epochs=1, seeds=1, report=said.append)
    assert len(found) == len(said) == len(ablation.CHANGES)
    content = json.loads((out / "results.json").read_text())
    assert all(0 <= run["top5_error"] <= run["top1_error"] <= 100 for run in content["runs"].values())
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    ablation.run(out, cifar, epochs=1, seeds=1, report=said.append)
    assert len(said) == len(ablation.CHANGES)
    with pytest.raises(ValueError, match="--epochs and --seeds must be at least 1, got 0"):
        ablation.run(out, cifar, epochs=0)
