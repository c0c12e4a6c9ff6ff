"""Rows and their judgements as numbers: digests in place of texts, about a hundred bytes a row, whatever the rows hold.

Two texts count as the same where their digests of 64 bits are: among ten million different ones, two are alike by accident once
in 400,000 files.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preftune.data.formats import Score
from preftune.data.grouping import content_key
from preftune.records import Comparison, Content, Demonstration, Mark, Ranking, Rating

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]
Bools = NDArray[np.bool_]

COMPARISON, JOINED, RATING, DEMONSTRATION, SCORE, NONE = range(6)  # JOINED: made of several rows, stands at the first
BLANK = bytes(8)
_SIDES = {"": 0, "a": 1, "b": -1}


def key(content: Content) -> bytes:
    """Eight bytes that stand for a text or for messages; zeros for none."""
    if not content:
        return BLANK
    text = content if isinstance(content, str) else "\0" + repr(content_key(content))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


@lru_cache(maxsize=100_000)
def key_of_name(name: str) -> bytes:
    return key(name)


def length(content: Content) -> int:
    """Characters."""
    return len(content) if isinstance(content, str) else sum(len(message.content) for message in content)


@dataclass(frozen=True, slots=True)
class Place:
    """A row: its number from 1 in a file of the ledger."""

    file: str
    row: int


class Ledger:
    """Rows that were kept, and what was said in them."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._names: dict[str, int] = {}
        self._file, self._number = array("I"), array("Q")
        self._prompt, self._group = bytearray(), bytearray()
        self._row, self._kind, self._side = array("I"), array("B"), array("b")
        self._a, self._b, self._who = bytearray(), bytearray(), bytearray()
        self._preference = array("f")
        self._size_a, self._size_b = array("I"), array("I")
        self._gone = bytearray()

    def __len__(self) -> int:
        return len(self._number)

    def file(self, name: str) -> int:
        """The number of a file; the same name twice is the same file."""
        number = self._names.setdefault(name, len(self.files))
        if number == len(self.files):
            self.files.append(name)
        return number

    def row(self, file: int, number: int, prompt: bytes, group: bytes) -> int:
        """A new row; group: the prompt with whatever else keeps it apart."""
        self._file.append(file)
        self._number.append(number)
        self._prompt += prompt
        self._group += group
        self._gone.append(0)
        return len(self._number) - 1

    def drop(self, row: int) -> None:
        """The row counts no more."""
        self._gone[row] = 1

    def judged(
        self, row: int, mark: Mark | Score, answers: Sequence[bytes], sizes: Sequence[int], *, joined: bool = False
    ) -> None:
        """A judgement in a row, with the digests and sizes of the answers that it names by index."""
        by = mark.by
        who = key_of_name(by.who) if by and by.who else BLANK
        if isinstance(mark, Comparison):
            side = _SIDES[by.side] if by else 0
            kind, a, b = JOINED if joined else COMPARISON, mark.a, mark.b
            self._mark(row, kind, answers[a], answers[b], mark.preference, who, sizes[a], sizes[b], side)
        elif isinstance(mark, Ranking):
            for pair in mark.pairs():
                self.judged(row, pair, answers, sizes, joined=joined)
        else:
            kind, value = _alone(mark)
            self._mark(row, kind, answers[mark.response], BLANK, value, who, sizes[mark.response], 0, 0)

    def unjudged(self, row: int, content: bytes) -> None:
        """A row without a judgement of its own, by the digest of what it holds."""
        self._mark(row, NONE, content, BLANK, 0.0, BLANK, 0, 0, 0)

    def _mark(self, row: int, kind: int, a: bytes, b: bytes, p: float, who: bytes, size_a: int, size_b: int, side: int) -> None:
        self._row.append(row)
        self._kind.append(kind)
        self._a += a
        self._b += b
        self._preference.append(p)
        self._who += who
        self._size_a.append(size_a)
        self._size_b.append(size_b)
        self._side.append(side)

    def table(self, *, dropped: bool = False) -> Table:
        """The rows that are left, as arrays; or all of them."""
        kept = (np.frombuffer(self._gone, np.uint8) == 0) | dropped
        row = _ints(self._row)
        marks = kept[row] if len(row) else np.zeros(0, bool)

        def of_rows(values: Any) -> Any:
            return values[kept]

        def of_marks(values: Any) -> Any:
            return values[marks]

        return Table(
            self.files,
            np.flatnonzero(kept),
            of_rows(_ints(self._file)),
            of_rows(_ints(self._number)),
            of_rows(_keys(self._prompt)),
            of_rows(_keys(self._group)),
            (np.cumsum(kept) - 1)[of_marks(row)],
            of_marks(_ints(self._kind)),
            of_marks(_keys(self._a)),
            of_marks(_keys(self._b)),
            of_marks(np.frombuffer(self._preference, np.float32)),
            of_marks(_keys(self._who)),
            of_marks(_ints(self._size_a)),
            of_marks(_ints(self._size_b)),
            of_marks(_ints(self._side)),
        )


def _alone(mark: Rating | Demonstration | Score) -> tuple[int, float]:
    if isinstance(mark, Rating):
        return RATING, float(mark.desirable)
    return (SCORE, mark.value) if isinstance(mark, Score) else (DEMONSTRATION, 1.0)


def _ints(values: array[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _keys(values: bytearray) -> Keys:
    return np.frombuffer(bytes(values), dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Table:
    """R rows and M judgements, in the order read.

    entry, file, number, prompt, group: [R]; entry counts the rows of the ledger, dropped ones too.
    row: [M] index of the judgement's row. kind, a, b, preference, who, size_a, size_b, side:
    [M]; a and b are digests of answers, b of one alone is 0; side: 1 where a was shown first, -1 where b was, 0 unknown.
    """

    files: list[str]
    entry: Ints
    file: Ints
    number: Ints
    prompt: Keys
    group: Keys
    row: Ints
    kind: Ints
    a: Keys
    b: Keys
    preference: NDArray[np.float32]
    who: Keys
    size_a: Ints
    size_b: Ints
    side: Ints

    def place(self, row: int) -> Place:
        return Place(self.files[int(self.file[row])], int(self.number[row]))

    def places(self, rows: Sequence[int] | Ints, beside: int) -> str:
        """`row 3`, or `rows 3, 5, other.jsonl:7`, as seen from a row of one file; five at most."""
        here = self.file[beside]
        shown = [str(self.number[r]) if self.file[r] == here else "{0.file}:{0.row}".format(self.place(r)) for r in rows[:5]]
        return f"row{'s' if len(rows) > 1 else ''} {', '.join(shown)}{', ...' if len(rows) > 5 else ''}"

    @property
    def compared(self) -> Bools:
        """[M] which judgements compare two answers."""
        return self.kind <= JOINED

    @property
    def decided(self) -> Bools:
        """[M] which of them say that one is better."""
        return self.compared & (self.preference != 0.5)


def mix(*values: Any) -> Keys:
    """One digest of several, in their order (the finaliser of splitmix64 after each)."""
    total = np.zeros(1, np.uint64)
    for value in values:
        with np.errstate(over="ignore"):
            total = total * np.uint64(0x9E3779B97F4A7C15) + np.asarray(value).astype(np.uint64) + np.uint64(1)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                total = (total ^ (total >> np.uint64(shift))) * np.uint64(factor)
            total = total ^ (total >> np.uint64(31))
    return total
