"""The command line in this process: what a person sees of it, and the files it is tried on."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny

from preftune.cli.app import run

WORDS = ["cat", "dog", "cow", "hen", "ant", "bee", "owl", "fox"]
PAIRS = [
    {"prompt": f"A {a} met a {b}.", "chosen": f" The {a} sang.", "rejected": f" The {b} left, and the {a} too."}
    for a in WORDS
    for b in WORDS
    if a != b
]


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which has to be one JSON document."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> Answer:
    """`preftune WORDS`."""
    capsys.readouterr()
    code = quietly(*words)
    return Answer(code, *capsys.readouterr())


def quietly(*words: str) -> int:
    """The exit code of `preftune WORDS`, with everything put back that it sets for a process of its own."""
    log = logging.getLogger("preftune")
    before = log.handlers[:], log.level, log.propagate
    try:
        with warnings.catch_warnings():
            run(list(words))
    except SystemExit as done:
        return int(done.code or 0)
    finally:
        log.handlers[:], log.level, log.propagate = before
    return 0


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_model(folder: Path, *, seed: int = 0, template: str | None = None, positions: int = 64) -> Path:
    """A tiny random model with its tokenizer, as a folder that transformers loads."""
    tiny.model(seed=seed, positions=positions).save_pretrained(folder)
    tiny.tokenizer(template=template).save_pretrained(folder)
    return folder


def repeated(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what the machine of this moment decides: what a rerun has to have to the bit."""
    measured = {"pairs_per_s", "tokens_per_s", "memory_gb"}
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content; folders hold None. Python's own caches do not count."""
    found: dict[str, bytes | None] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {str(Path(parent, name).relative_to(folder)): None for name in folders}
        found |= {str(Path(parent, name).relative_to(folder)): Path(parent, name).read_bytes() for name in names}
    return found
