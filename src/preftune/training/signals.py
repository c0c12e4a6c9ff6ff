"""Ctrl-C and SIGTERM as a question that the loop asks, so that it stops between steps and saves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from preftune import processes


class Stop:
    """`signal` is the number of the first signal that came, else None. A second one stops at once; of several processes it
    does not: they may be told by whoever stops the run and by their launcher, and have to stop at the same place to save."""

    signal: int | None = None

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and processes.asked() == 1:
            raise KeyboardInterrupt
        self.signal = self.signal or number


@contextmanager
def stoppable() -> Generator[Stop]:
    """While inside, Ctrl-C and SIGTERM set the flag. Only the main thread may hold handlers; elsewhere it stays unset."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
