"""`preftune train resume=RUN`: the keys of a run that stopped, and what may not have changed since. No torch."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from preftune.config import resolve, saved_values
from preftune.config_files import parse_word
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.runs import folder as files

log = logging.getLogger("preftune")

MAY_DIFFER = ("steps", "epochs", "train.trackers")


def is_resume(words: Sequence[str]) -> bool:
    return any(word.startswith("resume=") for word in words)


def keys_of(words: Sequence[str]) -> TrainKeys:
    """The keys of the run, with what of the words may differ.

    Raises:
        Refusal: there is no run; it is complete; or the words (or their file) ask for something else than it was begun with.
    """
    *_, asked = (parse_word(word)["resume"] for word in words if word.startswith("resume="))
    if asked is None:
        raise Refusal("names the folder that a run was begun in: train resume=RUN", code="missing_key", key="resume")
    folder = Path(str(asked)).expanduser()
    config = folder / "config.yaml"
    if not config.is_file():
        what = "holds no run (no config.yaml)" if folder.is_dir() else "is not there"
        raise Refusal(f"{asked} {what}: name the folder that a run was begun in", code="no_run", key="resume")
    first, words = keys_of_run(folder), [word for word in words if not word.startswith("resume=")]
    if {"steps", "epochs"}.intersection(word.partition("=")[0] for word in words) == {"epochs"}:
        words.append("steps=null")  # steps would win over what is asked for
    keys = resolve(TrainKeys, words, under=str(config))
    for name in ("dry_run", "overwrite"):
        if getattr(keys, name):
            raise Refusal("does not go with resume: leave one of the two away", code="unused_key", key=name)
    before, now = (_flat(saved_values(k)) for k in (first, keys))
    changed = [name for name in now if now[name] != before.get(name)]
    if refused := [name for name in changed if name not in MAY_DIFFER]:
        shown = "; ".join(f"{name} is {before.get(name)} there and {now[name]} here" for name in refused)
        line = f"{asked} was begun with other keys: {shown}. Only {', '.join(MAY_DIFFER)} may change"
        raise Refusal(line, code="another_config", key="resume")
    if not {"steps", "epochs"}.intersection(changed) and (folder / "evaluation.json").is_file():
        line = f"{asked} is complete: steps= or epochs= make it longer, where train.save_every kept a checkpoint"
        raise Refusal(line, code="complete", key="resume")
    return keys.model_copy(update={"out": str(folder), "resume": str(folder)})


def keys_of_run(folder: Path) -> TrainKeys:
    """The keys that a run was begun with, or last gone on with."""
    config = folder / "config.yaml"
    try:
        return resolve(TrainKeys, [str(config)])
    except Refusal as error:
        error.file = error.file or str(config)
        raise


def check_files(folder: Path) -> dict[str, str] | None:
    """Refuses a run of which a file that it was begun with is not what it was.

    Returns:
        The checksums of these files; None: they cannot be read, which is said.
    """
    known: dict[str, str] | None = (files.read_json(folder / "environment.json") or {}).get("sha256")
    if known is None:
        log.warning(f"{folder / 'environment.json'} cannot be read: whether data and models are what they were is not known")
        return None
    for path, digest in known.items():
        if not Path(path).is_file():
            raise Refusal(f"{folder} was begun with this file, which is not there", code="missing_file", file=path)
        if files.sha256(Path(path)) != digest:
            line = f"has changed since {folder} was begun with it: start a new run, or put the old file back"
            raise Refusal(line, code="changed_file", file=path)
    return known


def check_no_more(folder: Path, known: Container[str], inputs: Iterable[Path]) -> None:
    """Refuses a run whose folders of data or models have a file more than those `known`, which it was begun with."""
    for path in inputs:
        if str(path) not in known:
            line = f"{folder} was begun without this file: start a new run, or take it away"
            raise Refusal(line, code="changed_file", file=str(path))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys, dotted."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
