"""Rows that are almost the same, by MinHash: 64 numbers a row stand for the set of its runs of eight bytes.

The share of numbers that two rows have in common estimates how much of their runs they share (Broder 1997). Rows that agree
in four numbers that stand together are compared; of two rows that share 80 % of their runs, one pair in ten thousand is missed.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from preftune.checks.codes import finding
from preftune.checks.ledger import Table, mix
from preftune.records import Finding

NUMBERS, BAND, RUN = 64, 4, 8
ALIKE = 0.8
MOST = 20_000  # bytes of a row that are looked at
_draw = np.random.default_rng(0)
_FACTORS = (_draw.integers(0, 2**31, (NUMBERS, 1), dtype=np.uint32) << 1) | np.uint32(1)
_OFFSETS = _draw.integers(0, 2**32, (NUMBERS, 1), dtype=np.uint32)
_POWERS = [np.uint32(pow(0x01000193, RUN - n, 2**32)) for n in range(RUN)]


def signature(text: str) -> NDArray[np.uint32]:
    """[64] of a text, whatever its case and spacing."""
    said = np.frombuffer(" ".join(text[:MOST].lower().split()).encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint32)
    if len(said) < RUN:
        said = np.concatenate([said, np.zeros(RUN - len(said), np.uint32)])
    runs = sum((said[n : len(said) - RUN + 1 + n] * power for n, power in enumerate(_POWERS)), np.zeros(1, np.uint32))
    runs ^= runs >> np.uint32(15)
    return (runs * _FACTORS + _OFFSETS).min(1)


class Near:
    """Signatures of rows of a ledger."""

    def __init__(self) -> None:
        self._held, self._rows = bytearray(), array("I")

    def add(self, row: int, text: str) -> None:
        """A row by its number in the ledger."""
        self._held += signature(text).tobytes()
        self._rows.append(row)

    def findings(self, table: Table) -> list[Finding]:
        """A finding for each row that is almost an earlier one, and not of the same prompt."""
        own = np.array(self._rows, np.int64)
        left = np.isin(own, table.entry)
        held = np.frombuffer(bytes(self._held), np.uint32).reshape(-1, NUMBERS)[left]
        rows = np.searchsorted(table.entry, own[left])
        group, earlier = table.group[rows], np.arange(len(held))
        for start in range(0, NUMBERS, BAND):
            keys = mix(*held[:, start : start + BAND].T)
            _, first, place = np.unique(keys, return_index=True, return_inverse=True)
            found = first[place]
            same = (held[found] == held).mean(1) >= ALIKE
            other = (group[found] != group) & (found < earlier)
            earlier = np.where(same & other, found, earlier)
        result: list[Finding] = []
        for n in np.flatnonzero(earlier != np.arange(len(held))).tolist():
            row = int(rows[n])
            where, before = table.place(row), table.places([int(rows[earlier[n]])], row)
            what = f"is almost the same as {before}: remove one, or hold both out"
            result.append(finding("near_duplicate", what, where.file, where.row))
        return result
