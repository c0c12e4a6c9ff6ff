"""What the rows are of: their share by the values of columns such as `category`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.checks.codes import finding
from preftune.checks.texts import SHOWN, Frequent
from preftune.data.formats.columns import as_text, short
from preftune.records import Finding
from preftune.report.words import percent

COLUMNS = ("source", "category")
NEARLY_ALL = 0.9


class Balance:
    """Rows by the values of some columns, under the file's own names."""

    def __init__(self, columns: tuple[str, ...] = COLUMNS) -> None:
        self._counts = {column: Frequent() for column in columns}
        self._rows = dict.fromkeys(columns, 0)

    def add(self, row: Mapping[str, Any]) -> None:
        for column, counts in self._counts.items():
            if (held := row.get(column)) is not None:
                self._rows[column] += 1
                counts.one((as_text(held) or short(held))[:80])

    def summary(self) -> dict[str, Any]:
        """By column: `rows` that have it, `values`, and the `shares` of the most frequent ones."""
        found: dict[str, Any] = {}
        for column, counts in self._counts.items():
            if rows := self._rows[column]:
                shares = {value: count / rows for value, count in counts.most(SHOWN)}
                found[column] = {"rows": rows, "values": len(counts.counts), "shares": shares}
        return found

    def findings(self) -> list[Finding]:
        found: list[Finding] = []
        for column, said in self.summary().items():
            value, share = next(iter(said["shares"].items()))
            if said["values"] > 1 and share >= NEARLY_ALL:
                most = f"{percent(share)} of the rows are of {column} {value!r}"
                what = f"{most}: the others hardly count; data.sources takes limits"
                found.append(finding("unbalanced", what))
        return found
