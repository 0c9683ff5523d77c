"""Stages in processes: what crashes, hangs or lies costs itself alone and is known by name."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bad_stages
import pytest
import torch

from fastalex.check import runner
from fastalex.check.report import report, wrong
from fastalex.check.runner import Context, Log, Stage, run, run_stage, share


def run_all(path, minutes=1.0):
    said = []
    command = [sys.executable, bad_stages.__file__, str(path)]
    run(bad_stages.STAGES, Log(path), device="cpu", minutes=minutes, command=command, say=said.append)
    return said


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "check.jsonl"
    # a process of its own: this one's paths are pytest's
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    begin = time.monotonic()
    said = run_all(path)
    return path, said, time.monotonic() - begin


def test_what_goes_wrong_is_blamed_and_the_rest_goes_on(finished):
    path, _, seconds = finished
    ended = Log(path).ended("values", "bad")
    assert set(ended) == set(bad_stages.ITEMS)
    assert {name for name, row in ended.items() if row["state"] == "failed"} == {
        "good/crashes", "other/hangs", "other/raises",
    }  # fmt: skip
    assert ended["good/crashes"]["error"] == "its process ended with code -9"
    assert ended["other/hangs"]["error"] == "took longer than 2 s"
    assert ended["other/raises"]["error"] == "ValueError: the argument is wrong"
    assert ended["good/2"]["number"] == 2
    assert ended["other/nan"]["error"] == "nan"
    assert seconds < 50


def test_the_report_tells_what_is_wrong(finished):
    lines = Log(finished[0]).read()
    assert {row["item"] for row in wrong(lines)} == {"good/crashes", "other/hangs", "other/raises", "other/lies"}
    text = report(lines, {"device": "none"})
    assert "## Wrong: 4" in text
    assert "- bad: other/raises: ValueError: the argument is wrong" in text
    assert "| bad | 7 | 4 |" in text


def test_times_come_last_and_alone(finished):
    path, said, _ = finished
    lines = Log(path).read()
    assert Log(path).ended("times", "times")["clock"]["timed"] is True
    assert lines[-1]["stage"] == "times"
    assert said[-1].startswith("times: timing")


def test_a_second_run_goes_on_behind_the_first(finished):
    path = finished[0]
    before = len(Log(path).read())
    run_all(path)
    assert len(Log(path).read()) == before

    # a process was killed in the middle of a line and of an item
    part = path.with_name("part.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"good/2"' not in line]
    part.write_text("".join(kept) + '{"phase": "values", "stage": "bad", "item": "good/2", "sta')
    assert "good/2" not in Log(part).ended("values", "bad")


def test_no_time_left(tmp_path):
    path = tmp_path / "check.jsonl"
    said = run_all(path, minutes=1e-4)
    assert "times: left out, 0 s were left and it needs 0 s" in said
    assert not Log(path).ended("times", "times")


def test_shares():
    names = ["a/1", "a/2", "b/1", "c", "d/1"]
    shares = [share(names, i, 3) for i in range(3)]
    assert shares == [["a/1", "a/2", "d/1"], ["b/1"], ["c"]]


def test_lines_of_several_writers_stay_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    code = (
        "import sys; from pathlib import Path; from fastalex.check.runner import Log\n"
        "for i in range(300): Log(Path(sys.argv[1])).put(writer=sys.argv[2], text='x' * 2000, i=i)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)], env=environment) for n in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for writer in "01":
        assert [row["i"] for row in rows if row["writer"] == writer] == list(range(300))


class Broken(Exception):
    """os._exit for a test."""


def test_a_broken_device_ends_the_process_with_its_name(tmp_path, monkeypatch):
    def illegal():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(code):
        raise Broken(code)

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(runner.os, "_exit", leave)
    monkeypatch.setattr(runner.timing, "side_stream", contextlib.nullcontext)
    stage = Stage("broken", lambda context: {"illegal": illegal, "innocent": dict})
    log = Log(tmp_path / "log.jsonl")
    with pytest.raises(Broken, match=str(runner.BROKEN)):
        run_stage(stage, log, Context("cuda"), "values")
    ended = log.ended("values", "broken")
    assert set(ended) == {"illegal"}
    assert "illegal memory access" in ended["illegal"]["error"]


def test_another_machine_or_version_begins_a_new_file(tmp_path, capsys):
    from fastalex.check.command import opened

    opened(tmp_path, {"device": "one"}).put(phase="values", stage="s", item="i", state="done")
    assert len(opened(tmp_path, {"device": "one"}).read()) == 2
    assert [line["identity"] for line in opened(tmp_path, {"device": "two"}).read()] == [{"device": "two"}]
    assert "is now check-1.jsonl" in capsys.readouterr().out
    assert len(Log(tmp_path / "check-1.jsonl").read()) == 2
    assert Path(tmp_path / "check.jsonl").exists()
