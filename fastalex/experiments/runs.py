"""Many short training runs: in parallel, kept as they finish, and summed up with confidence intervals."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastalex.files import write_whole

Result = dict[str, Any]

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.96


class Interval(NamedTuple):
    """A mean, and how far the ends of its 95 % confidence interval lie from it (infinitely far for one value)."""

    mean: float
    half_width: float

    def covers(self, value: float) -> bool:
        return abs(self.mean - value) <= self.half_width


def interval(values: Sequence[float]) -> Interval:
    """Student's interval for the mean of independent values.  Raises ValueError for none."""
    count = len(values)
    if count == 0:
        raise ValueError("values must hold at least one number")
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, math.inf)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    factor = STUDENT[count - 2] if count - 2 < len(STUDENT) else NORMAL
    return Interval(mean, factor * deviation / math.sqrt(count))


class Store:
    """The finished runs of an experiment, in one JSON file that is replaced whole after each of them.

    `settings` is everything that a result depends on: results of other settings are not used again, and raise
    ValueError unless `overwrite` drops them.
    """

    def __init__(self, path: Path, settings: Result, *, overwrite: bool = False) -> None:
        self.path, self.settings = path, settings
        self.runs: dict[str, Result] = {}
        if overwrite or not path.is_file():
            return
        try:
            content = json.loads(path.read_text())
            found, runs = content["settings"], dict(content["runs"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of results; --overwrite replaces it ({error!r})") from None
        if found != json.loads(json.dumps(settings)):
            changed = [name for name in settings if found.get(name) != json.loads(json.dumps(settings[name]))]
            raise ValueError(
                f"{path} holds results of other settings ({', '.join(changed)}): choose another folder with --out, "
                f"or --overwrite"
            )
        self.runs = runs

    def add(self, key: str, result: Result) -> None:
        self.runs[key] = result
        self.write()

    def write(self, **summary: Any) -> None:
        """Write the file, with what follows from the runs."""
        write_whole(
            self.path, json.dumps({"settings": self.settings, **summary, "runs": self.runs}, indent=1, sort_keys=True)
        )

    def complete(
        self,
        keys: Iterable[str],
        run: Callable[..., Result],
        arguments: Callable[[str], tuple[Any, ...]],
        *,
        device: torch.device | str = "cpu",
        finished: Callable[[str], None] = lambda key: None,
    ) -> None:
        """Do the runs that are missing: `run(*arguments(key))` for each key, and keep their results.

        On a CPU one process a core, each with one thread: for networks this small faster than threads, and a result
        does not depend on the number of cores.  On another device one after the other.
        """
        missing = [key for key in keys if key not in self.runs]
        if not missing:
            return
        if torch.device(device).type != "cpu":
            for key in missing:
                self.add(key, run(*arguments(key)))
                finished(key)
            return
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        with ProcessPoolExecutor(min(cores(), len(missing)), context, initializer=start_worker) as pool:
            jobs = {pool.submit(run, *arguments(key)): key for key in missing}
            try:
                for job in as_completed(jobs):
                    self.add(jobs[job], job.result())
                    finished(jobs[job])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
                raise


def cores() -> int:
    """The number that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker() -> None:
    """One thread; Ctrl-C is the parent's business; and no life after the parent, whose death by a signal a waiting
    worker would not notice."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
