"""The command `fastalex check`.  Parses with argparse: it must run where the command line's extras are missing."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastalex.check import runner
from fastalex.check.machine import identity
from fastalex.check.prepare import entries, prepare
from fastalex.check.report import report, wrong
from fastalex.check.runner import Log
from fastalex.check.stages import LOG, STAGES
from fastalex.inspection.compiler import TARGETS

DESCRIPTION = """Does fastalex work on this machine, and what is gained?  Compiles every kernel, compares it with
float64, then times it, whole models and all candidates of their convolutions against PyTorch.  Each stage has a process
of its own; what is done is in check.jsonl, line by line, and a second call goes on from there.  check.md holds
the tables.  Exit code 1 if anything is wrong."""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="fastalex check", description=DESCRIPTION)
    out.add_argument("--device", choices=("cuda", "cpu"), help="by default a GPU if there is one")
    out.add_argument("--minutes", type=float, default=5.0, help="when to end, finished or not (default 5)")
    out.add_argument(
        "--out", type=Path, metavar="FOLDER", default=Path("runs/check"), help="folder for results (default runs/check)"
    )
    out.add_argument("--stage", action="append", choices=[stage.name for stage in STAGES], help="only this; repeatable")
    out.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="Triton's cache: what --prepare left, or an empty folder"
    )
    out.add_argument("--prepare", type=Path, metavar="FOLDER", help="only compile into this cache, without a GPU")
    out.add_argument("--target", default="sm_90", choices=TARGETS, help="of --prepare (default sm_90)")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if something is wrong, 2 for arguments that make no sense."""
    options = parser().parse_args(arguments)
    if options.prepare is not None:
        return prepare(options.prepare, options.target, entries())
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("fastalex: error: --device cuda: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    if not options.minutes > 0:
        print(f"fastalex: error: --minutes must be above 0, got {options.minutes}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    who = identity(device)
    log = opened(options.out, who)
    os.environ[LOG] = str(log.path.resolve())
    if options.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    stages = [stage for stage in STAGES if options.stage is None or stage.name in options.stage]
    command = [sys.executable, "-m", "fastalex.check.stages"]
    run(stages, log, device, options.minutes, command)
    lines = log.read()
    text = report(lines, who)
    (options.out / "check.md").write_text(text)
    print(text, end="")
    return 1 if wrong(lines) else 0


def run(stages: Sequence[runner.Stage], log: Log, device: str, minutes: float, command: Sequence[str]) -> None:
    runner.run(stages, log, device=device, minutes=minutes, command=command, say=lambda line: print(line, flush=True))


def opened(folder: Path, who: runner.Row) -> Log:
    """The log to go on with; one of another machine or version makes room."""
    log = Log(folder / "check.jsonl")
    before = next((line["identity"] for line in log.read() if "identity" in line), None)
    if before is not None and before != who:
        number = next(i for i in range(1, 10**6) if not (folder / f"check-{i}.jsonl").exists())
        log.path.rename(folder / f"check-{number}.jsonl")
        print(f"{log.path} was of another machine or version and is now check-{number}.jsonl")
        log, before = Log(folder / "check.jsonl"), None
    if before is None:
        log.put(identity=who)
    return log
