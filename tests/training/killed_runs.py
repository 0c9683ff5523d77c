"""Kills a training run at many points and lets it go on: `python killed_runs.py FOLDER`.

One process that has imported everything forks a child for each attempt.  Leaves FOLDER/whole, a run that nobody
disturbed, and FOLDER/killed, and prints how each child ended.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from small_runs import run

from fastalex import checkpoint, files
from fastalex.checkpoint import STATE
from fastalex.training.progress import Callback


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(Callback):
    def __init__(self, step):
        self.left = step

    def batch_done(self, images):
        self.left -= 1
        if self.left == 0:
            die()


def die_half_way(call):
    """In the middle of the given write of state.pt."""
    write, left = checkpoint.write_buffer, [call]

    def half(path, content):
        left[0] -= 1
        if left[0] == 0:
            path.write_bytes(content.getvalue()[: content.tell() // 2])
            die()
        write(path, content)

    checkpoint.write_buffer = half


def die_around(name, call, after):
    """Before or after the given call of a function that puts files in their place."""
    function, left = getattr(os, name), [call]

    def wrapped(*arguments):
        left[0] -= 1
        if left[0] == 0 and not after:
            die()
        result = function(*arguments)
        if left[0] == 0:
            die()
        return result

    setattr(files.os, name, wrapped)


def attempt(folder, before=lambda: None, callback=None, kill_after=None):
    """The exit status of a child that trains, from the saved state if there is one."""
    child = os.fork()
    if child == 0:
        try:
            before()
            run(folder, resume=(folder / STATE).exists(), save_steps=1, callback=callback)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root):
    torch.set_num_threads(1)
    started = time.perf_counter()
    endings = [attempt(root / "whole")]
    duration = time.perf_counter() - started
    folder, choose = root / "killed", random.Random(0)
    endings += [
        attempt(folder, callback=DieAt(1)),  # before anything is saved
        attempt(folder, callback=DieAt(2)),
        attempt(folder, lambda: die_half_way(2)),
        attempt(folder, lambda: die_around("replace", 3, after=False)),
        attempt(folder, lambda: die_around("replace", 3, after=True)),
        attempt(folder, lambda: die_around("fsync", 4, after=True)),
        attempt(folder, lambda: die_around("link", 2, after=True)),
    ]
    endings += [attempt(folder, kill_after=duration * choose.uniform(0.02, 0.3)) for _ in range(4)]
    endings.append(attempt(folder))
    print(*endings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
