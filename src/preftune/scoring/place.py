"""Where reference log-probabilities are kept, and that nothing else stands there; light, so that it is refused early."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from preftune.errors import Refusal

APPLICATION = 0x70726674  # in the head of the file: another program's database is known by it
_SQLITE, _AT = b"SQLite format 3\0", 68  # what such a file begins with, and where it holds the number of its application


def default_place() -> Path | None:
    """The file in the user's cache folder; None for a user without a home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "preftune" / "reference.sqlite"


def is_ours(path: Path) -> bool:
    """Whether a file is a store, however damaged after its head, or stands where only a store can."""
    if path == default_place():
        return True
    try:
        with path.open("rb") as file:
            head = file.read(_AT + 4)
    except OSError:
        return False
    return head.startswith(_SQLITE) and head[_AT:] == APPLICATION.to_bytes(4, "big")


def check_place(setting: str | None, read: Iterable[str | Path]) -> None:
    """Refuses a store that would take the place of something else.

    Args:
        setting: `reference.store`: a path, `off`, or None.
        read: files and folders that the run reads; what is no path here is left out.

    Raises:
        Refusal: a folder, a file of another kind, or one among those that are read.
    """
    if setting is None or setting == "off":
        return
    path = Path(setting)
    for other in map(Path, read):
        if other.exists() and path.resolve().is_relative_to(other.resolve()):
            line = f"{setting} is among the files that this run reads ({other}): name another file"
            raise Refusal(line, code="store_is_input", key="reference.store")
    if path.is_dir():
        raise Refusal(f"{setting} is a folder: name a file", code="not_a_store", key="reference.store")
    if path.exists() and path.stat().st_size and not is_ours(path):
        line = f"{setting} is no store of preftune: name another file"
        raise Refusal(line, code="not_a_store", key="reference.store")
