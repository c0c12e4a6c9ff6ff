"""Several runs on one page: what they came to, the settings that differ, and their curves in the same charts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.report import curves, folder, svg, tables
from preftune.report.diagnosis import Diagnosis, diagnose
from preftune.report.folder import Json, RunFiles, mapping, number
from preftune.report.page import filled, put
from preftune.report.words import NONE, duration, figure, interval, percent

MOST = len(curves.OF_RUNS)  # runs, so that each has an ink of its own
NOT_COMPARED = ("out", "overwrite", "resume")


@dataclass(frozen=True, slots=True)
class Shown:
    """A run of the comparison: its name, the way to its own page, what was found in it."""

    name: str
    ink: int
    page: str
    diagnosis: Diagnosis


def write(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page of 2 to `MOST` runs and returns its path."""
    put(out, render([folder.read(run) for run in runs], out.parent).encode())
    return out


def render(files: Sequence[RunFiles], beside: Path) -> str:
    """The page as text; `beside` is the folder that it will stand in."""
    names = _names([run.path for run in files])
    plots = curves.compared([(name, run.metrics) for name, run in zip(names, files, strict=True)])
    return filled(
        "comparison.html",
        runs=[
            Shown(name, ink, Path(os.path.relpath(run.path / "report.html", beside)).as_posix(), diagnose(run))
            for name, ink, run in zip(names, curves.OF_RUNS, files, strict=False)
        ],
        remarks=[f"{name}: {remark}" for name, run in zip(names, files, strict=True) for remark in run.remarks],
        results=results(files),
        settings=differing([run.settings for run in files]),
        plots=plots,
        values=svg.values(plots),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The last names of the folders, with as many before as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def differing(settings: Sequence[Json]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of the settings that are not the same in all; places of output are left out."""
    flat = [_flat(own) for own in settings]
    keys = dict.fromkeys(key for own in flat for key in own if key not in NOT_COMPARED)
    rows = [(key, [own.get(key, NONE) for own in flat]) for key in keys]
    return [(key, row) for key, row in rows if len(set(row)) > 1]


def _flat(settings: Json, prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(mapping(value), f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = NONE if value is None else str(value)
    return found


Cell = tuple[str, str]  # a figure, and what stands below it


def results(files: Sequence[RunFiles]) -> tuple[list[str], list[list[Cell]]]:
    """(columns, a row of cells for each run): the figures after training that a run has, its length, time and memory."""
    columns: list[tuple[str, Callable[[RunFiles], Cell | None]]] = [
        (measure.label, lambda run, measure=measure: _measured(run, measure)) for measure in tables.MEASURES
    ]
    columns += [("Answer length", _length), ("Steps", _steps), ("Time", _time), ("Peak memory", _memory)]
    found = [(label, [cell(run) for run in files]) for label, cell in columns]
    kept = [(label, cells) for label, cells in found if any(cells)]
    return [label for label, _ in kept], [[cells[n] or (NONE, "") for _, cells in kept] for n in range(len(files))]


def _measured(run: RunFiles, measure: tables.Measure) -> Cell | None:
    after = mapping(run.evaluation.get("after"))
    if number(after.get(measure.key)) is None:
        return None
    show: Callable[[Any], str] = percent if measure.share else figure
    return show(after[measure.key]), interval(after.get(f"{measure.key}_interval"), share=measure.share)


def _length(run: RunFiles) -> Cell | None:
    row = tables.answer_length(run.samples)
    return row and (row.after[0], f"{row.before[0]} before")


def _steps(run: RunFiles) -> Cell | None:
    steps = sum("loss" in line for line in run.metrics)
    return (f"{steps:,}", "") if steps else None


def _time(run: RunFiles) -> Cell | None:
    seconds = number(run.environment.get("seconds"))
    return None if seconds is None else (duration(seconds), "")


def _memory(run: RunFiles) -> Cell | None:
    memory = [value for line in run.metrics if (value := number(line.get("memory_gb"))) is not None]
    return (f"{figure(max(memory))} GB", "") if memory else None
