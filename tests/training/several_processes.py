"""Training in several processes: `python several_processes.py FOLDER SIZE`, forked from one that has imported all.

Leaves FOLDER/one, a run of one process that accumulates SIZE micro-batches, and runs of SIZE processes that must end in
the same way: FOLDER/many, FOLDER/stopped (stopped by SIGTERM, resumed by SIZE) and FOLDER/fewer (resumed by one).
The same of a set in shares: FOLDER/shares-one, which cuts it as SIZE processes do, and FOLDER/shares of these.
The same without dropout: FOLDER/plain of one process, and of several in the hybrid form FOLDER/hybrid,
FOLDER/hybrid-fewer (resumed by one) and FOLDER/hybrid-more (stopped in the data-parallel form).
"""

import os
import signal
import socket
import sys
from pathlib import Path

import torch
from small_runs import BATCH_NORM, Pictures, changed, run

from fastalex import distributed
from fastalex.data.resident import Held, Resident
from fastalex.training.progress import Callback
from fastalex.training.stopping import Stopped

CPU = torch.device("cpu")


class Terminated(Callback):
    """SIGTERM reaches the processes at different times."""

    def __init__(self, rank):
        self.left = 2 + rank

    def batch_done(self, images):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder, **options):
    # 61 pictures: the last batch of an epoch has one, and leaves the other processes' shares empty
    data = options.pop("data", None) or Pictures(61)
    return run(folder, changed(**options.pop("recipe", {})), data=data, wide=True, **options)


def in_shares(number, of=None):
    """The pictures cut into so many shares, of which one is held, or all; nothing lies at the slots of the others."""
    source, held = Pictures(61), {}
    for split, (images, labels) in source.sets.items():
        parts = torch.arange(len(images)).tensor_split(number)
        here = range(len(images)) if of is None else range(int(parts[of][0]), int(parts[of][-1]) + 1)
        slots = torch.full((len(images),), -1)
        slots[here.start : here.stop] = torch.arange(len(here))
        own = images[here.start : here.stop].contiguous(memory_format=torch.channels_last)
        held[split] = Held(own, labels[here.start : here.stop], slots, here)
    return Resident(source, held, number)


def train_with_batch_norm(folder):
    """Whatever each process saw of the last batch, all have rank 0's running statistics in the end."""
    model, _ = run(folder, changed(variant=BATCH_NORM, epochs=1), data=Pictures(60), wide=True)
    for name, buffer in model.named_buffers():
        whole = distributed.sum_over_processes(buffer.double().clone())
        assert torch.allclose(whole, distributed.size() * buffer.double(), rtol=1e-12), name


def processes(size, work):
    """Runs work(rank) in so many processes, and returns what they exit with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK=str(rank))
                with distributed.process_group(CPU):
                    work(rank)
                code = 0
            except Stopped:
                code = 3
            except ValueError as error:
                print(error, file=sys.stderr, flush=True)
                code = 2
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(root, size):
    torch.set_num_threads(1)
    train(root / "one", accumulate=size)
    print(*processes(size, lambda rank: train(root / "many")))
    print(*processes(size, lambda rank: train(root / "stopped", callback=Terminated(rank))))
    print(*processes(size, lambda rank: train(root / "stopped", resume=True)))
    print(*processes(size, lambda rank: train(root / "fewer", callback=Terminated(rank))))
    train(root / "fewer", accumulate=size, resume=True)
    # what rank 0 finds wrong with a state ends all of them
    print(*processes(size, lambda rank: train(root / "fewer", resume=True, recipe={"lr": 9.0})))
    train(root / "shares-one", accumulate=size, data=in_shares(size))
    print(*processes(size, lambda rank: train(root / "shares", data=in_shares(size, rank))))
    # each process draws the dropout of its share of a layer, which no other division of the work repeats
    exact = {"recipe": {"dropout": 0.0}}
    train(root / "plain", accumulate=size, **exact)
    hybrid = {"parallel": "hybrid", **exact}
    print(*processes(size, lambda rank: train(root / "hybrid", **hybrid)))
    print(*processes(size, lambda rank: train(root / "hybrid-fewer", callback=Terminated(rank), **hybrid)))
    train(root / "hybrid-fewer", accumulate=size, resume=True, **exact)
    print(*processes(size, lambda rank: train(root / "hybrid-more", callback=Terminated(rank), **exact)))
    print(*processes(size, lambda rank: train(root / "hybrid-more", resume=True, **hybrid)))
    print(*processes(size, lambda rank: train_with_batch_norm(root / "normalised")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
