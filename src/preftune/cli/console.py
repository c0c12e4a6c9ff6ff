"""What a person sees on standard error: lines that are said, and progress where somebody watches."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

WORDS = {
    "reference": "scoring the reference",
    "check": "checking the start",
    "evaluate": "scoring held-out data",
    "sample": "sampling",
    "train": "training",
}


def setup(*, quiet: bool) -> None:
    """Our log goes to standard error, one plain line each; other libraries' warnings stay out of it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())
    log = logging.getLogger("preftune")
    log.handlers[:] = [handler]
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft)\b")


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        return mark + record.getMessage()


class Watch:
    """Progress of a run: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty() and logging.getLogger("preftune").isEnabledFor(logging.INFO)
        self._bar: Any = None
        self._task: Any = None
        self._phase = ""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self.live:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if self._bar is not None:
            if phase != self._phase:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(WORDS[phase], total=total, note="")
            self._bar.update(self._task, completed=done, total=total, note=note(line))
        elif phase == "train" and (done == total or done == 1 or time.monotonic() - self._last > 15):
            logging.getLogger("preftune").info(f"step {done} of {total}  {note(line)}")
            self._last = time.monotonic()
        self._phase = phase


def once_before(watch: Watch, first: Callable[[], None]) -> Callable[[str, int, int, dict[str, Any]], None]:
    """The watch, with `first` called before its first report."""
    waiting = [first]

    def report(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        while waiting:
            waiting.pop()()
        watch(phase, done, total, line)

    return report


def note(line: dict[str, Any]) -> str:
    """The figures of a step that people watch."""
    shown = [("loss", "loss {:.4f}"), ("accuracy", "accuracy {:.2f}"), ("pairs_per_s", "{:.1f} pairs/s")]
    shown += [("tokens_per_s", "{:,.0f} tokens/s"), ("memory_gb", "{:.1f} GB")]
    return "  ".join(text.format(line[key]) for key, text in shown if key in line)
