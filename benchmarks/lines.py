"""One JSON line per provider, written when it has finished: a run that is cut short leaves what it has measured.

A line says everything about itself, so files can be joined.  `fastalex.results.load` reads them.
"""

from __future__ import annotations

import datetime
import json
import statistics
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Lines:
    """The file of a run.  machine: what a result depends on besides its test: GPU, versions, sources."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.machine = json.loads(json.dumps(machine))
        self.done: dict[str, Line] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found = json.loads(line)
            except ValueError:  # cut off while it was written
                continue
            if found.get("machine_info") == self.machine and "stats" in found:
                self.done[found["name"]] = found

    def add(self, name: str, group: str, **content: Any) -> None:
        """Write the line of a test, with what it found or why it found nothing."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        line = {"name": name, "group": group, "datetime": now, **content, "machine_info": self.machine}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def stats(seconds: list[float]) -> dict[str, Any]:
    """The numbers of pytest-benchmark's that `fastalex.results` keeps."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(seconds)}
