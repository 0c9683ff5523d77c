"""Intervals, and the file of results: kept run by run, used again, never mixed with others."""

import json
import math
import statistics

import pytest

from fastalex.experiments.runs import Store, interval

SETTINGS = {"pictures": "some", "rates": (0.1, 0.2)}


def test_interval():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(2.484, abs=1e-3)  # 4.303 / sqrt(3)
    many = [float(i % 7) for i in range(40)]
    assert interval(many).half_width == pytest.approx(1.96 * statistics.stdev(many) / math.sqrt(40))
    assert interval([5.0, 5.0]).half_width == 0
    assert interval([5.0]) == (5.0, math.inf)
    assert interval([1.0, 3.0]).covers(0.0)
    assert not interval([1.0, 1.1]).covers(3.0)
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_runs_are_kept_one_by_one_and_not_done_again(tmp_path):
    done = []

    def run(key):
        if key == "c":
            raise RuntimeError("killed")
        done.append(key)
        return {"value": key}

    file = tmp_path / "new" / "results.json"
    with pytest.raises(RuntimeError, match="killed"):
        Store(file, SETTINGS).complete("abcd", run, lambda key: (key,), device="meta")
    assert done == ["a", "b"]
    assert set(json.loads(file.read_text())["runs"]) == {"a", "b"}

    told = []
    store = Store(file, SETTINGS)
    store.complete("abd", run, lambda key: (key,), device="meta", finished=told.append)
    assert done == ["a", "b", "d"]
    assert told == ["d"]
    assert store.runs["a"] == {"value": "a"}


def test_in_processes(tmp_path):
    store = Store(tmp_path / "results.json", SETTINGS)
    store.complete("ab", dict, lambda key: ([("value", ord(key))],))
    assert store.runs == {"a": {"value": 97}, "b": {"value": 98}}


def test_results_of_other_settings_are_refused(tmp_path):
    file = tmp_path / "results.json"
    Store(file, SETTINGS).add("a", {"value": 1})
    with pytest.raises(ValueError, match=r"other settings \(rates\): choose another folder with --out"):
        Store(file, {**SETTINGS, "rates": (0.1,)})
    assert Store(file, {**SETTINGS, "rates": (0.1,)}, overwrite=True).runs == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 1}'])
def test_another_file_is_not_overwritten(content, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="is not a file of results"):
        Store(file, SETTINGS)
    assert file.read_text() == content
