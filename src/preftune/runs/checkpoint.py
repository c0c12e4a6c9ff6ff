"""Checkpoints on disk: written aside, with a manifest of checksums, and renamed; read only if they are whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from preftune.aside import written_aside
from preftune.errors import Refusal, RunFailed
from preftune.runs import folder as files
from preftune.training.state import Saved

log = logging.getLogger("preftune")

FORMAT, SEALED = 3, 3  # of those written here; the first whose manifest has a checksum of its own
MANIFEST, TENSORS, FACTS = "manifest.json", "state.safetensors", "state.json"
Write = Callable[[Path], None]
T = TypeVar("T")


def save(parent: Path, step: int, saved: Saved, write_model: Write, *, beside: Path | None = None, keep: int) -> Path:
    """`parent`/step-000100: the model as transformers loads it, and what training needs to go on from there.

    Args:
        write_model: writes the model into a folder.
        beside: a file that belongs to it and is replaced, never changed: linked, not copied, where the disk can.
        keep: newest checkpoints that stay.

    Raises:
        OSError: it could not be written; nothing of it is left, and older ones are there.
    """
    folder = parent / f"step-{step:06d}"
    aside = folder.with_name(folder.name + ".tmp")
    _clear(parent)
    try:
        write_model(aside)
        save_file({name: tensor.contiguous() for name, tensor in saved.tensors.items()}, aside / TENSORS)
        (aside / FACTS).write_text(json.dumps(saved.facts), encoding="utf-8")
        if beside is not None and beside.is_file():
            _link(beside, aside / beside.name)
        # a tokenizer with several templates has a folder for them
        sums = {path.relative_to(aside).as_posix(): _sum(path) for path in sorted(aside.rglob("*")) if path.is_file()}
        (aside / MANIFEST).write_text(json.dumps({"format": FORMAT, **files.seal({"files": sums})}, indent=1), encoding="utf-8")
        _flush(aside)
    except Exception as error:
        _clear(parent)
        found = _of_the_disk(error)
        if found is None or found is error:
            raise
        raise found from error
    before = folder.with_name(folder.name + ".old-1")
    if folder.exists():  # of the same step: it stays a checkpoint until the new one is there
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
    os.replace(aside, folder)
    shutil.rmtree(before, ignore_errors=True)
    for old in found_in(parent)[:-keep]:
        shutil.rmtree(old)
    return folder


def _clear(parent: Path) -> None:
    """What was not written to its end, now or by a process that was killed."""
    for left in parent.glob("step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _of_the_disk(error: Exception) -> OSError | None:
    """What the system said, if it did: safetensors and tokenizers raise errors of their own, which name it by number."""
    if isinstance(error, OSError):
        return error
    if number := re.search(r"os error (\d+)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return OSError(str(error)) if isinstance(error, SafetensorError) else None


def tried(what: str, place: Path, write: Callable[[], T]) -> T | None:
    """Writes something that the run can go on without: where that fails, it is said, and what was saved before is there."""
    try:
        return write()
    except Exception as error:
        found = _of_the_disk(error)
        if found is None:
            raise
        kept = newest(place)
        there = f"{kept.name} is there" if kept else "there is no checkpoint yet"
        log.warning(f"{what} was not written ({reason(found, place)}); {there}")
        return None


@contextmanager
def needed(what: str, place: Path, again: str) -> Generator[None]:
    """Inside, something is written that a run has to end with.

    Args:
        place: the folder of the checkpoints. again: how the run goes on from the newest.

    Raises:
        RunFailed: it could not be.
    """
    try:
        yield
    except Exception as error:
        found = _of_the_disk(error)
        if found is None:
            raise
        kept = newest(place)
        then = f"; {again} goes on from {kept.name}" if kept and again else ""
        raise RunFailed(f"{what} was not written ({reason(found, place)}){then}", code="os_error") from error


def reason(error: OSError, place: Path) -> str:
    """What is to be done about a file that cannot be written."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error.strerror or str(error)
    free = shutil.disk_usage(place if place.exists() else place.parent).free
    return f"the disk is full, {free / 1e9:.1f} GB are free: free some in {place.absolute()}"


def found_in(parent: Path) -> list[Path]:
    """All checkpoints, whole or not, the newest last."""
    return sorted(parent.glob("step-*[0-9]"), key=lambda path: (int(re.findall(r"\d+", path.name)[0]), path.name))


def newest(parent: Path) -> Path | None:
    """The newest checkpoint by its name, whole or not."""
    return next(reversed(found_in(parent)), None)


def latest(parent: Path) -> Path | None:
    """The newest checkpoint that is whole; those after it are named, with what is wrong with them.

    Raises:
        Refusal: one that a newer version of preftune wrote; or there are some, and none is whole.
    """
    found = found_in(parent)
    for folder in reversed(found):
        fault = damage(folder)
        if fault is None:
            return folder
        log.warning(f"{folder}: {fault}; it is left out")
    if found:
        line = f"none of its {len(found)} checkpoints is whole: start anew with train {parent.parent / 'config.yaml'} out=NEW"
        raise Refusal(line, code="damaged_checkpoints", key="resume")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None: it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = manifest.pop("format")
        sealed = files.is_sealed(manifest)
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if isinstance(found, int) and found > FORMAT:
        raise _of_another_version(folder, found, "newer_checkpoint", "a newer", "update it")
    if isinstance(found, int) and found < SEALED and "sha256" not in manifest:
        raise _of_another_version(folder, found, "older_checkpoint", "an older", "begin the run anew")
    if not sealed or found != FORMAT:
        return f"{MANIFEST} is damaged"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes and not {expected['bytes']:,}"
        if _sum(path) != expected:
            return f"{name} is damaged (its checksum differs)"
    return None


def _of_another_version(folder: Path, found: int, code: str, by: str, then: str) -> Refusal:
    line = f"{folder} is of format {found}, written by {by} preftune; this one reads {FORMAT}: {then}"
    return Refusal(line, code=code, key="resume")


def facts_of(folder: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself."""
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def load(folder: Path) -> Saved:
    """What a whole checkpoint holds, on the CPU."""
    return Saved(load_file(folder / TENSORS), facts_of(folder))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """One file of tensors, aside and then renamed: a link to the one that was there keeps what that held."""
    with written_aside(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
    return path


def _sum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)


def _flush(folder: Path) -> None:
    """To the disk itself, before the name says that it is whole: a machine may lose its power too."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
