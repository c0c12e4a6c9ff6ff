"""metrics.jsonl, a line for each step and never two, and the trackers beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, TextIO

from preftune.runs import folder as files
from preftune.training import trackers


class Sink:
    """Takes the line of each step. `lines` are those of the run that this one goes on for."""

    def __init__(
        self, lines: list[dict[str, Any]], file: TextIO | None = None, others: list[trackers.TensorBoard] | None = None
    ) -> None:
        self.lines, self._file, self._others = lines, file, others or []

    def __call__(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._others:
            tracker.log(line)


@contextlib.contextmanager
def open_metrics(out: Path | None, names: list[Any], after: int = 0) -> Generator[Sink]:
    """A sink for the steps after this one; what the file has of later steps is cut off."""
    if out is None:
        yield Sink([])
        return
    path = out / "metrics.jsonl"
    lines = [line for line in read(path) if line["step"] <= after] if after else []
    files.write_lines(path, lines)
    others = trackers.start(names, out, after=after)
    try:
        with path.open("a", encoding="utf-8") as file:
            yield Sink(lines, file, others)
    finally:
        for tracker in others:
            tracker.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a process that was killed may have left half of one."""
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found
