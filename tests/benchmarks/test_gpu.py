"""A GPU's times, on a stand-in for a CUDA device; and a run in which providers break it."""

import json
import re
import statistics
import subprocess
import sys

import pytest
import torch
from run_benchmarks import ROOT, run_benchmarks
from stand_in_cuda import StandIn

from benchmarks import gpu, harness, plan, providers
from benchmarks.harness import Case, Expected, NotApplicable, Race, WrongResult
from fastalex import results, timing
from fastalex.gpu import dispatch
from fastalex.gpu.convolution import CONV2D_RELU


@pytest.fixture
def cuda(monkeypatch):
    device = StandIn()
    device.install(monkeypatch)
    with timing.side_stream():
        yield device


def ones():
    return Expected((torch.ones(1),), 0.0)


def test_device_times_are_of_a_cleared_cache(cuda):
    seconds, how, uncaptured = gpu.device_seconds(cuda.run)
    assert (how, uncaptured) == ("graph", None)
    # 100 us cold, not 40 us warm
    assert seconds == pytest.approx([100e-6] * len(seconds))
    assert len(seconds) > 100
    assert cuda.replays >= len(seconds)
    assert cuda.clears >= len(seconds)


def test_a_graph_leaves_out_the_hosts_part(cuda):
    """Twelve kernels of 1 us, the last of which is launched 96 us after the clearing, which takes 80."""
    cuda.cold, cuda.warm, cuda.kernels, cuda.launch = 12e-6, 3e-6, 12, 8e-6
    times = []
    for capturable in (False, True):
        cuda.capturable = capturable
        seconds, how, uncaptured = gpu.device_seconds(cuda.run)
        times.append((how, statistics.median(seconds)))
        assert (uncaptured is None) == capturable
    assert times[0] == ("events", pytest.approx(17e-6))
    assert times[1] == ("graph", pytest.approx(12e-6))


@pytest.mark.parametrize("capturable", [False, True])
def test_long_runs_get_ten_rounds(capturable, cuda):
    cuda.cold = cuda.warm = 71e-3
    cuda.capturable = capturable
    seconds, *_ = gpu.device_seconds(cuda.run)
    assert len(seconds) >= gpu.LEAST_ROUNDS
    assert seconds == pytest.approx([71e-3] * len(seconds))


def test_what_is_a_graph_already_is_not_captured_again(cuda):
    cuda.capturable = False
    assert gpu.device_seconds(cuda.run, replayed=True)[1:] == ("graph", None)
    assert cuda.allocator


def test_a_lone_backward_is_captured_on_the_stream_of_its_forward(cuda):
    race = Race({"fastalex": cuda.backward}, ones)
    assert gpu.measured(race, "fastalex", ones()).timing == "graph"


def test_a_provider_has_the_host_s_time_and_its_own_memory(cuda):
    found = gpu.measured(Race({"fastalex": lambda: cuda.run}, ones), "fastalex", ones())
    assert found.peak_bytes == 7_000_000
    assert 0 < found.host_seconds <= found.wall_seconds


def test_a_wrong_provider_is_not_timed(cuda):
    with pytest.raises(WrongResult):
        gpu.measured(Race({"wrong": lambda: lambda: torch.zeros(1)}, ones), "wrong", ones())
    assert cuda.clears == 0


def test_measured_rates_are_those_of_random_data(cuda, monkeypatch):
    made = []

    def randn(*size, device):
        made.append(size)
        return torch.empty(size, device="meta")

    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(timing, "device_milliseconds", lambda run: 2.0)
    for function in (harness.copy_rate, harness.matrix_rate):
        function.cache_clear()
    try:
        assert harness.copy_rate("cuda") == 2 * 4 * 2**28 / 2e-3
        assert harness.matrix_rate("cuda", "fp16") == 2 * 8192**3 / 2e-3
    finally:
        for function in (harness.copy_rate, harness.matrix_rate):
            function.cache_clear()
    assert made == [(2**28,), (2, 8192, 8192)]


def test_forms_of_the_convolution_take_part_or_say_why_not():
    def choice(channels, size, stride):
        shapes = ((1, channels, 16, 16), (16, channels, size, size))
        x, weight = (torch.ones(shape).contiguous(memory_format=torch.channels_last) for shape in shapes)
        geometry = ((stride, stride), (0, 0), (1, 1), 1)
        return dispatch.choose(CONV2D_RELU, x, weight, None, *geometry).candidate.name

    with providers.forced("fastalex-split_k"):
        assert choice(8, 1, 1) == "triton_split_k"
        assert choice(3, 8, 4) == "space_to_depth_split_k"
    with pytest.raises(NotApplicable, match="triton_descriptors"), providers.forced("fastalex-descriptors"):
        choice(3, 1, 1)
    with providers.forced("fastalex"):
        assert choice(8, 1, 1) == "library"


# ---- a run

SUITE = """
import os, time, torch
from benchmarks import gpu, harness, plan, providers
from benchmarks.harness import Case, Expected, NotApplicable, Race, device
from stand_in_cuda import in_this_process

stand_in = in_this_process()
harness.copy_rate, harness.matrix_rate = (lambda where: 1e12), (lambda where, dtype: 1e15)
plan.limit = lambda case, provider: 5
gpu.START_SECONDS = 60
NAMES = ("fastalex", "illegal", "wrong", "hangs", "dies", "uncaptured", "declines", "backward", "eager")
CASES = [Case("lrn", passes, "fp32", (2, 8), "small") for passes in ("forward", "both")]

def build(name):
    with open("built", "a") as file:
        print(os.getpid(), name, file=file)
    stand_in.capturable = name != "uncaptured"
    stand_in.cold = 250e-6 if name == "eager" else 100e-6
    if name == "declines":
        raise NotApplicable("not this case")
    return {
        "illegal": lambda: stand_in.illegal,
        "wrong": lambda: lambda: torch.zeros(1),
        "hangs": lambda: lambda: time.sleep(600),
        "dies": lambda: lambda: os._exit(7),
        "backward": stand_in.backward,
    }.get(name, lambda: stand_in.run)()

def prepare(case, names):
    builders = {name: (lambda name=name: build(name)) for name in names}
    return Race(builders, lambda: Expected((torch.ones(1),), 0.0), bytes=10**7)

@providers.entries([], CASES, NAMES, cuda_quick=lambda case: NAMES if case.passes == "forward" else NAMES[:1])
def test_lrn(case, provider, contest):
    contest(case, provider, prepare)
"""
CUDA = "stand_in_cuda.in_this_process()"


@pytest.mark.slow
def test_a_run(tmp_path):
    """Every provider that breaks something costs its own result, at once in the lines; what was measured stays."""
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    lines = tmp_path / "lines.jsonl"
    arguments = ("--benchmark-only", "--lines", str(lines), "--benchmark-json")
    done = run_benchmarks(tmp_path, *arguments, str(files[0]), script=SUITE, cuda=CUDA)
    assert "4 failed, 5 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    # first of all the kernels of the two cases were compiled, by other processes
    assert "compiling the kernels of 2 cases" in done.stdout
    built = [line.split() for line in (tmp_path / "built").read_text().splitlines()]
    assert [name for _, name in built[:2]] == ["fastalex", "fastalex"]
    assert built[0][0] not in {process for process, _ in built[2:]}

    found = {}
    for line in map(json.loads, lines.open()):
        provider = line["provider"] if "error" in line else line["extra_info"]["provider"]
        found.setdefault(provider, line)
    errors = {name: line["error"] for name, line in found.items() if "error" in line}
    assert "illegal memory access" in errors.pop("illegal")
    assert errors.pop("wrong").startswith("WrongResult: 100.000% of result 0")
    assert errors.pop("hangs").startswith("TimeoutError: stopped after")
    assert errors.pop("dies").startswith("Died: its process ended with code 7")
    assert errors.pop("declines") == "NotApplicable: not this case"
    assert not errors
    how = {name: line["extra_info"]["timing"] for name, line in found.items() if "stats" in line}
    assert how == {"fastalex": "graph", "uncaptured": "events", "backward": "graph", "eager": "graph"}
    assert "not permitted when stream is capturing" in found["uncaptured"]["extra_info"]["uncaptured"]

    content = json.loads(files[0].read_text())
    assert {"processor", "gpu", "torch", "triton", "numba", "fastalex"} <= set(content["machine_info"])
    assert content["machine_info"]["gpu"]["name"] == "Stand-in"
    assert content["measured"]["copy_gb_per_s"] == 1000
    forward = [case for case in content["benchmarks"] if "forward" in case["group"]]
    by_provider = {case["extra_info"]["provider"]: case for case in forward}
    ours, eager = by_provider["fastalex"], by_provider["eager"]
    assert ours["group"] == eager["group"] == "lrn-small-forward-fp32-2x8"
    assert ours["stats"]["median"] == pytest.approx(100e-6)
    assert eager["stats"]["median"] == pytest.approx(250e-6)
    assert ours["stats"]["rounds"] > 100
    assert ours["extra_info"]["ratio"]["eager"] == 2.5
    assert ours["extra_info"]["gb_per_s"] == 100
    assert ours["extra_info"]["percent_of_copy"] == 10
    assert ours["extra_info"]["device"] == "cuda"

    # either file becomes the same table
    table = results.markdown(results.load(lines))
    assert results.markdown(results.load(files[0])) == table
    assert "| lrn-small-forward-fp32-2x8 | 0.1 | " in table

    # again: what was measured is not measured again, what failed is
    before = len(lines.read_text().splitlines())
    done = run_benchmarks(
        tmp_path, *arguments, str(files[1]), "--providers", "fastalex,wrong,eager", script=SUITE, cuda=CUDA
    )
    assert "1 failed, 3 passed" in done.stdout, done.stdout
    added = [json.loads(line) for line in lines.read_text().splitlines()[before:]]
    assert [line["provider"] for line in added] == ["wrong"]
    first, second = ({c["name"]: c["stats"]["data"] for c in json.loads(f.read_text())["benchmarks"]} for f in files)
    assert second == {name: data for name, data in first.items() if name in second}
    assert len(second) == 3

    # pytest-benchmark's own comparison of the two, in a folder without a conftest.py, which it would import
    (tmp_path / "empty").mkdir()
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", *map(str, files), "--group-by", "group"],
        capture_output=True, text=True, cwd=tmp_path / "empty",
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count("test_lrn[small-forward-fp32-2x8-eager]") == 2


def test_what_a_gpu_runs_without_long(tmp_path):
    """The real suites, collected as on a GPU: what runs, how many compilations, and in how many minutes."""
    done = run_benchmarks(tmp_path, "--collect-only", "-q", "--benchmark-only", target=ROOT / "benchmarks", cuda=CUDA)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    compiled = [test for test in tests if "compile" in test]
    assert 100 <= len(tests) <= 125
    assert len(compiled) <= 8
    assert sum("max-autotune" in test for test in compiled) == 1
    assert tests[-1] in compiled
    head = re.search(r"benchmarks: (\d+) provider runs in \d+ cases, modelled to take (\d+) minutes", done.stdout)
    runs, minutes = map(int, head.groups())
    assert runs == len(tests)
    assert minutes <= 10


def test_modelled_times():
    step = Case("alexnet", "step", "bf16", (128, 3, 224, 224), "paper")
    layer = Case("lrn", "forward", "fp16", (128, 96, 55, 55), "conv1")
    runs = [(layer, "fastalex"), (layer, "eager"), (step, "compile")]
    assert plan.total(runs) == plan.START_SECONDS + plan.KERNEL_SECONDS + 2 * plan.SECONDS["operation"] + 60
    assert all(plan.limit(*run) > 2 * plan.seconds(*run) for run in runs)
