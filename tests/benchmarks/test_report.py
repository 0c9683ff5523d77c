"""The reduction of a benchmark's JSON to a result and a table."""

import pytest

from benchmarks.report import MARKERS, README, markdown, reduced, with_table

FULL = {
    "datetime": "2026-01-02T03:04:05",
    "commit_info": {"id": "abc"},
    "benchmarks": [
        {
            "name": "test_lrn_forward[96x55x55]",
            "group": "lrn",
            "extra_info": {
                "ratio": 0.5,
                "ours_ms": 20.0,
                "peer_ms": 10.0,
                "load_average": [0.1, 1.26],
                "processor": "Some CPU",
                "threads": 1,
                "torch": "2.14.1",
            },
        }
    ],
}


def test_table_names_the_machine_and_keeps_losing_rows():
    lines = markdown(reduced(FULL)).splitlines()
    assert lines[0].startswith("Some CPU, 1 thread, torch 2.14.1, 2026-01-02: ")
    assert lines[-1] == "| lrn forward[96x55x55] | 0.50 | 20.0 | 10.0 | 1.3 |"


def test_empty_run_is_no_result():
    with pytest.raises(ValueError, match="holds no benchmark"):
        reduced({**FULL, "benchmarks": []})


def test_the_table_replaces_the_old_one():
    text = f"before\n{MARKERS[0]}old\n{MARKERS[1]}\nafter\n"
    assert with_table(text, "new") == f"before\n{MARKERS[0]}new\n{MARKERS[1]}\nafter\n"
    assert all(README.read_text().count(marker) == 1 for marker in MARKERS)
