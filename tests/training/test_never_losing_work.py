"""Runs that are killed, told to stop, or run into full disks, damaged files and diverging losses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file
from small_runs import Pictures, changed, run, without_timings

from fastalex import AlexNet
from fastalex.checkpoint import MODEL, PREVIOUS_STATE, STATE
from fastalex.training import loop
from fastalex.training.options import Options
from fastalex.training.progress import METRICS, Callback
from fastalex.training.stopping import Stopped

HERE = Path(__file__).parent


class AtStep(Callback):
    """Calls `action` after the given step."""

    def __init__(self, step, action):
        self.left, self.action = step, action

    def batch_done(self, images):
        self.left -= 1
        if self.left == 0:
            self.action()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def same_weights(first, second):
    first, second = load_file(first / MODEL), load_file(second / MODEL)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def metrics(folder):
    return without_timings([json.loads(line) for line in (folder / METRICS).read_text().splitlines()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_many_points(tmp_path):
    """Between steps, half way through a file, before and after renaming, linking and syncing, and anywhere at all."""
    done = subprocess.run(
        [sys.executable, HERE / "killed_runs.py", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])},
    )
    endings = done.stdout.split()
    assert (endings[0], endings[-1]) == ("0", "0"), done.stderr
    # the seven chosen points always hit; of the four at random times a fast machine may finish before the last
    assert endings[1:8] == [str(-signal.SIGKILL)] * 7, done.stderr
    assert set(endings[8:-1]) <= {"0", str(-signal.SIGKILL)}, done.stderr
    same_weights(tmp_path / "whole", tmp_path / "killed")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert {f.name for f in (tmp_path / "killed").iterdir()} == {MODEL, STATE, PREVIOUS_STATE, METRICS}


@pytest.mark.parametrize("step", [1, 6, 8])  # the first, one within an epoch, the last of an epoch
def test_sigterm_saves_and_stops(whole, tmp_path, step):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        run(tmp_path, callback=AtStep(step, terminate))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert torch.load(tmp_path / STATE)["step"] == step
    run(tmp_path, resume=True)
    same_weights(whole, tmp_path)
    assert metrics(whole) == metrics(tmp_path)


def test_sigterm_during_evaluation(whole, tmp_path):
    class Terminating(Pictures):
        def batches(self, split, indices):
            if split == "test":
                terminate()
            return super().batches(split, indices)

    with pytest.raises(Stopped):
        run(tmp_path, data=Terminating())
    state = torch.load(tmp_path / STATE)
    assert (state["step"], state["history"]) == (4, [])
    run(tmp_path, resume=True)
    same_weights(whole, tmp_path)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice():
        # in this thread: two that reach another one before Python looks are one to it
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callback=AtStep(3, twice))
    assert not (tmp_path / STATE).exists()


def test_a_ctrl_c_that_is_ignored_stays_ignored(whole, tmp_path):
    """As under nohup, where a closing terminal must not end the run."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(tmp_path, callback=AtStep(3, lambda: signal.raise_signal(signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    same_weights(whole, tmp_path)


def test_ctrl_c_that_ends_the_reading_processes_too(whole, tmp_path):
    class Reader(Pictures):
        def batches(self, split, indices):
            for i, batch in enumerate(super().batches(split, indices)):
                if split == "train" and i == 2 and not (tmp_path / STATE).exists():
                    os.kill(os.getpid(), signal.SIGINT)
                    raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
                yield batch

    with pytest.raises(Stopped, match="SIGINT"):
        run(tmp_path, data=Reader())
    assert torch.load(tmp_path / STATE)["step"] == 2
    run(tmp_path, data=Reader(), resume=True)
    same_weights(whole, tmp_path)


def test_states_are_saved_every_so_many_steps_and_minutes(tmp_path):
    seen = []
    look = AtStep(0, None)
    look.batch_done = lambda images: seen.append(
        torch.load(tmp_path / STATE)["step"] if (tmp_path / STATE).exists() else 0
    )
    run(tmp_path, changed(epochs=1), save_steps=2, callback=look)
    assert seen == [0, 0, 2, 2]
    seen.clear()
    run(tmp_path, changed(epochs=1), save_minutes=0, callback=look)
    assert seen[1:] == [1, 2, 3]


@pytest.mark.parametrize("step", [2, 4])  # within an epoch, and its last
def test_a_diverging_run_keeps_its_last_good_state(tmp_path, step):
    """Nothing of a step whose weights are already ruined is written over the good files."""
    run(tmp_path, changed(epochs=1))
    good = [(tmp_path / name).read_bytes() for name in (STATE, MODEL)]

    def poison():
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    recipe = changed(epochs=1)
    model = AlexNet(4, recipe.dropout, variant=recipe.variant)
    options = Options(save_steps=2 if step == 2 else None)
    with pytest.raises(FloatingPointError, match=rf"by step {step} of epoch 1: lower .* earlier step"):
        loop.train(model, Pictures(), recipe, tmp_path, options=options, callback=AtStep(step, poison))
    assert [(tmp_path / name).read_bytes() for name in (STATE, MODEL)] == good


def test_a_diverging_run_is_noticed_within_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECK_LOSS_EVERY", 2)
    with pytest.raises(FloatingPointError, match=r"by step [24] of epoch 1: lower the learning rate \(now 1e\+12\)"):
        run(tmp_path, changed(schedule="step", lr=1e12))
    assert not (tmp_path / STATE).exists()


def test_a_full_disk_ends_the_run_and_keeps_the_last_state(whole, tmp_path):
    """The kernel refuses to write more than 10 kB to any file, as a full disk would."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))

    try:
        with pytest.raises(OSError, match=r"cannot write .*state.pt: .*; the old state.pt is untouched"):
            run(tmp_path, save_steps=3, callback=AtStep(5, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.load(tmp_path / STATE)["step"] == 4
    run(tmp_path, resume=True)
    same_weights(whole, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "text"])
def test_a_damaged_state_names_its_predecessor(whole, tmp_path, damage):
    with pytest.raises(Stopped):
        run(tmp_path, save_steps=2, callback=AtStep(6, terminate))
    content = bytearray((tmp_path / STATE).read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    changes = {"truncated": content[:-1000], "one bit": content, "empty": b"", "text": b"not a state"}
    (tmp_path / STATE).write_bytes(changes[damage])
    with pytest.raises(ValueError, match=rf"state.pt cannot be read .*{PREVIOUS_STATE} is the one before it: rename"):
        run(tmp_path, resume=True)
    (tmp_path / PREVIOUS_STATE).rename(tmp_path / STATE)
    run(tmp_path, resume=True)
    same_weights(whole, tmp_path)


def test_resume_refuses_what_it_cannot_continue(whole, tmp_path):
    class Others(Pictures):
        classes = ("w", "x", "y", "z")

    with pytest.raises(ValueError, match=r"another recipe: lr was 0\.05, not 0\.1"):
        run(whole, changed(lr=0.1), resume=True)
    with pytest.raises(ValueError, match="70 pictures, not 60"):
        run(whole, data=Pictures(60), resume=True)
    with pytest.raises(ValueError, match=r"another set of classes: 4 \(a, ...\), not 4 \(w, ...\)"):
        run(whole, data=Others(), resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(tmp_path, resume=True)
    torch.save({"step": 3}, tmp_path / STATE)
    with pytest.raises(ValueError, match="another version of fastalex"):
        run(tmp_path, resume=True)


@pytest.mark.slow
def test_the_papers_recipe_on_the_demo_set_survives_kills(tmp_path):
    """The command line as a user starts it, again and again, on the real pictures that ship with fastalex."""
    pytest.importorskip("tyro")
    root = HERE.parent.parent

    def start(name):
        recipe = ["--recipe", "paper", "--variant", "demo", "--epochs", "2", "--device", "cpu", "--save-steps", "5"]
        command = [sys.executable, "-m", "fastalex", "train", *recipe, "--resume", "--out", tmp_path / name]
        return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(process):
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output

    finish(start("whole"))
    choose = random.Random(1)
    state = tmp_path / "killed" / STATE
    for last in (False, False, False, True):
        process = start("killed")
        before = state.stat().st_mtime_ns if state.exists() else 0
        while not state.exists() or state.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(choose.uniform(0, 1.5))
        if last:
            process.terminate()
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 128 + signal.SIGTERM, output
            assert "stopped by SIGTERM; fastalex train --resume --out" in " ".join(output.split())
        else:
            process.kill()
            process.wait()
    finish(start("killed"))
    same_weights(tmp_path / "whole", tmp_path / "killed")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_spares_the_processes_that_read_pictures(tmp_path, number):
    """As Ctrl-C in a terminal and a scheduler's end of a job reach them."""
    pytest.importorskip("tyro")
    trees = pytest.importorskip("trees")
    trees.folders(tmp_path / "pictures", per_class=60, width=90, height=80)
    arguments = ["--data", tmp_path / "pictures", "--variant", "demo", "--batch-size", "4", "--workers", "2"]
    command = [sys.executable, "-m", "fastalex", "train", *arguments, "--device", "cpu", "--save-steps", "1"]
    process = subprocess.Popen(
        [*command, "--out", tmp_path / "run"],
        cwd=HERE.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "run" / STATE).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)
