"""A run folder's files, read as they stand: a run may have been interrupted, so any of them may be absent or torn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

Json = dict[str, Any]
T = TypeVar("T")

# What the page cannot show without each file. Only a demo has a demo.json, and only a run that was warned of a warnings.jsonl.
WITHOUT = {
    "metrics.jsonl": "no curves",
    "evaluation.json": "no held-out figures before and after",
    "data.json": "no summary of the data",
    "samples.jsonl": "no answers before and after",
    "environment.json": "no versions, device or times",
    "config.yaml": "no settings",
}


@dataclass(slots=True)
class RunFiles:
    """What was found. `remarks` says, a sentence each, what was missing or could not be read."""

    path: Path
    config: str = ""
    settings: Json = field(default_factory=dict[str, Any])  # config.yaml, read
    metrics: list[Json] = field(default_factory=list[Json])
    warnings: list[Json] = field(default_factory=list[Json])
    evaluation: Json = field(default_factory=dict[str, Any])
    data: Json = field(default_factory=dict[str, Any])
    samples: list[Json] = field(default_factory=list[Json])
    environment: Json = field(default_factory=dict[str, Any])
    demo: Json = field(default_factory=dict[str, Any])
    remarks: list[str] = field(default_factory=list[str])


def read(run: Path) -> RunFiles:
    """Reads the folder `run`. Never fails for a file that is absent or damaged: it is remarked on instead."""
    files = RunFiles(run)

    def take(name: str, parse: Callable[[str], T], empty: T) -> T:
        try:
            return parse((run / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if name in WITHOUT and not _said_by_demo(name, files.demo):
                files.remarks.append(f"{name} is missing: {WITHOUT[name]}.")
        except (OSError, ValueError) as error:
            files.remarks.append(f"{name} could not be read ({error}): {WITHOUT.get(name, 'it is left out')}.")
        return empty

    def lines(name: str) -> list[Json]:
        found, torn = take(name, _json_lines, ([], []))
        if torn:
            places = ", ".join(str(number) for number in torn[:5]) + (", ..." if len(torn) > 5 else "")
            files.remarks.append(f"{name}: unreadable and left out: line {places} ({len(torn):,} in all).")
        return found

    files.demo = take("demo.json", _json_object, {})
    files.metrics = lines("metrics.jsonl")
    files.warnings = lines("warnings.jsonl")
    files.evaluation = take("evaluation.json", _json_object, {})
    files.data = take("data.json", _json_object, {})
    files.samples = lines("samples.jsonl")
    files.environment = take("environment.json", _json_object, {})
    files.config = take("config.yaml", str, "")
    files.settings = take("config.yaml", _settings, {}) if files.config else {}
    return files


def _said_by_demo(name: str, demo: Json) -> bool:
    """Whether the absence of a file is nothing to remark on: demo.json holds a demo's figures and samples, and where it ran
    several betas, each has a run folder of its own with all the rest."""
    return bool(demo) and (name in ("evaluation.json", "samples.jsonl") or len(objects(demo.get("runs"))) > 1)


def number(value: object) -> float | None:
    """A finite number, or None for everything else (absent, null, NaN, infinite, a word, a truth value)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def pair(value: object) -> tuple[float, float] | None:
    """An interval: two finite numbers, or None."""
    ends = [number(end) for end in cast(list[object], value)] if isinstance(value, list) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return ends[0], ends[1]


def mapping(value: object) -> Json:
    """The value where it is a JSON object, else an empty one."""
    return cast(Json, value) if isinstance(value, dict) else {}


def objects(value: object) -> list[Json]:
    """The JSON objects of a list, else an empty list."""
    items = cast(list[object], value) if isinstance(value, list) else []
    return [cast(Json, item) for item in items if isinstance(item, dict)]


def _json_object(text: str) -> Json:
    found: object = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return cast(Json, found)


def _settings(text: str) -> Json:
    """A resolved config, which preftune itself wrote."""
    from ruamel.yaml import YAML, YAMLError  # here, since importing preftune.report must cost nothing

    try:
        found: object = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ValueError("not YAML") from error
    if not isinstance(found, dict):
        raise ValueError("not a mapping")
    return cast(Json, found)


def _json_lines(text: str) -> tuple[list[Json], list[int]]:
    """The objects of a JSONL text, and which lines (from 1) hold none: a killed run tears its last line."""
    found: list[Json] = []
    torn: list[int] = []
    for position, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_json_object(line))
        except ValueError:
            torn.append(position)
    return found, torn
