"""When a run saves its state and when it stops: signals, and how much work may be lost."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch

from fastalex import distributed

# Many processes agree on stopping and saving only this often: asking is a message between all of them, 0.1 ms to
# 1 ms, where a step on a fast GPU takes 5 ms.
AGREE_EVERY = 8


class Stopped(Exception):
    """Training ended early, on a signal; unless the message says otherwise its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stopping:
    """Catches SIGTERM and Ctrl-C, and says after each step what to do.

    signal: the one that this process has caught, None before.
    save_minutes, save_steps: how often to save within an epoch, as in `Options`.
    """

    def __init__(
        self, device: torch.device, *, save_minutes: float, save_steps: int | None, steps_per_epoch: int
    ) -> None:
        self._device = device
        self._save_minutes, self._save_steps, self._steps_per_epoch = save_minutes, save_steps, steps_per_epoch
        self.signal: int | None = None
        self._saved = time.perf_counter()
        self._at_once = False

    @contextlib.contextmanager
    def caught_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C let the step under way finish; a second one of its kind acts as ever.

        What the process was told to ignore when it was started (nohup, `&` in a script) stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread
            yield
            return

        def catch(number: int, frame: object) -> None:
            signal.signal(number, before[number])
            self.signal = number
            if self._at_once:
                raise Stopped(number)

        heeded = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
        before: dict[int, Any] = {n: signal.signal(n, catch) for n in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal may end anywhere, because nothing in it is worth saving.  Raises Stopped.

        With several processes it goes on as any other: they stop together.
        """
        self._at_once = distributed.size() == 1
        try:
            if self._at_once and self.signal is not None:
                raise Stopped(self.signal)
            yield
        finally:
            self._at_once = False

    def stopped(self) -> Stopped:
        """For a run whose processes have agreed to stop, whichever of them caught the signal."""
        return Stopped(self.signal or signal.SIGTERM)

    def agreed(self, step: int) -> Literal["go on", "save", "stop"]:
        """What to do now that so many steps are taken, the same in every process."""
        by_steps = self._save_steps is not None and step % self._save_steps == 0
        last = step % self._steps_per_epoch == 0
        if distributed.size() > 1 and step % AGREE_EVERY and not last:
            return "save" if by_steps else "go on"
        due = by_steps or time.perf_counter() - self._saved >= 60 * self._save_minutes
        wish = 2 if self.signal is not None else 1 if due else 0
        return ("go on", "save", "stop")[distributed.largest(wish, self._device)]  # type: ignore[return-value]

    def saved(self) -> None:
        """Tells that the state was saved just now."""
        self._saved = time.perf_counter()
