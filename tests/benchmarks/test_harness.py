"""The harness measures what it says: on a CPU, and through pytest-benchmark."""

import json
import time

import pytest
import torch
from run_benchmarks import run_benchmarks

from benchmarks import harness, providers
from benchmarks.harness import Case, Expected, Measured, Race, WrongResult, check

CASE = Case("lrn", "forward", "fp32", (2, 8, 5, 5), "conv1")


def ones():
    return Expected((torch.ones(1),), 0.0)


# ---- on a CPU


def test_cpu_rounds_are_interleaved_and_ratios_paired(monkeypatch):
    order = []
    # in turn, after one run of each; the ratio of the medians would be 1
    times = iter([1, 1, *(1, 2), *(10, 10), *(100, 300)])

    def timed(run, *_):
        run()
        return next(times)

    monkeypatch.setattr(harness, "seconds_of", timed)
    monkeypatch.setattr(harness, "CPU_ROUNDS", (3, 3))
    names = ["fastalex", "eager"]
    race = Race(
        {name: (lambda name=name: lambda: order.append(name)) for name in names},
        lambda: Expected((), 0.0),
        observe=lambda out: (),
    )
    found = harness.side_by_side(race)
    assert order == 5 * names  # once to check, once to know how long it takes, three rounds
    assert found["fastalex"].seconds == [1, 10, 100]
    assert found["fastalex"].ratio == {"eager": 2.0}
    assert found["eager"].ratio == {"fastalex": 0.5}
    assert found["fastalex"].timing == "paired"


def test_calls_of_a_run_share_its_time(monkeypatch):
    monkeypatch.setattr(harness, "seconds_of", lambda run, clock=None: 5.0)
    race = Race({"fastalex": lambda: lambda: torch.ones(1)}, ones, calls=50, host=True)
    # the host's time is taken as on a CPU, wherever the work is
    assert harness.side_by_side(race)["fastalex"].seconds == [0.1] * harness.CPU_ROUNDS[0]


def test_a_race_may_count_cpu_time():
    """A run that sleeps takes none."""
    run = Race({"fastalex": lambda: lambda: time.sleep(0.02) or torch.ones(1)}, ones, clock=time.process_time)
    measured = harness.side_by_side(run)["fastalex"]
    assert measured.timing == "paired, CPU time"
    assert measured.median < 0.01


def test_untimed_races_only_check():
    found = harness.side_by_side(Race({"fastalex": lambda: lambda: torch.ones(1)}, ones), timed=False)
    assert found["fastalex"] == Measured([], "unmeasured")


# ---- correctness before timing


def test_check():
    expected = Expected((torch.tensor([1.0, -10.0, 0.0, 3.0]),), tolerance=0.01)
    check((torch.tensor([1.09, -10.0, 0.0, 3.0]),), expected)
    with pytest.raises(WrongResult, match=r"25.000% of result 0 differ by more than 0.1"):
        check((torch.tensor([1.11, -10.0, 0.0, 3.0]),), expected)
    with pytest.raises(WrongResult, match="differ"):
        check((torch.tensor([1.0, -10.0, torch.nan, 3.0]),), expected)
    with pytest.raises(WrongResult, match="shape"):
        check((torch.ones(3),), expected)
    with pytest.raises(WrongResult, match="0 results, expected 1"):
        check((), expected)
    one_may_differ = Expected(expected.tensors, 0.01, outliers=0.25)
    check((torch.tensor([5.0, -10.0, 0.0, 3.0]),), one_may_differ)
    with pytest.raises(WrongResult, match="differ"):
        check((torch.tensor([5.0, -5.0, 0.0, 3.0]),), one_may_differ)


@pytest.mark.parametrize("which", ["forward", "backward", "both"])
def test_passes(which):
    x = torch.tensor([1.0, 2.0])
    run = providers.passes(lambda x: x**2, [x], torch.tensor([1.0, 10.0]), which)
    for _ in range(2):  # again and again
        out = run()
        found = [t.tolist() for t in (out if isinstance(out, tuple) else (out,))]
        assert found == {"forward": [[1, 4]], "backward": [[2, 40]], "both": [[1, 4], [2, 40]]}[which]


@pytest.mark.parametrize("which", ["forward", "backward", "both"])
def test_flops_of_a_pass(which):
    case = Case("linear", which, "fp32", (3, 4))
    inputs = [torch.randn(3, 4), torch.randn(5, 4)]
    linear = torch.nn.functional.linear
    race = providers.operation_race(case, ["eager"], inputs=inputs, ours=linear, eager=linear, reference=linear)
    assert race.flops == {"forward": 1, "backward": 2, "both": 3}[which] * 2 * 3 * 4 * 5
    assert isinstance(harness.side_by_side(race)["eager"], Measured)


def test_tf32_is_the_same_for_all_and_restored():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for dtype, allowed in (("tf32", True), ("fp32", False), ("fp16", False)):
        with harness.tf32(dtype):
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_details(monkeypatch):
    monkeypatch.setattr(harness, "copy_rate", lambda where: 100e9)
    monkeypatch.setattr(harness, "matrix_rate", lambda where, dtype: 1e12)
    race = Race({}, ones, bytes=10**9, flops=10**9)
    info = harness.details(CASE, "eager-nchw", race, Measured([0.02, 0.04, 0.03], "paired", 5, {"eager": 1.5}), "cuda")
    assert info["layout"] == "nchw"
    assert info["gb_per_s"] == pytest.approx(33.33, abs=0.01)
    assert info["percent_of_copy"] == pytest.approx(33.3)
    assert info["tflop_per_s"] == pytest.approx(0.033)
    assert info["percent_of_matrix_rate"] == pytest.approx(3.3)
    assert (info["peak_bytes"], info["ratio"], info["shape"]) == (5, {"eager": 1.5}, [2, 8, 5, 5])


# ---- who takes part


def test_unavailable(monkeypatch):
    monkeypatch.setattr(providers.shutil, "which", lambda name: None)
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    for provider, where, dtype, reason in (
        ("fastalex", "cpu", "fp32", None),
        ("compile", "cpu", "fp32", "torch.compile needs a C++ compiler here"),
        ("compile", "cuda", "fp32", None),
        ("tensorrt", "cpu", "fp32", providers.NO_GPU),
        ("tensorrt", "cuda", "fp16", "tensorrt is not installed"),
        ("onnxruntime", "cpu", "fp32", "onnxruntime is not installed"),
        ("onnxruntime", "cpu", "bf16", "has no bf16 on a CPU"),
        ("openvino", "cuda", "fp32", "runs on CPUs here"),
    ):
        assert providers.unavailable(provider, where, dtype) == reason


def test_engines_get_the_lrn_operator():
    onnx = pytest.importorskip("onnx")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0))
    graph = onnx.load_from_string(providers.onnx_file(model, torch.zeros(1, 3, 4, 4))).graph
    operators = [node.op_type for node in graph.node if node.op_type != "Identity"]
    assert operators == ["Conv", "LRN"]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_entries(where, monkeypatch):
    monkeypatch.setattr(providers, "device", lambda: where)
    monkeypatch.setattr(providers.shutil, "which", lambda name: "/usr/bin/g++")
    elsewhere = Case("lrn", "forward", "fp16", (128, 96, 55, 55))
    names = ("fastalex", "compile", "compile-max-autotune")
    mark = providers.entries([CASE], [elsewhere], names, cuda_quick=lambda case: names)
    skipped = {p.id: p.marks[0].kwargs["reason"] for p in mark.args[1] if p.marks}
    run = [p.id for p in mark.args[1] if not p.marks]
    if where == "cuda":
        assert run == [f"forward-fp16-128x96x55x55-{name}" for name in ("fastalex", "compile", "compile-max-autotune")]
        assert not skipped
    else:
        assert run == ["conv1-forward-fp32-2x8x5x5-fastalex"]  # compile only where it is asked for on a CPU
        assert skipped == {
            "conv1-forward-fp32-2x8x5x5-compile-max-autotune": "compile-max-autotune: needs a CUDA device",
            "forward-fp16-128x96x55x55-any": "needs a CUDA device",
        }


def test_on_a_gpu_the_rest_is_long(monkeypatch):
    monkeypatch.setattr(providers, "device", lambda: "cuda")
    mark = providers.entries([], [CASE], ("fastalex", "eager"), cuda_quick=lambda case: ("eager",))
    assert [[m.name for m in p.marks] for p in mark.args[1]] == [["long"], []]


def test_long_cases_come_with_compile_and_only_on_a_cpu(monkeypatch):
    monkeypatch.setattr(providers.shutil, "which", lambda name: "/usr/bin/g++")
    for where, expected in (("cpu", ["fastalex", "compile"]), ("cuda", [])):
        monkeypatch.setattr(providers, "device", lambda where=where: where)
        mark = providers.entries([], [], ("fastalex", "compile"), cpu_long=[CASE])
        assert [p.values[1] for p in mark.args[1]] == expected
        assert all([m.name for m in p.marks] == ["long"] for p in mark.args[1])


# ---- through pytest-benchmark


SMALL = """
import torch
from benchmarks import harness, providers
from benchmarks.harness import Case, Expected, Race

CASES = [Case("lrn", "forward", "fp32", (2, 8), "small")]

def prepare(case, names):
    return Race({name: (lambda: lambda: torch.ones(1)) for name in names}, lambda: Expected((torch.ones(1),), 0.0))

@providers.entries(CASES, [], ("fastalex", "eager"))
def test_lrn(case, provider, contest):
    contest(case, provider, prepare)
"""


def test_long_cases_are_asked_for(tmp_path):
    script = SMALL.replace("entries(CASES, []", "entries([], []").replace('"eager"))', '"eager"), cpu_long=CASES)')
    assert run_benchmarks(tmp_path, "--benchmark-only", script=script).returncode == 5
    done = run_benchmarks(tmp_path, "--benchmark-only", "--long", script=script)
    assert done.returncode == 0, done.stdout


def test_a_run_without_an_executed_case_fails(tmp_path):
    script = SMALL.replace("entries(CASES, []", "entries([], CASES")
    done = run_benchmarks(tmp_path, "--benchmark-only", script=script)
    assert done.returncode == 5
    assert "needs a CUDA device" in done.stdout


def test_the_real_suites_check_before_they_time(tmp_path):
    """One case of the real suites, twice: as it is, and with an LRN that is wrong in its last digit but three."""
    name = "conv2-forward-fp32-8x256x27x27"
    path = tmp_path / "results.json"
    done = run_benchmarks(tmp_path, "--benchmark-only", "-k", name, "--benchmark-json", str(path))
    assert done.returncode == 0, done.stdout
    by_provider = {case["extra_info"]["provider"]: case for case in json.loads(path.read_text())["benchmarks"]}
    assert set(by_provider) == {"fastalex", "fastalex-nchw", "eager", "eager-nchw"}
    info = by_provider["fastalex"]["extra_info"]
    assert set(info["ratio"]) == {"fastalex-nchw", "eager", "eager-nchw"}
    assert info["bytes"] == 2 * 4 * 8 * 256 * 27 * 27
    assert info["timing"] == "paired"

    (tmp_path / "broken.py").write_text(
        "from fastalex import functional\n"
        "correct = functional.local_response_norm\n"
        "functional.local_response_norm = lambda *args: 1.0001 * correct(*args)\n"
    )
    done = run_benchmarks(tmp_path, "--benchmark-only", "-k", name, "-p", "broken")
    assert done.returncode == 1
    assert "WrongResult" in done.stdout
    assert "2 failed, 2 passed" in done.stdout


def test_a_mean_that_is_not_exact_makes_nothing_wrong(monkeypatch):
    """On a GPU the mean of ones may be less than 1 by a unit in its last place."""
    exact = torch.Tensor.mean
    monkeypatch.setattr(
        torch.Tensor, "mean", lambda self, *args, **kwargs: exact(self, *args, **kwargs) * (1 - 2.0**-53)
    )
    check((torch.ones(7),), Expected((torch.ones(7, dtype=torch.float64),), 1e-5))
    with pytest.raises(WrongResult, match=r"14.286%"):
        check((torch.arange(7.0),), Expected((torch.tensor([9.0, 1, 2, 3, 4, 5, 6]),), 1e-5))
