"""What can go wrong, as exceptions that a person can read.

PreftuneError          one clear line: what is wrong, where, and what to do about it
├── Refusal            exit 2: refused before any compute was spent
├── RunFailed          exit 1: the work began and could not go on
└── Interrupted        exit 130 (Ctrl-C) or 143 (SIGTERM), after saving
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class PreftuneError(Exception):
    """One line for a person, and its parts for a program (`--json`). `document`: what a program gets instead, where the work
    was done and its result is the reason."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        code: str,
        file: str | None = None,
        row: int | None = None,
        column: str | None = None,
        key: str | None = None,
        document: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.document = message, code, document
        self.file, self.row, self.column, self.key = file, row, column, key

    def __str__(self) -> str:
        parts = [self.file or "", f"row {self.row}" if self.row is not None else ""]
        parts += [f"column {self.column}" if self.column else "", self.key or ""]
        place = ", ".join(p for p in parts if p)
        return f"{place}: {self.message}" if place else self.message

    def as_dict(self) -> dict[str, Any]:
        """The `error` object of `--json`."""
        return {
            "code": self.code,
            "message": str(self),
            "file": self.file,
            "row": self.row,
            "column": self.column,
            "key": self.key,
        }


class Refusal(PreftuneError):
    exit_code = 2


class RunFailed(PreftuneError):
    exit_code = 1


class Interrupted(PreftuneError):
    """A signal asked the work to stop; what was done is saved."""

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message, code="interrupted")
        self.exit_code = 128 + signal_number


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?', or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""
