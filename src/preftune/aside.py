"""A file takes its place once it is whole."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Generator[Path]:
    """Gives a place beside `path` to write to, in a folder that is there; it is renamed to `path` at the end. Where that is not
    reached, what stood there stays, and nothing else is left; a process that is killed leaves what the next one writes over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
