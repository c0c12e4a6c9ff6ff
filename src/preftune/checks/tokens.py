"""What a model's tokenizer makes of the rows: lengths, what max_length cuts, what the template does, three rows drawn."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from preftune.checks.ledger import Bools, Ints, key, mix
from preftune.checks.templates import Problems, last_turn
from preftune.data.render import Rendered, Speaker, TooLong, fitted
from preftune.records import Finding, Group

CHUNK = 512  # rows per call of the tokenizer: enough for its threads
DRAWN = 3
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
WAYS: tuple[TooLong, ...] = ("drop", "truncate_response", "truncate_prompt_start")


_Rows = dict[tuple[str, int], tuple[Group, int]]
_Found = tuple[list[tuple[Group, list[Rendered]]], list[Finding]]


class Tokens:
    """Renders rows in chunks, as training does, and keeps numbers of them. A chunk is tokenized, which needs no interpreter,
    while the rows after it are read and those before it are looked at."""

    def __init__(self, tokenizer: Any, *, limit: int | None, too_long: TooLong, template: str | None) -> None:
        self.findings: list[Finding] = []  # of rows that cannot be rendered, which training drops
        self.limit = limit
        self.too_long: TooLong = too_long
        self.drawn: list[dict[str, Any]] = []
        self._speaker, self._tokenizer = Speaker(tokenizer, template), tokenizer
        self._problems = Problems(self._speaker)
        self._waiting: _Rows = {}
        self._beside = ThreadPoolExecutor(max_workers=1)
        self._begun: tuple[_Rows, Future[_Found]] | None = None
        self._group, self._response, self._kept = bytearray(), bytearray(), bytearray()
        self._start, self._length, self._row = array("I"), array("I"), array("I")
        self._rows = self._over = 0
        self._cut: dict[TooLong, Counter[str]] = {way: Counter() for way in WAYS}

    def add(self, group: Group, file: str, row: int, place: int) -> Sequence[int]:
        """A row as a group, and its place in the ledger; gives back the places of rows that turn out to be dropped."""
        dropped = self._next() if len(self._waiting) >= CHUNK or (file, row) in self._waiting else ()
        self._waiting[file, row] = group, place
        return dropped

    def flush(self) -> Sequence[int]:
        """All rows that are left."""
        return [*self._next(), *self._next()]

    def _next(self) -> Sequence[int]:
        """Begins the rows that wait, and looks at those that were begun before."""
        begun, self._begun = self._begun, None
        if self._waiting:
            rows, self._waiting = self._waiting, {}
            self._begun = rows, self._beside.submit(self._rendered, [group for group, _ in rows.values()])
        return self._taken(*begun) if begun else ()

    def _rendered(self, groups: list[Group]) -> _Found:
        findings: list[Finding] = []
        return list(self._speaker.render(groups, findings)), findings

    def _taken(self, waiting: _Rows, begun: Future[_Found]) -> Sequence[int]:
        before = len(self.findings)
        where = {id(r.origins[0]): at for at, (group, _) in waiting.items() for r in group.responses}
        found, own = begun.result()
        self.findings += own
        for group, rendered in found:
            if rendered:
                self._take(group, rendered, *where[id(group.responses[0].origins[0])])
        self.findings[before:] = dict.fromkeys(self.findings[before:])  # each judgement of a row has one, all of them alike
        bad = _rows_of(self.findings[before:])
        return [place for at, (_, place) in waiting.items() if at in bad]

    def _take(self, group: Group, rendered: list[Rendered], file: str, row: int) -> None:
        self._problems.add(group, rendered, file, row)
        over = self.limit is not None and max(len(r.ids) for r in rendered) > self.limit
        if over:
            self._over += 1
            self._cut_in_every_way(group, rendered, file, row)
        before = len(self.findings)
        _, cut, _ = fitted(group, rendered, self.limit, self.too_long, self._speaker.start_token, self.findings)
        kept = (file, row) not in _rows_of(self.findings[before:])
        self._measure(group, rendered, kept)
        if kept and len(self.drawn) < DRAWN:
            columns = [response.origins[0].column for response in group.responses]
            sides = [{"column": c, "tokens": spelled(r, self._tokenizer)} for c, r in zip(columns, cut, strict=True)]
            self.drawn.append({"file": file, "row": row, "responses": sides})

    def _cut_in_every_way(self, group: Group, rendered: list[Rendered], file: str, row: int) -> None:
        for way, counts in self._cut.items():
            found: list[Finding] = []
            left, cut, _ = fitted(group, rendered, self.limit, way, self._speaker.start_token, found)
            counts["rows"] += 1
            counts["dropped"] += bool(_rows_of(found))
            counts["only_difference"] += any(f.code == "identical_tokens" for f in found)
            if not left.responses:
                continue
            counts["tokens"] += sum(len(old.ids) - len(new.ids) for old, new in zip(rendered, cut, strict=True))
            if way == "truncate_prompt_start" and self._loses_turn(group, rendered[0], cut[0]):
                counts["last_turn"] += 1
                if way == self.too_long:
                    what = "cut to max_length at its start, the prompt loses its last question, or the beginning of it"
                    self._problems.note("last_turn_cut", what, file, row)

    def _loses_turn(self, group: Group, old: Rendered, new: Rendered) -> bool:
        before = last_turn(group.prompt)
        if before is None:
            return False
        text = self._speaker.text(before, group, generation_prompt=False) if before else ""
        return len(old.ids) - len(new.ids) > (len(self._speaker.ids([text], before)[0]) if text else 0)

    def _measure(self, group: Group, rendered: Sequence[Rendered], kept: bool) -> None:
        prompt = key(group.prompt)
        for sequence in rendered:
            self._group += prompt
            self._response += key(group.responses[sequence.response].content)
            self._start.append(sequence.start)
            self._length.append(len(sequence.ids))
            self._row.append(self._rows)
            self._kept.append(kept)
        self._rows += 1

    # -- what came of it ----------------------------------------------------------------------------------------------

    def problems(self) -> list[Finding]:
        """Of templates and tokens, one of each kind."""
        return self._problems.findings()

    def summary(self) -> dict[str, Any]:
        """Quantiles of tokens in `prompt`, `response` and `row` (its longest response under its prompt); tokens of an epoch
        with a prompt for every response (`one_by_one`), with each prompt once (`shared`), and the share `saved`; `max_length`,
        rows `over` it, and what each way of fitting them in costs (`cut`)."""
        if not self._rows:
            return {"max_length": self.limit, "over": 0, "rows": 0}
        start, length, row = (np.array(values, np.int64) for values in (self._start, self._length, self._row))
        longest = np.maximum.reduceat(length, np.flatnonzero(np.diff(row, prepend=-1)))
        groups, alone = self._by_group()
        return {
            "rows": self._rows,
            "prompt": _quantiles(start),
            "response": _quantiles(length - start),
            "row": _quantiles(longest),
            "one_by_one": alone,
            "shared": int(groups.sum()),
            "saved": 1 - int(groups.sum()) / alone if alone else 0.0,
            "max_length": self.limit,
            "over": self._over,
            "cut": {way: dict(counts) for way, counts in self._cut.items()} if self._over else {},
            "drawn": self.drawn,
        }

    def steps(self, batch_size: int) -> tuple[int, int, int]:
        """(steps of an epoch, tokens of its largest step, of its largest pair of answers in one row), with each prompt once and
        groups in random order."""
        groups, _ = self._by_group()
        if not len(groups):
            return 0, 0, 0
        kept = self._kept_mask()
        start, length, row = (np.array(values, np.int64)[kept] for values in (self._start, self._length, self._row))
        _, first = np.unique(row, return_index=True)
        by_length = np.lexsort((start - length, row))  # of each row the longest answer first
        answer, of_row = (length - start)[by_length], row[by_length]
        next_one = np.append(np.where(of_row[1:] == of_row[:-1], answer[1:], 0), 0)
        largest = start[by_length] + answer + next_one
        order = np.random.default_rng(0).permutation(len(groups))
        a_step = max(1, round(batch_size * len(groups) / len(first)))
        sums = np.add.reduceat(groups[order], np.arange(0, len(groups), a_step))
        return -(-len(first) // batch_size), int(sums.max()), int(largest.max())

    def _kept_mask(self) -> Bools:
        return np.frombuffer(bytes(self._kept), np.uint8) > 0

    def _by_group(self) -> tuple[Ints, int]:
        """(tokens of each prompt once with its distinct responses under it, tokens of all of them one by one)."""
        kept = self._kept_mask()
        group, response = (np.frombuffer(bytes(held), np.uint64)[kept] for held in (self._group, self._response))
        _, first = np.unique(mix(group, response), return_index=True)
        start, length = (np.array(values, np.int64)[kept][first] for values in (self._start, self._length))
        _, at, place = np.unique(group[first], return_index=True, return_inverse=True)
        own = np.bincount(place, length - start, len(at)).astype(np.int64)
        return start[at] + own, int(length.sum())


def spelled(sequence: Rendered, tokenizer: Any) -> list[tuple[str, bool]]:
    """The tokens of a response under its prompt, each with whether it is trained on."""
    trained = [False] * sequence.start + list(sequence.mask or [True] * (len(sequence.ids) - sequence.start))
    return list(zip(map(str, tokenizer.convert_ids_to_tokens(list(sequence.ids))), trained, strict=True))


def _rows_of(findings: Iterable[Finding]) -> set[tuple[str, int | None]]:
    return {(found.file, found.row) for found in findings if found.severity == "error"}


def _quantiles(values: Ints) -> dict[str, int]:
    return {name: int(np.quantile(values, share, method="higher")) for name, share in QUANTILES.items()}
