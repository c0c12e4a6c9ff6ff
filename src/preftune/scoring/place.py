"""Where reference log-probabilities are kept, and that nothing else stands there; light, so that it is refused early."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from preftune.errors import Refusal

APPLICATION = 0x70726674  # in the head of the file: another program's database is known by it
SCHEMA = "key BLOB NOT NULL UNIQUE, logp BLOB NOT NULL"  # stands in the first page as it was written
_SQLITE, _AT = b"SQLite format 3\0", 68  # what such a file begins with, and where it holds the number of its application
_PAGE = 4096  # bytes


def default_place() -> Path | None:
    """The file in the user's cache folder; None for a user without a home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "preftune" / "reference.sqlite"


def is_ours(path: Path) -> bool | None:
    """Whether a file is a store, whole or damaged, or stands where only a store can; None: it cannot be read.

    Damage leaves one of two marks: the number in the head, or the table's own words. What is left of a head says nothing else.
    """
    if path == default_place():
        return True
    try:
        with path.open("rb") as file:
            begin = file.read(_PAGE)
    except OSError:
        return None
    marked = begin[_AT : _AT + 4] == APPLICATION.to_bytes(4, "big") or SCHEMA.encode() in begin
    return marked or (len(begin) < _AT + 4 and _SQLITE.startswith(begin[: len(_SQLITE)]))


def check_place(setting: str | None, read: Iterable[str], out: str | Path | None = None) -> None:
    """Refuses a store that would take the place of something else.

    Args:
        setting: `reference.store`: a path, `off`, or None.
        read: files and folders that the run reads; what is no path here is left out.
        out: the run folder, where it is named.

    Raises:
        Refusal: a folder, a file of another kind, one among those that are read, or in the folder of a run that begins.
    """
    if setting is None or setting == "off":
        return
    path = Path(setting)
    for other in map(Path, read):
        if os.path.exists(other) and path.resolve().is_relative_to(other.resolve()):
            line = f"{setting} is among the files that this run reads ({other}): name another file"
            raise Refusal(line, code="store_is_input", key="reference.store")
    if out is not None and path.resolve().is_relative_to(Path(out).resolve()):
        line = f"{setting} is in the run's own folder, which keeps the values that it uses by itself: name another file"
        raise Refusal(line, code="store_in_run", key="reference.store")
    if os.path.isdir(path):
        raise Refusal(f"{setting} is a folder: name a file", code="not_a_store", key="reference.store")
    if os.path.exists(path) and is_ours(path) is False:
        line = f"{setting} is no store of preftune: name another file"
        raise Refusal(line, code="not_a_store", key="reference.store")
