"""Benchmark results: reduction, tables, charts, and `fastalex bench report`."""

import copy
import json
import subprocess
import sys
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
        "processor": "Some CPU", "gpu": None, "torch": "2.14.1", "triton": "3.8.0", "numba": "0.68.1",
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
    assert lines[0].startswith("Some CPU, 1 thread, torch 2.14.1, numba 0.68.1, 2026-01-02. ")
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


def as_lines(content):
    """The cases of a pytest-benchmark file as a run on a GPU writes them, its ratios left to be computed."""
    head = {"datetime": content["datetime"], "machine_info": content["machine_info"]}
    rates = {"copy_gb_per_s": 3000.0, "matrix_tflop_per_s": {"fp32": 50.0}, "clocks": "1980 MHz"}
    cases = [
        {
            **case,
            **head,
            "name": f"test[{number}]",
            "measured": rates,
            "extra_info": {**case["extra_info"], "ratio": {}},
        }
        for number, case in enumerate(content["benchmarks"][:5])
    ]
    return [json.dumps(case) for case in cases]


def test_lines_of_a_run_on_a_gpu(tmp_path):
    """The last line of each test counts, of the machine and sources of the last; failures and half lines do not."""
    lines = as_lines(FULL)
    old = json.dumps({**json.loads(lines[0]), "stats": {"median": 9.0, "q1": 9.0, "q3": 9.0, "rounds": 1}})
    other = json.dumps({**json.loads(lines[1]), "name": "test[9]", "machine_info": {}})
    failed = json.dumps({"name": "test[8]", "datetime": "2026-01-03", "error": "no", "machine_info": {"gpu": None}})
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join([old, other, *lines, failed, lines[0][:50]]))
    result = results.load(path)
    assert [case["median"] for case in result["cases"]] == [12.35, 30.0, 10.0, 500.0, 750.0]
    assert result["cases"][0]["ratio"] == {"eager": 2.43, "compile": 0.81}
    assert result["measured"]["matrix_tflop_per_s"] == {"fp32": 50.0}
    path.write_text(lines[0])
    assert len(results.load(path)["cases"]) == 1
    path.write_text(failed)
    with pytest.raises(ValueError, match="holds no case"):
        results.load(path)


def test_table_of_a_gpu_says_how_near_the_bounds_are_and_what_the_host_needs():
    result = on_a_gpu()
    result["cases"][0] |= {"gb_per_s": 2345.6, "percent_of_copy": 81.2, "host_ms": 0.0361, "wall_ms": 0.0721}
    result["cases"][3] |= {"timing": "events"}
    lines = results.markdown(result).splitlines()
    assert "Triton 3.8.0" in lines[0]
    assert lines[2].endswith("| GB/s | % of copy | TFLOP/s | % of matmul | host, ms | call, ms |")
    assert lines[4] == (
        "| lrn-conv1-forward-fp32-8x96x55x55 | 12.3 | 2.50 | **0.80** | 2346 | 81 | - | - | 0.0361 | 0.0721 |"
    )
    assert lines[5].startswith("| inference-paper-fp32 | 500 (events) | 1.50 | - |")


def test_the_table_needs_no_command_line(full):
    done = subprocess.run([sys.executable, "-m", "fastalex.results", str(full)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == results.markdown(results.load(full)) + "\n"


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


def test_summary():
    def pair(group, ratio, **info):
        return [case("fastalex", 0.01, ratio, group, **info), case("eager", 0.02, {}, group, **info)]

    step = {"operation": "alexnet", "pass": "step", "layer": "paper"}
    inference = {**step, "pass": "inference", "dtype": "bf16"}
    cases = [
        *pair("many", {"eager": 2.0, "eager-nchw": 1.5, "fastalex-nchw": 1.1}, shape=[32, 96, 55, 55]),
        *pair("few", {"eager": 9.0}, shape=[8, 96, 55, 55]),
        *(one for n in (16, 1, 32) for one in pair(f"inference {n}", {"openvino": n / 20}, **inference, shape=[n, 3])),
        *pair("step 8", {"eager": 9.0}, **step, shape=[8, 3]),
        *pair("step 32", {"eager": 0.99}, **step, shape=[32, 3]),
        *pair("alone", {}, operation="max_pool", **{"pass": "both"}),
        *pair("left out", {"torchvision": 4.0}, operation="input", **{"pass": "read"}),
        case("openvino", 0.1, {}, "inference 1", **inference, shape=[1, 3]),
        case("torchvision", 0.1, {}, "left out", operation="input", **{"pass": "read"}),
    ]
    lines = results.summary(results.reduced({**FULL, "benchmarks": cases})).splitlines()
    assert lines[0].startswith("Some CPU, 1 thread, torch 2.14.1, numba 0.68.1, 2026-01-02. ")
    assert lines[2] == "| | layer or variant | dtype | batch | fastalex, ms | eager | openvino |"
    assert lines[4:] == [
        "| AlexNet, inference | paper | bf16 | 1 | 10 | - | **0.05** |",
        "| AlexNet, inference | paper | bf16 | 32 | 10 | - | 1.60 |",
        "| AlexNet, training step | paper | fp32 | 32 | 10 | **0.99** | - |",
        "| LRN, forward | conv1 | fp32 | 32 | 10 | 1.50 | - |",
        "| max-pool, forward + backward | conv1 | fp32 | 8 | 10 | - | - |",
    ]


@pytest.fixture
def checkout(tmp_path):
    """A README.md and a docs/benchmarks.md with places for tables."""
    (tmp_path / "docs").mkdir()
    for path in (tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"):
        path.write_text("before\n<!-- cpu results -->\nold\n<!-- end of cpu results -->\nafter\n")
    return tmp_path


def shows(path, table, kind="cpu"):
    return f"\n<!-- {kind} results -->\n{table}\n<!-- end of {kind} results -->\n" in path.read_text()


def test_bench_report(full, checkout, capsys):
    pytest.importorskip("tyro")
    readme, document = checkout / "README.md", checkout / "docs" / "benchmarks.md"
    arguments = ["bench", "report", str(full), "--out", str(checkout / "out"), "--readme", str(readme)]
    cli.main([*arguments, "--keep", str(checkout / "kept")])
    result = results.load(full)
    captured = capsys.readouterr()
    assert captured.out == results.markdown(result) + "\n"
    kept = checkout / "kept" / "2026-01-02-cpu.json"
    for path in (kept, readme, document):
        assert f"wrote {path}\n" in captured.err
    assert shows(readme, results.summary(result))
    assert shows(document, results.markdown(result))
    assert all(path.read_text().startswith("before\n") for path in (readme, document))
    assert all(path.read_text().endswith("\nafter\n") for path in (readme, document))
    expected = [readme.read_text(), document.read_text()]
    cli.main([*arguments[:2], str(kept), *arguments[3:]])
    assert [readme.read_text(), document.read_text()] == expected


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
    pytest.importorskip("tyro")
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "report", str(path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_without_markers_both_stay_as_they_are(name, full, checkout):
    (checkout / name).write_text("nothing here")
    texts = {path: path.read_text() for path in checkout.rglob("*.md")}
    with pytest.raises(ValueError, match=f"{name} must contain these two lines once each"):
        results.replace_tables(checkout / "README.md", results.load(full))
    assert {path: path.read_text() for path in checkout.rglob("*.md")} == texts


def test_summary_of_a_gpu():
    """What a loop without graphs waits for stands beside the device's time; a graph of ours is no rival."""
    gpu = {"name": "Some GPU", "cudnn": 1, "driver": "2"}
    info = {"operation": "alexnet", "pass": "inference", "layer": "paper", "shape": [1, 3]}
    cases = [
        case("fastalex", 1e-4, {"eager": 3.0, "fastalex-graph": 1.0}, "one", **info, wall_ms=2.0),
        case("eager", 3e-4, {}, "one", **info, wall_ms=0.5),
        case("fastalex-graph", 1e-4, {}, "one", **info, wall_ms=0.1),
        case("fastalex", 1e-3, {}, "workload-inference", **{**info, "layer": "", "shape": [8, 3]}, wall_ms=1.5),
    ]
    machine = {**FULL["machine_info"], "gpu": gpu}
    lines = results.summary(results.reduced({**FULL, "machine_info": machine, "benchmarks": cases})).splitlines()
    assert lines[2] == "| | layer or variant | dtype | batch | fastalex, ms | eager | loop, ms | eager, loop |"
    assert lines[4:] == [
        "| AlexNet, inference | paper | fp32 | 1 | 0.1 | 3.00 | 2 | **0.25** |",
        "| AlexNet, inference | workload | fp32 | 8 | 1 | - | 1.5 | - |",
    ]


@pytest.mark.parametrize(("kind", "device"), [("cpu", "cpu"), ("gpu", "nvidia-*[0-9]")])
def test_the_documents_show_the_newest_committed_result(kind, device):
    root = Path(__file__).parents[1]
    newest = max((root / "benchmarks" / "results").glob(f"*-{device}.json"))
    result = results.load(newest)
    renew = f"fastalex bench report {newest.relative_to(root)} --readme README.md"
    assert shows(root / "README.md", results.summary(result), kind), renew
    assert shows(root / "docs" / "benchmarks.md", results.markdown(result), kind), renew
