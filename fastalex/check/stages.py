"""The stages of `fastalex check` in their order; as a program, one process of one stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fastalex.check import convolutions, kernels, machine, models
from fastalex.check.prepare import compilations
from fastalex.check.runner import Context, Item, Log, Stage, end, iterate_rows, run_stage
from fastalex.inspection import interpreter

LOG = "FASTALEX_CHECK_LOG"


def tuned_times(context: Context) -> Mapping[str, Item]:
    """The models again, with what the convolutions' times say is to be taken."""
    if context.small:
        return {}
    rows = list(iterate_rows(Log(Path(os.environ[LOG])).read(), "times", "candidates"))
    return models.times(context, [row for row in rows if row["state"] == "done"])


STAGES = (
    Stage("machine", machine.times, times=True, warm=False, needed=10),
    *(
        Stage(operation, partial(kernels.values, operation), seconds=150, processes=6)
        for operation in ("lrn_max_pool", "lrn", "max_pool")
    ),
    Stage("elementwise", kernels.small_kernels, processes=2, interpreted=True),
    Stage("models", models.values, seconds=120, processes=4),
    Stage("convolutions", convolutions.values, processes=8, interpreted=True),
    Stage("bandwidth", kernels.bandwidth, times=True, processes=4, seconds=150, needed=25),
    Stage("speed", models.times, times=True, processes=4, seconds=120, needed=40),
    Stage("candidates", convolutions.times, times=True, processes=6, needed=60),
    Stage("speed-tuned", tuned_times, times=True, warm=False, needed=10),
    Stage("compile", models.compiled_times, times=True, warm=False, seconds=150, needed=80),
)


def main() -> None:
    name, phase, process, processes, device = sys.argv[1:6]
    if device == "cpu":
        interpreter.mend()
    log = Log(Path(os.environ[LOG]))
    stage = next(stage for stage in STAGES if stage.name == name)
    with compilations() as kernels_found:
        run_stage(stage, log, Context(device, timed=phase == "times"), phase, int(process), int(processes))
    log.put(phase=phase, stage=name, process=int(process), state="kernels", item=None, **kernels_found)
    end()


if __name__ == "__main__":
    main()
