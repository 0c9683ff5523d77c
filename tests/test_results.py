"""Benchmark results: reduction, tables, charts, and `fastalex bench report`."""

import copy
import json
from pathlib import Path

import pytest

from fastalex import cli, results
from fastalex.visualize.results import charts

INFO = {
    "operation": "lrn", "pass": "forward", "dtype": "fp32", "shape": [8, 96, 55, 55], "layer": "conv1", "device": "cpu",
    "layout": "channels_last", "timing": "paired", "bytes": 1, "flops": None, "peak_bytes": None, "gb_per_s": 3.5,
    "percent_of_copy": 40.0, "threads": 1, "load_average": 1.26,
}  # fmt: skip


def case(provider, median, ratio, group="lrn-conv1-forward-fp32-8x96x55x55", **changed):
    return {
        "group": group,
        "name": "test_lrn[...]",
        "stats": {"median": median, "q1": median * 0.9, "q3": median * 1.1, "rounds": 5, "data": [median] * 5},
        "extra_info": {**INFO, "provider": provider, "ratio": ratio, **changed},
    }


FULL = {
    "datetime": "2026-01-02T03:04:05",
    "machine_info": {
        "processor": "Some CPU", "gpu": None, "torch": "2.14.1", "triton": "3.8.0",
        "fastalex": {"commit": "abc", "changed": False}, "node": "secret",
    },
    "measured": {"copy_gb_per_s": 8.0},
    "benchmarks": [
        case("fastalex", 0.0123456, {"eager": 2.5, "compile": 0.8}),
        case("eager", 0.03, {"fastalex": 0.4, "compile": 0.3}),
        case("compile", 0.01, {"fastalex": 1.25, "eager": 3.0}),
        case("fastalex", 0.5, {"eager": 1.5}, "inference-paper-fp32", **{"pass": "inference", "tflop_per_s": 0.1}),
        case("eager", 0.75, {"fastalex": 0.67}, "inference-paper-fp32", **{"pass": "inference", "tflop_per_s": 0.06}),
        {"group": None, "name": "other", "stats": {}, "extra_info": {}},
    ],
}  # fmt: skip


@pytest.fixture
def full(tmp_path):
    path = tmp_path / "full.json"
    path.write_text(json.dumps(FULL))
    return path


def test_the_small_file_keeps_medians_ratios_and_the_machine(full, tmp_path):
    result = results.load(full)
    path = results.save(result, tmp_path / "kept")
    assert path.name == "2026-01-02-cpu.json"
    assert results.load(path) == result
    text = path.read_text()
    assert "secret" not in text
    assert len(text.splitlines()) == 5 + 2
    ours = result["cases"][0]
    assert (ours["median"], ours["q1"], ours["rounds"]) == (12.35, 11.11, 5)
    assert ours["ratio"] == {"eager": 2.5, "compile": 0.8}
    assert "flops" not in ours
    assert "peak_bytes" not in ours


def test_table_names_the_machine_and_keeps_losing_rows(full):
    lines = results.markdown(results.load(full)).splitlines()
    assert lines[0].startswith("Some CPU, 1 thread, torch 2.14.1, 2026-01-02. ")
    assert lines[2] == "| case | fastalex, ms | eager / fastalex | compile / fastalex | load average |"
    assert lines[4] == "| lrn-conv1-forward-fp32-8x96x55x55 | 12.3 | 2.50 | **0.80** | 1.3 |"
    assert lines[5] == "| inference-paper-fp32 | 500 | 1.50 | - | 1.3 |"


def on_a_gpu():
    result = copy.deepcopy(FULL)
    result["machine_info"]["gpu"] = {"name": "NVIDIA H100 80GB HBM3", "cudnn": 91002, "driver": "580.1"}
    for one in result["benchmarks"][:5]:
        one["extra_info"] |= {"device": "cuda", "peak_bytes": 3 * 10**9}
        del one["extra_info"]["load_average"], one["extra_info"]["threads"]
    return results.reduced(result)


def test_results_of_a_gpu(tmp_path):
    result = on_a_gpu()
    assert results.save(result, tmp_path).name == "2026-01-02-nvidia-h100-80gb-hbm3.json"
    assert results.markdown(result).startswith("NVIDIA H100 80GB HBM3, torch 2.14.1, cuDNN 91002, driver 580.1, 2026")
    assert [path.name for path in charts(result, tmp_path)] == [
        "speedup_operations.png", "speedup_models.png", "rates.png", "memory.png",
    ]  # fmt: skip


def test_charts_show_what_was_measured(full, tmp_path):
    paths = charts(results.load(full), tmp_path / "charts")
    assert [path.name for path in paths] == ["speedup_operations.png", "speedup_models.png", "rates.png"]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_points_of_the_speedup_chart(full):
    from fastalex.visualize.results import speedups

    axes = speedups(results.groups(results.load(full)), ["eager", "compile"], "title").axes[0]
    points = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert points["eager"] == [(2.5, 0), (1.5, 1)]
    assert points["compile"] == [(0.8, 0)]


def test_bench_report(full, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- cpu results -->\nold\n<!-- end of cpu results -->\nafter\n")
    arguments = ["bench", "report", str(full), "--out", str(tmp_path / "out"), "--readme", str(readme)]
    cli.main([*arguments, "--keep", str(tmp_path / "kept")])
    table = results.markdown(results.load(full))
    captured = capsys.readouterr()
    assert captured.out == table + "\n"
    assert "2026-01-02-cpu.json" in captured.err
    expected = f"before\n<!-- cpu results -->\n{table}\n<!-- end of cpu results -->\nafter\n"
    assert readme.read_text() == expected
    cli.main([*arguments[:2], str(tmp_path / "kept" / "2026-01-02-cpu.json"), *arguments[3:]])
    assert readme.read_text() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "is not JSON"),
        ("[]", "neither by pytest --benchmark-json nor by fastalex"),
        ('{"schema": 1}', "neither by pytest --benchmark-json nor by fastalex"),
        ('{"benchmarks": []}', "holds no case"),
    ],
)
def test_other_files(content, message, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "report", str(path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_readme_without_markers_stays_as_it_is(full, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="must contain these two lines once each"):
        results.replace_table(readme, results.load(full))
    assert readme.read_text() == "nothing here"


def test_the_readme_shows_the_newest_committed_result():
    root = Path(__file__).parents[1]
    newest = max((root / "benchmarks" / "results").glob("*-cpu.json"))
    assert results.markdown(results.load(newest)) in (root / "README.md").read_text()
