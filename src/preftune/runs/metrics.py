"""metrics.jsonl, a line for each step and never two; warnings.jsonl, what its figures warn of; and the trackers beside them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from preftune.config import saved_values
from preftune.keys import TrainKeys
from preftune.runs import folder as files
from preftune.training import trackers
from preftune.training.guards import Guards

log = logging.getLogger("preftune")

METRICS, WARNINGS = "metrics.jsonl", "warnings.jsonl"


class Sink:
    """Takes the line of each step. `lines` are those of the run that this one goes on for, which `guards` has seen.

    Args:
        out: where warnings are written, if anywhere; file: metrics; others: trackers.
    """

    def __init__(
        self,
        lines: list[dict[str, Any]],
        guards: Guards,
        out: Path | None = None,
        file: TextIO | None = None,
        others: Sequence[trackers.Tracker] = (),
    ) -> None:
        self.lines, self.guards, self._out, self._file, self._others = lines, guards, out, file, others

    def __call__(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if new := self.guards.see(line):
            for warned in new:
                log.warning(f"step {warned.step}: {warned.message}")
            if self._out is not None:
                write_warnings(self._out, self.guards)
        for tracker in self._others:
            tracker.log(line)

    def flush(self) -> None:
        """To the disk itself, before a checkpoint stands there for the steps of these lines."""
        if self._file is not None:
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def open_metrics(out: Path | None, keys: TrainKeys, guards: Guards, after: int = 0) -> Generator[Sink]:
    """A sink for the steps after this one; what the files have of later steps is cut off."""
    if out is None:
        yield Sink([], guards)
        return
    path = out / METRICS
    lines = [line for line in read(path) if line["step"] <= after] if after else []
    files.write_lines(path, lines)
    for line in lines:
        guards.see(line)
    write_warnings(out, guards)
    others = trackers.start(keys.train.trackers, out, saved_values(keys), after=after)
    try:
        with path.open("a", encoding="utf-8") as file:
            yield Sink(lines, guards, out, file, others)
    finally:
        for tracker in others:
            tracker.close()


def write_warnings(out: Path, guards: Guards) -> None:
    """What was warned of so far; no file where that is nothing."""
    if guards.warned:
        files.write_lines(out / WARNINGS, [asdict(warned) for warned in guards.warned])
    else:
        (out / WARNINGS).unlink(missing_ok=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a process that was killed may have left half of one."""
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found
