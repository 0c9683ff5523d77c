"""Stages that go wrong in every way, run as `fastalex.check.stages` runs its own."""

import os
import sys
import time
from functools import partial
from pathlib import Path

from fastalex.check.runner import Context, Log, Stage, end, run_stage


def good(number):
    return {"ok": True, "number": number}


def lies():
    return {"ok": False, "error": 1.0}


def raises():
    raise ValueError("the argument is\nwrong")


def nan():
    return {"ok": True, "error": float("nan")}


ITEMS = {
    "good/1": partial(good, 1),
    "good/crashes": lambda: os.kill(os.getpid(), 9),
    "good/2": partial(good, 2),
    "other/hangs": lambda: time.sleep(60),
    "other/raises": raises,
    "other/lies": lies,
    "other/nan": nan,
}
STAGES = (
    Stage("bad", lambda context: ITEMS, seconds=1.5, processes=2),
    Stage("times", lambda context: {"clock": lambda: {"timed": context.timed}}, times=True, needed=0.1),
)


def main():
    log, name, phase, process, processes, device = sys.argv[1:]
    stage = next(stage for stage in STAGES if stage.name == name)
    run_stage(stage, Log(Path(log)), Context(device, phase == "times"), phase, int(process), int(processes))
    end()


if __name__ == "__main__":
    main()
