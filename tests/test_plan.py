"""The plan of a training run: its arithmetic against counts by hand, and the tables of docs/scaling.md."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from fastalex.inspection.chips import CHIPS, find_chip
from fastalex.plan import MEASURED, RECORD, modelled_as_measured, plan, report
from fastalex.results import load

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
H100 = find_chip("h100")


@pytest.fixture(scope="module")
def fast():
    return plan("fast", gpus=8, chip="H100")


@pytest.fixture(scope="module")
def alone():
    return plan("paper", gpus=1, chip="H100", variant="torchvision", batch_size=64, pictures=1000, epochs=2)


def test_the_tables_of_the_documentation():
    """The text between two markers is what the command in the first prints; the failure shows what belongs there."""
    blocks = re.findall(r"<!-- plan (.*?) -->\n\n(.*?)\n\n<!-- end of plan -->", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for command, text in blocks:
        assert f"```sh\nfastalex plan {command}\n```" in PAGE.read_text()
        words = dict(re.findall(r"--([a-z-]+) (\S+)", command))
        numbers = {name.replace("-", "_"): int(words.pop(name)) for name in ("gpus", "batch-size") if name in words}
        assert text + "\n" == report(plan(**words, **numbers))


def test_the_model_against_what_was_measured():
    [step] = [
        row
        for row in load(ROOT / "benchmarks" / "results" / "2026-11-26-nvidia-h100-80gb-hbm3.json")["cases"]
        if (row["pass"], row["dtype"], row["provider"], row["shape"][0]) == ("step", "bf16", "fastalex", 128)
    ]
    assert step["median"] == pytest.approx(1e3 * MEASURED, abs=0.01)
    modelled = 1e3 * modelled_as_measured(H100)
    text = " ".join(PAGE.read_text().split())
    assert f"has a model of {modelled:.2f} ms" in text
    assert f"{1e3 * MEASURED / modelled:.2f} times its model" in text
    # weights, gradients, momentum and what the step keeps, without pictures
    found = plan("fast", gpus=1, variant="paper", batch_size=128, pictures=128)
    held = found.used - found.memory["pictures of a step"]
    assert f"a peak of {step['peak_bytes'] / 1e9:.2f} GB, and a model of {held / 1e9:.2f} GB" in text


def test_a_layer_by_hand(fast, alone):
    """conv2 of the variant bn, 1,024 pictures: 2 x 256 x 27 x 27 x 25 x 48 FLOP each; 307 KB out, 87 KB pooled."""
    seconds = {stage.name: stage.seconds for stage in fast.stages}
    map_bytes, pooled = 2 * 256 * 27 * 27, 2 * 256 * 13 * 13
    passes = map_bytes + pooled + pooled / 2 + 3 * pooled  # pooling and its codes; statistics, normalisation
    product = 2 * 256 * 27 * 27 * 25 * 48 / 989.4e12
    assert seconds["forward conv2"] == pytest.approx(1024 * (product + passes / 3.35e12), rel=1e-6)
    # two products backward, and: gradient and codes to gradient; batch normalisation reads two twice and writes one
    passes = pooled + pooled / 2 + map_bytes + 5 * pooled
    assert seconds["backward conv2"] == pytest.approx(1024 * (2 * product + passes / 3.35e12), rel=1e-6)
    assert seconds["update"] == pytest.approx(60_965_224 * 40 / 3.35e12)
    assert dict((s.name, s.bound) for s in alone.stages)["forward fc7"] == "DRAM"  # 64 pictures, 16.8 million weights


def test_what_a_run_adds_up_to(fast, alone):
    assert fast.step == pytest.approx(sum(stage.seconds for stage in fast.stages))  # the exchange is hidden
    [exchange] = fast.beside
    assert exchange.seconds == pytest.approx(2 * 7 / 8 * 4 * 60_965_224 / 450e9)
    assert fast.is_resident
    assert fast.share == -(-1_281_167 // 8) * RECORD
    assert fast.load.seconds == pytest.approx(1_281_167 * RECORD / 7e9)
    assert fast.total == pytest.approx(fast.load.seconds + 100 * fast.epoch)
    assert fast.epoch > 156 * fast.step
    assert fast.total < fast.total_if_slower < fast.slower * fast.total
    # without a graph the host sets the pace of a GPU with 64 pictures
    assert (alone.bound, alone.step, alone.epochs) == ("host", 12.6e-3, 2)
    assert [s.bound for s in alone.beside] == ["host"]


def test_what_bounds_a_run():
    many = plan("fast", gpus=1024, batch_size=32768, pictures=40_000)
    assert many.bound == "network"
    assert many.step > many.beside[0].seconds
    small = plan("fast", gpus=1, chip="A10")
    assert not small.is_resident
    assert [s.bound for s in small.beside] == ["PCI Express"]
    assert small.slower is None
    assert small.total_if_slower is None
    assert "does not fit" in report(small)


def test_json_holds_everything(fast):
    found = json.loads(json.dumps(fast.to_dict()))
    assert found["modelled"] is True
    assert found["pictures_per_second"] == pytest.approx(8192 / fast.step)
    assert found["stages"][0] == asdict(fast.stages[0])
    assert set(found["pictures_per_second_and_gpu"]) == {s.name for s in (*fast.stages, *fast.beside)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chip": "H1000"}, "chip must be one of A100, A10, RTX 4090, H100, .* got 'H1000'"),
        ({"recipe": "slow"}, "recipe must be one of .*demo, .* got 'slow'"),
        ({"variant": "vgg"}, "variant must be one of paper, .* got 'vgg'"),
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"gpus": 3}, "batch_size must be a multiple of gpus, 3, got 8192"),
        ({"pictures": 0}, "set_size must be at least 1, got 0"),
        ({"pictures": 5000}, "batch_size must be at most the number of training pictures, 5000, got 8192"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


def test_the_command(tmp_path, capsys):
    pytest.importorskip("tyro")
    from fastalex import cli

    cli.main(["plan", "--gpus", "2", "--batch-size", "512", "--json", str(tmp_path / "plan.json")])
    assert "2 x H100" in capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["gpus"], found["batch_size"], found["recipe"]) == (2, 512, "fast")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "--chip", "V100"])
    assert stopped.value.code == 2
    assert "chip must be one of A100" in capsys.readouterr().err


def test_every_chip_has_memory_and_links():
    for chip in CHIPS:
        assert 20 < chip.memory < 300
        assert chip.host <= chip.link < 1000
        assert find_chip(chip.name.upper()) is chip
