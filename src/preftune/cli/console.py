"""What a person sees on standard error: lines that are said, and progress where somebody watches."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from preftune import processes

WORDS = {
    "read": "reading rows",
    "score": "scoring",
    "reference": "scoring the reference",
    "check": "checking the start",
    "evaluate": "scoring held-out data",
    "sample": "sampling",
    "kl": "measuring the KL",
    "train": "training",
}
EVERY = 15.0  # seconds between two lines where nobody watches a bar


def setup(*, quiet: bool) -> None:
    """Our log goes to standard error, one plain line each; other libraries' warnings stay out of it."""
    handler = _Stderr()
    handler.setFormatter(_Plain())
    log = logging.getLogger("preftune")
    log.handlers[:] = [handler]
    # of the processes of one run the first one speaks
    log.setLevel(logging.ERROR if processes.number() else logging.WARNING if quiet else logging.INFO)
    log.propagate = False
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|bitsandbytes)\b")


class _Stderr(logging.Handler):
    """To what is standard error at that moment: a live bar stands in for it, and prints a line above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


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
            self._bar = _bar()
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if self._bar is not None:
            self._draw(phase, done, total, line)
        elif time.monotonic() - self._last > EVERY or (phase == "train" and done in (1, total)):
            what = f"step {done} of {total}" if phase == "train" else f"{WORDS.get(phase, phase)}: {done:,}{_of(total)}"
            logging.getLogger("preftune").info(f"{what}  {note(line)}".rstrip())
            self._last = time.monotonic()
        self._phase = phase

    def _draw(self, phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if phase != self._phase:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(WORDS.get(phase, phase), total=total or None)
        self._bar.note = note(line)
        self._bar.update(self._task, completed=done, total=total or None)


def _bar() -> Any:
    """How far it is and how long it takes, and under that the figures of the last step: a line of 80 columns holds not both."""
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Bar(Progress):
        note = ""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            yield Text(self.note, no_wrap=True, overflow="ellipsis")

    left = (TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), *left)
    return Bar(*columns, console=Console(stderr=True), transient=True)


def _of(total: int) -> str:
    """Nothing where it is not known how much there is."""
    return f" of {total:,}" if total else ""


def note(line: dict[str, Any]) -> str:
    """The figures of a step that people watch."""
    shown = [("loss", "loss {:.4f}"), ("accuracy", "accuracy {:.2f}"), ("pairs_per_s", "{:.1f} pairs/s")]
    shown += [("tokens_per_s", "{:,.0f} tokens/s"), ("memory_gb", "{:.1f} GB")]
    return "  ".join(text.format(line[key]) for key, text in shown if line.get(key) is not None)
