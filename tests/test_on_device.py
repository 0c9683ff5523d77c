"""--device: copies between borders, and what a broken context costs.  Here the device is the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

KERNELS = """
import pytest, torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

@triton.jit
def fill_kernel(x_ptr, first, stop, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.full((BLOCK,), 1.0, tl.float32), mask=at < stop)

@triton.jit
def copy_kernel(source, y_ptr, N: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, N), tl.reshape(source.load([0, 0]), (N,)))

@triton.jit
def sum_kernel(x_ptr, y_ptr, first, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + first + tl.arange(0, BLOCK)).to(tl.float32), 0))
"""
INSIDE = """
def test_results_come_back_and_memory_stays_shared():
    x = torch.zeros(16)
    left, right = x[:8], x[8:]
    fill_kernel[(1,)](right, 0, 5, BLOCK=8)
    assert x.tolist() == [0] * 8 + [1] * 5 + [0] * 3
    # outside of this view, inside its memory
    fill_kernel[(1,)](right, -8, -6, BLOCK=8)
    assert x.tolist() == [1] * 2 + [0] * 6 + [1] * 5 + [0] * 3
    fill_kernel[(1,)](x_ptr=left[2:], first=0, stop=8, BLOCK=2)
    assert x.sum() == 9

def test_descriptors():
    x, y = torch.arange(32.0), torch.empty(16)
    copy_kernel[(1,)](TensorDescriptor.from_tensor(x[16:].view(4, 4), [4, 4]), y, N=16)
    assert torch.equal(y, x[16:])

def test_nothing():
    fill_kernel[(1,)](torch.empty(0), 0, 0, BLOCK=8)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_read_outside_shows(dtype):
    y = torch.zeros(1)
    sum_kernel[(1,)](torch.ones(8, dtype=dtype), y, 1, BLOCK=8)
    assert not y.abs() < 1e30
"""
OUTSIDE = """
@pytest.mark.parametrize(("first", "stop"), [(0, 33), (-2, 8)], ids=["end", "start"])
def test_outside(first, stop):
    fill_kernel[(1,)](torch.zeros(32), first, stop, BLOCK=64)

def test_descriptor_written_around():
    x = torch.zeros(16)
    copy_kernel[(1,)](TensorDescriptor.from_tensor(x.view(4, 4), [4, 4]), x[4:], N=16)
"""
BREAKS = """
def test_before():
    fill_kernel[(1,)](torch.zeros(8), 0, 8, BLOCK=8)

def test_breaks(monkeypatch):
    def failing(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nand advice")
    monkeypatch.setattr("on_device.synchronize", failing)
    fill_kernel[(1,)](torch.zeros(8), 0, 8, BLOCK=8)

def test_dies():
    import os
    assert os.environ.get("PYTEST_XDIST_WORKER")
    os._exit(3)

def test_after():
    fill_kernel[(1,)](torch.zeros(8), 0, 8, BLOCK=8)
"""
OTHER = """
def test_other_file():
    fill_kernel[(1,)](torch.zeros(8), 0, 8, BLOCK=8)
"""
REASON = "fill_kernel broke the context of the GPU in test_breaks.py::test_breaks: CUDA error: an illegal memory access"


@pytest.fixture
def run(tmp_path):
    """Run tests of their own in a process of its own; returns it."""

    def run(*options, **files):
        for name, text in files.items():
            (tmp_path / f"test_{name}.py").write_text(KERNELS + text)
        here = str(Path(__file__).parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
        # of the process that runs this test
        for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID", "PYTEST_XDIST_WORKER_COUNT"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "pytest", "-p", "on_device", "-p", "no:cacheprovider", "-ra", *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run


def test_a_store_outside_of_a_tensor_fails_by_name(run):
    done = run("--device", "cpu", inside=INSIDE, outside=OUTSIDE)
    text = done.stdout
    assert "6 passed" in text, text
    assert "3 failed" in text
    assert "fill_kernel wrote 4 bytes behind the end of a tensor of 128 bytes, 1 from it" in text
    assert "fill_kernel wrote 8 bytes before the start of a tensor of 128 bytes, 1 from it" in text
    assert "copy_kernel wrote 16 bytes behind the end of a tensor of 64 bytes" in text
    assert "launches on cpu: copy_kernel 1, fill_kernel 4, sum_kernel 3" in text
    assert "Triton's interpreter, tensors between borders" in text


@pytest.mark.slow
def test_a_broken_context_costs_one_test(run):
    """Whatever --dist says: in 3.8, loadfile would give the test to the next process, too."""
    pytest.importorskip("xdist")
    done = run("--device", "cpu", "-n", "1", "--dist", "loadfile", breaks=BREAKS, other=OTHER)
    text = done.stdout
    assert REASON in text, text + done.stderr
    assert "crashed while running 'test_breaks.py::test_dies'" in text
    assert "2 failed, 3 passed" in text


def test_a_broken_context_ends_the_only_process(run):
    done = run("--device", "cpu", breaks=BREAKS, other=OTHER)
    assert done.returncode == 77
    assert REASON in done.stdout
    assert "1 passed" in done.stdout
    assert "and advice" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_device(run):
    done = run("--device", "cuda", inside=INSIDE)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: --device cuda: PyTorch finds no GPU here"
