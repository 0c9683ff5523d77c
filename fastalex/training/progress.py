"""What a run tells while it goes on: a line of metrics.jsonl after each epoch, curves, and calls for a progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastalex.files import write_whole

METRICS = "metrics.jsonl"

Epoch = dict[str, Any]
"""One line of metrics.jsonl: epoch, train_loss, test_loss, top1, top5, fc6_alive, fc7_alive, logit_spread (see
`fastalex.training.health`), lr (of the epoch's last step), seconds, images_per_second, data_wait (the share of those
seconds that the loop waited for images), peak_memory_bytes (of the GPU's allocator, or of the process)."""


class Callback:
    """Told what happens during training; this one keeps silent."""

    def loading(self, done: int, total: int) -> None:
        """Bytes of pictures that are to stay in memory, before the first epoch."""

    def epoch_begins(self, epoch: int, images_done: int) -> None: ...

    def batch_done(self, images: int) -> None: ...

    def epoch_ends(self, metrics: Epoch) -> None: ...


class MetricsLog:
    """metrics.jsonl in `folder`, and with `tensorboard` the lines to come as curves beside it.

    history: the lines, whose list grows by one before each `write`.
    Raises ValueError where TensorBoard is asked for and missing.
    """

    def __init__(self, folder: Path, history: list[Epoch], *, tensorboard: bool) -> None:
        self._path, self._history = folder / METRICS, history
        self._write_lines()
        self._curves = open_tensorboard(folder, len(history) + 1) if tensorboard else None

    def write(self) -> None:
        self._write_lines()
        if self._curves is not None:
            line = self._history[-1]
            for name, value in line.items():
                self._curves.add_scalar(name, value, line["epoch"])
            self._curves.flush()

    def _write_lines(self) -> None:
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self._history))


def open_tensorboard(folder: Path, first_epoch: int) -> Any:
    """A writer that forgets the epochs from this one on.  Raises ValueError without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ValueError("this needs TensorBoard: pip install 'fastalex[tensorboard]'") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use at once so far: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
