"""The choice between candidates: forced, measured, default; and the file of measurements."""

import contextlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastalex
from fastalex import backend
from fastalex import functional as F
from fastalex.choices import dispatched, operator_calls
from fastalex.gpu import convolution, dispatch
from fastalex.gpu.convolution import CONV2D_RELU
from fastalex.gpu.dispatch import Candidate, Measurement, Operation
from fastalex.gpu.tuning import tune_model


def yes(*args):
    return None


def unless_tall(x):
    return "needs at most 4 rows" if x.shape[0] > 4 else None


def fail(x):
    raise ValueError("does not compile\nfor this GPU")


DOUBLING = Operation(
    "doubling",
    {
        "library": Candidate("library", lambda x: x + x, yes),
        "product": Candidate("product", lambda x: 2 * x, unless_tall),
        "wrong": Candidate("wrong", lambda x: 3 * x, yes),
        "poisoned": Candidate("poisoned", lambda x: x * torch.nan, yes),
        "failing": Candidate("failing", fail, yes),
        "deaf": Candidate("deaf", lambda x: (x + x).nan_to_num(0.0), yes),
        "flat": Candidate("flat", lambda x: (x + x).flatten(), yes),
    },
    lambda x: ["library"],
    lambda x: f"{x.shape[1]} columns",
    "library",
)
HERE = dispatch.environment(torch.device("cpu"))


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    """An empty user cache, an operation of this file's, and nothing remembered before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(dispatch.OPERATIONS, DOUBLING.name, DOUBLING)
    dispatch.forget()
    yield tmp_path
    dispatch.forget()


def chosen(x):
    return dispatch.choose(DOUBLING, x).candidate.name


def key_of(x):
    return dispatch.table_key(DOUBLING, dispatch.flags(), (x,))


def fast(name):
    return Measurement(name, {name: 1.0, "library": 2.0}, {}, 3)


# ---- the choice


def test_default_measured_forced():
    x = torch.ones(3, 5)
    choice = dispatch.choose(DOUBLING, x)
    assert choice.candidate.name == "library"
    assert choice.reason == f"shipped default; not measured here: {key_of(x)}"
    dispatch.save(HERE, {key_of(x): fast("product")})
    assert dispatch.choose(DOUBLING, x).reason == "measured at batch 3, in ms: product 1, library 2"
    assert chosen(x) == "product"
    with dispatch.force("doubling", "wrong"):
        assert dispatch.choose(DOUBLING, x) == (DOUBLING.candidates["wrong"], "forced")
    assert chosen(x) == "product"


def test_buckets_and_what_else_is_measured_apart():
    dispatch.save(HERE, {key_of(torch.ones(2, 5)): fast("product")})
    # one bucket reaches from 1 to 31
    assert [chosen(torch.ones(n, 5)) for n in (1, 4, 31, 32)] == ["product", "product", "library", "library"]
    assert chosen(torch.ones(2, 6)) == "library"
    assert chosen(torch.ones(2, 5).half()) == "library"
    keys = [key_of(torch.ones(n, 5)) for n in (0, 1, 31, 32, 127, 128, 255, 256, 1000)]
    assert [key.rpartition("batch ")[2] for key in keys] == [
        "0+", "1+", "1+", "32+", "32+", "128+", "128+", "256+", "256+"
    ]  # fmt: skip


def test_a_measured_candidate_that_cannot_run_gives_way():
    dispatch.save(HERE, {key_of(torch.ones(8, 5)): fast("product")})
    candidate, reason = dispatch.choose(DOUBLING, torch.ones(8, 5))
    assert candidate.name == "library"
    assert reason == "shipped default; measured as fastest, but product: needs at most 4 rows"
    dispatch.save(HERE, {key_of(torch.ones(8, 5)): fast("of another version")})
    assert dispatch.choose(DOUBLING, torch.ones(8, 5)).reason.endswith("there is no such candidate")


def test_force_takes_the_first_that_can_run():
    with dispatch.force(DOUBLING, "product", "wrong"):
        assert chosen(torch.ones(2, 5)) == "product"
        assert dispatch.choose(DOUBLING, torch.ones(8, 5)).reason == "forced; product: needs at most 4 rows"
        assert chosen(torch.ones(8, 5)) == "wrong"
        with dispatch.force(DOUBLING, "failing"):
            assert chosen(torch.ones(2, 5)) == "failing"
        assert chosen(torch.ones(2, 5)) == "product"
    message = "fastalex.doubling: no forced candidate can run: product: needs at most 4 rows"
    with dispatch.force(DOUBLING, "product"), pytest.raises(RuntimeError, match=message):
        dispatch.choose(DOUBLING, torch.ones(8, 5))
    assert chosen(torch.ones(2, 5)) == "library"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tripling", "library"), "operation must be one of .*doubling, got 'tripling'"),
        (("doubling", "triton"), "candidates of doubling are library, .*; got 'triton'"),
        (("doubling",), "name at least one candidate of doubling"),
    ],
)
def test_refused_forcing(arguments, message):
    with pytest.raises(ValueError, match=message), dispatch.force(*arguments):
        pass


@pytest.fixture
def cudnn(monkeypatch):
    """The settings of torch.backends.cudnn, put back afterwards."""
    settings = torch.backends.cudnn
    before = settings.benchmark, settings.deterministic, settings.conv.fp32_precision
    yield settings
    settings.benchmark, settings.deterministic, settings.conv.fp32_precision = before


def test_settings_of_cudnn_are_part_of_the_key(cudnn):
    x = torch.ones(2, 5)
    keys = {key_of(x)}
    cudnn.benchmark = not cudnn.benchmark
    keys.add(key_of(x))
    cudnn.deterministic = True
    keys.add(key_of(x))
    for precision in ("ieee", "tf32"):
        cudnn.conv.fp32_precision = precision
        assert dispatch.flags().precision == precision
        keys.add(key_of(x))
    assert len(keys) == 4  # one of the precisions was in force before
    assert "float16, batch" in key_of(x.half())  # in which TF32 has no part


def test_allow_tf32_is_honoured():
    code = (
        "import torch; from fastalex.gpu import dispatch\n"
        "found = [dispatch.flags().precision]\n"
        "for allowed in (False, True):\n"
        "    torch.backends.cudnn.allow_tf32 = allowed; found.append(dispatch.flags().precision)\n"
        "print(*found)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["tf32", "ieee", "tf32"]


def test_deterministic_algorithms_count(cudnn):
    cudnn.deterministic = False
    assert not dispatch.flags().deterministic
    torch.use_deterministic_algorithms(True)
    try:
        assert dispatch.flags().deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_cudnns_fusion_is_refused_where_algorithms_must_be_deterministic(cudnn):
    """cuDNN's own operator ignores the setting; looked at as a CUDA tensor sees it."""

    class OnGPU:
        is_cuda = True

    cudnn.deterministic = False
    assert convolution.no_cudnn(OnGPU()) is None
    cudnn.deterministic = True
    assert "deterministic" in convolution.no_cudnn(OnGPU())


# ---- the file


def test_what_is_saved_is_readable_and_found_again():
    x = torch.ones(3, 5)
    dispatch.save(HERE, {key_of(x): fast("product")})
    content = json.loads(dispatch.table_path().read_text())
    assert content["measurements"][HERE][key_of(x)]["milliseconds"] == {"product": 1.0, "library": 2.0}
    dispatch.forget()
    assert chosen(x) == "product"
    dispatch.table_path().unlink()
    assert chosen(x) == "product"  # read once
    dispatch.forget()
    assert chosen(x) == "library"


def test_the_users_cache_directory(monkeypatch, tmp_path):
    assert dispatch.table_path() == tmp_path / "fastalex" / "dispatch.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(dispatch.table_path()) == "/home/somebody/.cache/fastalex/dispatch.json"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 99, "measurements": {}}',
        '{"format": 1}',
        '{"format": 1, "measurements": []}',
        '{"format": 1, "measurements": {"a": {"b": {"speed": 1}}}}',
        '{"format": 1, "measurements": {"a": {"b": 3}}}',
    ],
)
def test_a_broken_file_is_ignored_with_one_line(content, caplog):
    path = dispatch.table_path()
    path.parent.mkdir()
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "fastalex"):
        assert chosen(torch.ones(2, 5)) == "library"
        assert chosen(torch.ones(2, 6)) == "library"
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"{path} is ignored: ")
    assert "\n" not in message


def test_bytes_that_are_no_text(caplog):
    path = dispatch.table_path()
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    assert chosen(torch.ones(2, 5)) == "library"
    assert len(caplog.records) == 1


def test_other_versions_are_ignored_with_one_line(caplog):
    x = torch.ones(2, 5)
    dispatch.save("sm_42, torch 9", {key_of(x): fast("product")})
    dispatch.forget()
    with caplog.at_level(logging.WARNING, "fastalex"):
        assert chosen(x) == "library"
        assert chosen(torch.ones(2, 6)) == "library"
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == f"{dispatch.table_path()} has no measurements for {HERE}: `fastalex tune` makes them"
    dispatch.save(HERE, {key_of(x): fast("product")})
    assert set(json.loads(dispatch.table_path().read_text())["measurements"]) == {HERE, "sm_42, torch 9"}


@pytest.mark.parametrize("obstacle", ["read-only", "a file in its place"])
def test_a_cache_that_cannot_be_written(own_table, obstacle, caplog, monkeypatch):
    """The measurements then last for the process.  Root writes anywhere: so also a file where a folder should be."""
    x = torch.ones(2, 5)
    if obstacle == "read-only":

        def denied(*args):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(dispatch, "write_whole", denied)
    else:
        (own_table / "fastalex").write_text("")
    with caplog.at_level(logging.WARNING, "fastalex"):
        dispatch.save(HERE, {key_of(x): fast("product")})
    assert "last for this process only" in caplog.text
    assert chosen(x) == "product"


def add_many(process):
    for i in range(10):
        dispatch.save("somewhere", {f"{process}-{i}": fast("product")})


def test_concurrent_writers_lose_nothing():
    processes = [multiprocessing.get_context("fork").Process(target=add_many, args=(p,)) for p in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    entries = json.loads(dispatch.table_path().read_text())["measurements"]["somewhere"]
    assert entries.keys() == {f"{p}-{i}" for p in range(4) for i in range(10)}


@pytest.fixture
def forbidden(monkeypatch):
    """Reading the table fails the test."""

    def read(path):
        raise AssertionError("the table was read")

    monkeypatch.setattr(dispatch, "read_table", read)


def test_no_file_access_and_no_tuning_under_capture_or_compilation(forbidden, monkeypatch):
    """As a CUDA tensor sees it while its stream is captured; and what is decided then is decided again later."""
    x = torch.ones(2, 5)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    choice = dispatch.choose(DOUBLING, x)
    assert choice.reason == "shipped default; the table is not read during a capture or a compilation"
    with pytest.raises(RuntimeError, match="cannot run during a capture or a compilation"):
        dispatch.tune(DOUBLING, x)
    monkeypatch.undo()

    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.is_capturing(OnGPU())
    assert not dispatch.is_capturing(x)
    monkeypatch.setenv("XDG_CACHE_HOME", str(dispatch.table_path().parents[1]))
    assert dispatch.choose(DOUBLING, x).reason.startswith("shipped default; not measured here")


def test_compiling_a_model_reads_no_file(forbidden):
    x, w = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    exported = torch.export.export(Convolution(), (x, w))
    assert any("conv2d_relu" in str(node.target) for node in exported.graph.nodes)


class Convolution(nn.Module):
    def forward(self, x, w):
        return F.conv2d_relu(x, w)


# ---- the table that ships


def shipped(monkeypatch, folder, measured, where="cpu, torch 9, triton 9, cuDNN 9"):
    """As if measurements for this architecture lay beside the package."""
    (folder / "tables").mkdir()
    dispatch.merge(folder / "tables" / "cpu.json", where, measured)
    monkeypatch.setattr(dispatch, "__file__", str(folder / "dispatch.py"))
    dispatch.shipped_table.cache_clear()
    dispatch.forget()


@pytest.fixture
def no_shipped_table_remains():
    yield
    dispatch.shipped_table.cache_clear()


@pytest.mark.usefixtures("no_shipped_table_remains")
def test_what_ships_is_asked_below_the_users_own_table(monkeypatch, tmp_path):
    x = torch.ones(2, 5)
    shipped(monkeypatch, tmp_path, {key_of(x): fast("product")})
    choice = dispatch.choose(DOUBLING, x)
    assert choice.candidate.name == "product"
    assert choice.reason == "shipped measurement at batch 3, in ms: product 1, library 2"
    # too tall for that candidate: the default, and why
    key = key_of(torch.ones(8, 5))
    assert key == key_of(x)
    assert (
        "shipped measurement as fastest, but product: needs at most"
        in dispatch.choose(DOUBLING, torch.ones(8, 5)).reason
    )
    dispatch.save(HERE, {key_of(x): fast("library")})
    assert dispatch.choose(DOUBLING, x).reason.startswith("measured at batch 3")


@pytest.mark.usefixtures("no_shipped_table_remains")
def test_another_layer_or_architecture_finds_nothing_shipped(monkeypatch, tmp_path):
    shipped(monkeypatch, tmp_path, {key_of(torch.ones(2, 6)): fast("product")})
    assert chosen(torch.ones(2, 5)) == "library"
    assert dispatch.shipped_table("sm_42") == {}


def test_the_table_of_sm_90_serves_alexnet():
    """Every entry names a candidate that exists, none that nobody has seen keep a NaN, and its key is today's."""
    table = dispatch.shipped_table("sm_90")
    assert len(table) > 400
    for key, measurement in table.items():
        operation = dispatch.OPERATIONS[key.partition(":")[0]]
        assert measurement.candidate in operation.candidates
        assert measurement.candidate in measurement.milliseconds
        assert "cudnn" not in measurement.candidate
        assert "cublas" not in measurement.candidate
    settings = dispatch.Flags(False, False, "ieee")
    with torch.device("meta"):
        for variant in ("paper", "torchvision"):
            model = fastalex.AlexNet(variant=variant).half()
            for batch, layout in ((128, torch.channels_last), (1, torch.contiguous_format)):
                images = torch.empty(batch, 3, 224, 224, dtype=torch.float16).contiguous(memory_format=layout)
                for name, args in operator_calls(model, images):
                    for operation, arguments in dispatched(name, args):
                        if operation.name == "conv2d_relu":
                            assert dispatch.table_key(operation, settings, arguments) in table


# ---- measuring


def test_tuning_checks_before_it_times(monkeypatch):
    ticks = {"library": 3.0, "product": 1.0}

    def seconds(run, args):
        name = next(n for n, c in DOUBLING.candidates.items() if c.run is run)
        return ticks[name]

    monkeypatch.setattr(dispatch, "_seconds", seconds)
    found = dispatch.tune("doubling", torch.ones(3, 5))
    assert found.candidate == "product"
    assert found.milliseconds == {"library": 3000.0, "product": 1000.0}
    assert found.batch == 3
    assert found.refused == {
        "wrong": "differs from the library by 1, the largest value being 2",
        "poisoned": "differs from the library by nan, the largest value being 2",
        "failing": "ValueError: does not compile for this GPU",
        "deaf": "makes a number of NaN",
        "flat": "returns torch.float32 (15,) instead of torch.float32 (3, 5)",
    }
    # a gain within the noise changes nothing
    ticks["product"] = 2.95
    assert dispatch.tune("doubling", torch.ones(3, 5)).candidate == "library"
    assert dispatch.tune("doubling", torch.ones(8, 5)).refused["product"] == "needs at most 4 rows"


def test_tuning_a_model_fills_the_table(monkeypatch):
    """On CPU tensors in the interpreter; the library is said to be slow."""
    library = CONV2D_RELU.candidates["library"].run
    monkeypatch.setattr(dispatch, "_seconds", lambda run, args: 1.5 if run is library else 1.0)
    model = nn.Sequential(fastalex.nn.ConvReLU2d(3, 8, 5, stride=2), fastalex.nn.ConvReLU2d(8, 8, 3))
    model, images = model.to(memory_format=torch.channels_last), torch.randn(2, 3, 11, 11)
    with backend.use("triton"):
        found = dict(tune_model(model, images, training=False, rounds=1))
        operations = [key.partition(":")[0] for key in found]
        assert operations == ["conv2d_relu"] * 4  # two layers, cudnn.benchmark on and off
        assert all("cudnn_convolution_relu" in m.refused for m in found.values())
        assert all(m.candidate != "library" for m in found.values())
        dispatch.forget()
        line = fastalex.choices.explain(model, images).splitlines()[0]
        assert "conv2d_relu by library" not in line
        assert "measured at batch 2" in line


# ---- explaining


@pytest.fixture
def nothing_runs(monkeypatch):
    def run(*args):
        raise AssertionError("a candidate ran")

    for operation in dispatch.OPERATIONS.values():
        for name, candidate in operation.candidates.items():
            monkeypatch.setitem(operation.candidates, name, Candidate(name, run, candidate.unsupported))


def test_explain_says_what_a_model_takes_without_running_it(nothing_runs):
    model = fastalex.AlexNet(10)
    images = torch.empty(2, 3, 224, 224)
    assert "conv2d_relu: fastalex.cpu, for CPU tensors" in fastalex.choices.explain(model, images)
    with backend.use("triton"):
        lines = fastalex.choices.explain(model, images).splitlines()
        assert [line.split(" (")[0] for line in lines] == [
            line
            for i, name in enumerate(["conv2d_relu_pool"] * 2 + ["conv2d_relu"] * 2 + ["conv2d_relu_pool"])
            for line in (
                f"{name}: conv2d_relu by {'library' if i else 'space_to_depth_library'}",
                f"{name}: conv2d_weight_grad by {'library' if i else 'space_to_depth_library'}",
                f"{name}: conv2d_input_grad by library",
            )
        ] + ["linear_relu_dropout: Triton kernel"] * 2
        assert "not measured here: conv2d_relu: 384x13x13 -> 384, kernel 3x3" in lines[9]
        model.eval()
        assert (
            fastalex.choices.explain(model, images)
            .splitlines()[-1]
            .startswith("linear_relu_dropout: linear_relu by library (shipped default;")
        )
        with dispatch.force("conv2d_relu", "triton_descriptors"):
            first = fastalex.choices.explain(F.conv2d_relu, images, model.features[0].weight, stride=4).splitlines()[0]
        assert "no forced candidate can run: triton_descriptors: " in first
    with backend.use("reference"):
        assert fastalex.choices.explain(model, images) == "no operator of fastalex runs (backend reference)"


def test_explain_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    with backend.use("triton"):
        text = fastalex.choices.explain(Convolution(), torch.empty(1, 8, 5, 5), torch.empty(8, 8, 3, 3))
    assert text == "conv2d_relu: cannot run: the triton package is not installed"


def test_operators_are_found_in_order():
    model = fastalex.AlexNet(10, variant="caffenet")
    names = [name for name, _ in operator_calls(model, torch.empty(1, 3, 227, 227))]
    assert names == [
        "conv2d_relu_pool", "local_response_norm", "conv2d_relu_pool", "local_response_norm",
        "conv2d_relu", "conv2d_relu", "conv2d_relu_pool", "linear_relu_dropout", "linear_relu_dropout",
    ]  # fmt: skip


# ---- the command


def test_the_command_needs_a_gpu():
    pytest.importorskip("tyro")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-m", "fastalex", "tune"], capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert run.stderr == "fastalex: error: tune times kernels on a GPU, and the device here is cpu\n"


def test_algorithms_are_the_kernels():
    forward = pytest.importorskip("fastalex.kernels.convolution.forward")
    assert convolution.ALGORITHMS == forward.ALGORITHMS


def test_forcing_is_undone_after_an_error():
    with contextlib.suppress(KeyError), dispatch.force("doubling", "wrong"):
        raise KeyError
    assert chosen(torch.ones(2, 5)) == "library"


@pytest.mark.parametrize("operation", ["conv2d_relu", "conv2d_input_grad", "conv2d_weight_grad"])
def test_a_sweep_times_configurations_that_a_table_can_name(operation):
    """Of one kernel, ours; each as right as the library, and found again by its name."""
    pytest.importorskip("triton")
    x = torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    geometry = (1, 1), (0, 0), (1, 1), 1
    args = (x, weight, None, *geometry) if operation == "conv2d_relu" else (torch.randn_like(x), x, weight, *geometry)
    with backend.use("triton"):
        found = dispatch.tune(operation, *args, rounds=1, sweep=True)
        swept = {name for name in found.milliseconds if " " in name}
        assert len(swept) > 3
        assert len({name.partition(" ")[0] for name in swept}) == 1
        name = min(swept)
        with dispatch.force(operation, name):
            choice = dispatch.choose(dispatch.find(operation), *args)
        assert choice.candidate.name == name
        torch.testing.assert_close(
            choice.candidate.run(*args), dispatch.find(operation).candidates["library"].run(*args)
        )


@pytest.mark.parametrize("operation", ["conv2d_relu", "conv2d_weight_grad"])
def test_candidates_behind_space_to_depth_have_configurations(operation):
    pytest.importorskip("triton")
    x = torch.randn(2, 4, 7, 7).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    geometry = (2, 2), (1, 1), (1, 1), 1
    grad = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    args = (x, weight, None, *geometry) if operation == "conv2d_relu" else (grad, x, weight, *geometry)
    found = dispatch.find(operation)
    base = found.named("space_to_depth_spatial" if operation == "conv2d_relu" else "space_to_depth_triton")
    with backend.use("triton"):
        assert base.unsupported(*args) is None
        configured = found.named(f"{base.name} {base.configurations(*args)[0]}")
        expected = found.candidates["library"].run(*args)
        torch.testing.assert_close(configured.run(*args), expected, rtol=2**-8, atol=2**-5)  # tf32's


def test_configurations_are_read_as_they_are_written():
    config = pytest.importorskip("fastalex.kernels.convolution.config")
    for written in (
        config.Config(128, (64, 32), (32, 16), 4, 3),
        config.Config(64, (64, 0), (16, 0), 8, 2, True, 5),
    ):
        assert config.Config.parse(str(written)) == written
    assert str(written) == "64x64x16 w8 s2 ws k5"
    with pytest.raises(ValueError, match="got '128 x 64'"):
        config.Config.parse("128 x 64")
    conv = dispatch.find("conv2d_relu")
    assert conv.named("triton_spatial 64x64x32 w4 s3").name == "triton_spatial 64x64x32 w4 s3"
    for unknown in ("triton_spatial fast", "library 64x64x32 w4 s3", "fft"):
        assert conv.named(unknown) is None
