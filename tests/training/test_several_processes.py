"""Several processes compute what one computes that accumulates as many micro-batches, and take over from each other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import without_timings

from fastalex.checkpoint import MODEL, STATE
from fastalex.training.progress import METRICS

load_file = pytest.importorskip("safetensors.torch").load_file
pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_gloo_available(), reason="forks processes that talk over Gloo"
)

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(ROOT)]), "OMP_NUM_THREADS": "1"}
# In float64.  A gradient is a sum of at most 20 pictures * 256 places; its rounding errors, and those of 12 steps of
# at most lr = 0.05 each, stay below 12 * 0.05 * 5120 * 2**-53 = 3e-13 of its terms' magnitude, which is below 10.
# One picture too many or too few in a batch changes weights by 1e-4.
TOLERANCE = 1e-11


def check(folder, size):
    done = subprocess.run(
        [sys.executable, HERE / "several_processes.py", folder, str(size)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # 3: stopped by the signal, after saving at the end of the first epoch, where all of them agreed
    codes = (0, 3, 0, 3) + (2, 0) + (0, 3, 3, 0) + (0,)
    assert done.stdout.split() == [str(code) for code in codes for _ in range(size)], done.stderr
    assert done.stderr.count("another recipe: lr was 0.05, not 9.0") == size
    same_end(folder, "one", "many", "stopped", "fewer")
    same_end(folder, "shares-one", "shares")
    same_end(folder, "plain", "hybrid", "hybrid-fewer", "hybrid-more")


def same_end(folder, first, *others):
    one = load_file(folder / first / MODEL)
    for name in others:
        other = load_file(folder / name / MODEL)
        assert one.keys() == other.keys()
        for key, weights in one.items():
            assert weights.dtype == torch.float64
            torch.testing.assert_close(other[key], weights, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        pair = [
            without_timings([json.loads(line) for line in (folder / n / METRICS).read_text().splitlines()])
            for n in (first, name)
        ]
        for expected, found in zip(*pair, strict=True):
            assert found == pytest.approx(expected, rel=1e-6)  # losses are added up in fp32


def test_two_processes(tmp_path):
    check(tmp_path, 2)


@pytest.mark.slow
def test_four_processes(tmp_path):
    check(tmp_path, 4)


@pytest.mark.slow
def test_torchrun_starts_again_after_a_crash(tmp_path):
    """A worker is killed; torchrun starts both again, and they go on from the state that was saved."""
    pytest.importorskip("tyro")
    recipe = ["--epochs", "1", "--batch-size", "50", "--device", "cpu", "--save-steps", "5", "--deterministic"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "-m", "fastalex", "train", *recipe, "--out", tmp_path / "killed"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / STATE).exists():
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    done = subprocess.run(
        [*torchrun, "-m", "fastalex", "train", *recipe, "--out", tmp_path / "whole"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    whole, killed = (load_file(tmp_path / name / MODEL) for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def children(pid):
    """The processes that this one started, as Linux knows them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return sorted(found)
