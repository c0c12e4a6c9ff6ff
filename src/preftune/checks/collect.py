"""One pass over the rows: each is understood, counted into every check, and forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preftune.checks.balance import Balance
from preftune.checks.codes import finding
from preftune.checks.ledger import BLANK, Ledger, key, length
from preftune.checks.near import Near
from preftune.checks.texts import Texts, alike, sides
from preftune.data.faults import RowFault
from preftune.data.formats import Example, Score
from preftune.data.formats.battles import BATTLES
from preftune.data.formats.labelling import LABELLING
from preftune.data.formats.pairs import ASSISTANT, HUMAN
from preftune.data.grouping import Grouping, own_column
from preftune.data.read import Reading, take
from preftune.data.sources import Stream
from preftune.records import Content, Finding, Group, Mark, Origin, Response

if TYPE_CHECKING:
    from preftune.checks.tokens import Tokens

# formats whose columns do not say which answer is better
ORDERED = frozenset(format.name for format in (*BATTLES, *LABELLING))
WAITING = 200  # raw rows that may be read ahead of the one that is taken in: a format is recognised by the first hundred


class Collect:
    """Takes in rows as `data.read.take` understands them, in place of groups. Rows that hang on other rows (votes on an item,
    scores of one answer each) are grouped as digests."""

    def __init__(self, *, near: bool = False, columns: tuple[str, ...], tokens: Tokens | None = None) -> None:
        self.reading = Reading()
        self.ledger, self.texts, self.balance = Ledger(), Texts(), Balance(columns)
        self.near = Near() if near else None
        self.unread: list[tuple[int, int]] = []
        self.findings: list[Finding] = []
        self.tokens = tokens
        self.samples: dict[type[Mark], Group] = {}
        self.ordered: set[str] = set()
        self._grouping = Grouping()
        self._raw: dict[int, Mapping[str, Any]] = {}
        self._columns: Mapping[str, str] = {}
        self._scored: dict[tuple[str, int], int] = {}
        self._items: dict[str, bytes] = {}
        self._groups = 0

    def read(self, stream: Stream) -> None:
        """All rows of a stream."""
        self._columns, self._raw = stream.columns, {}
        stream.rows = self._watched(stream.rows)  # in place: a filter counts on the stream what it leaves out
        take(stream, self, self.reading)
        self._before(None)
        if self.reading.sources[-1]["format"] in ORDERED:
            self.ordered.add(stream.name)

    def _watched(self, rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """The rows as they pass, kept until they are taken in: what a format does not read of them is counted, too."""
        for number, row in rows:
            if isinstance(row, dict):
                self._raw[number] = row
                if len(self._raw) > WAITING:
                    self._fell_away(next(iter(self._raw)))
            yield number, row

    def _before(self, number: int | None) -> None:
        """Rows before this one were not taken in: they are dropped."""
        while self._raw and (first := next(iter(self._raw))) != number:
            self._fell_away(first)

    def _fell_away(self, number: int) -> None:
        if sizes := _lengths(self._raw.pop(number), self._columns):
            self.unread.append(sizes)

    # -- what `take` asks for -----------------------------------------------------------------------------------------

    def add(self, example: Example, *, file: str, row: int, columns: Mapping[str, str]) -> None:
        hangs = example.prompt is None or example.id or any(isinstance(mark, Score) for mark in example.marks)
        if hangs:
            self._grouping.add(_digested(example), file=file, row=row, columns=columns)
        self._before(row)
        raw = self._raw.pop(row, None)
        place = self._enter(example, file, row)
        if hangs:
            self._scored[file, row] = place
        if raw is not None:
            self.balance.add(raw)
        if example.prompt is None:
            return
        self._read_texts(example, file, row, columns)
        if self.near:
            said = [example.prompt, *(content for content, _ in example.answers)]
            self.near.add(place, "\n".join(map(_text, said)))
        kind = type(example.marks[0]) if example.marks else Score
        if self.tokens or (kind is not Score and kind not in self.samples):
            self._keep(group_of(example, file, row, columns), file, row, place)

    def add_group(self, group: Group) -> None:
        """A group made in Python counts as one row, wherever its judgements come from."""
        self._groups += 1
        answers = [(response.content, "") for response in group.responses]
        self.add(
            Example(group.prompt, answers, group.marks, group.tools, group.user_id), file="groups", row=self._groups, columns={}
        )

    def rank_scores(self) -> Iterator[tuple[Origin, RowFault] | int]:
        if self.tokens:
            self._dropped_later(self.tokens.flush())
        for joined in self._grouping.rank_scores():
            if not isinstance(joined, int):
                origin, _ = joined
                self.ledger.drop(self._scored[origin.file, origin.row])
            yield joined

    # -- into the checks ----------------------------------------------------------------------------------------------

    def _enter(self, example: Example, file: str, row: int) -> int:
        """The row into the ledger."""
        ledger = self.ledger
        if example.prompt is None:
            place = ledger.row(ledger.file(file), row, BLANK, self._items[example.id])
            ledger.unjudged(place, key(repr(example.marks)))  # the votes themselves follow at the end, with their answers
            return place
        prompt = group = key(example.prompt)
        if example.tools or example.id:
            prompt = key(f"{prompt.hex()}{example.tools}") if example.tools else prompt
            group = key(f"{prompt.hex()}{example.id}")
            self._items[example.id] = group
        place = ledger.row(ledger.file(file), row, prompt, group)
        answers = [key(content) for content, _ in example.answers]
        sizes = [length(content) for content, _ in example.answers]
        for mark in example.marks:
            ledger.judged(place, mark, answers, sizes)
        if not example.marks:
            ledger.unjudged(place, key(b"".join(sorted(answers)).hex()))
        return place

    def _read_texts(self, example: Example, file: str, row: int, columns: Mapping[str, str]) -> None:
        assert example.prompt is not None
        self.texts.prompt(example.prompt)
        marks = [mark for mark in example.marks if not isinstance(mark, Score)]
        for (content, _), side in zip(example.answers, sides(marks, len(example.answers)), strict=True):
            self.texts.answer(content, side)
        if len(example.answers) == 2 and alike(example.answers[0][0], example.answers[1][0]):
            column = own_column(example.answers[1][1], columns) or None
            what = "differs from the other answer in case and spacing alone: remove the row unless that is what it teaches"
            self.findings.append(finding("answers_alike", what, file, row, column=column))

    def _keep(self, group: Group, file: str, row: int, place: int) -> None:
        for mark in group.marks:
            self.samples.setdefault(type(mark), group)
        if self.tokens:
            self._dropped_later(self.tokens.add(group, file, row, place))

    def _dropped_later(self, places: Iterable[int]) -> None:
        for place in places:
            self.ledger.drop(place)

    def finish(self) -> None:
        """Judgements that were made of several rows stand in the ledger at the first of them."""
        for group in self._grouping.groups():
            digests = [_undigested(response) for response in group.responses]
            answers, sizes = [digest for digest, _ in digests], [size for _, size in digests]
            for mark in group.marks:
                if mark.origin is not None:
                    place = self._scored[mark.origin.file, mark.origin.row]
                    self.ledger.judged(place, mark, answers, sizes, joined=True)


def ledger_of(groups: Iterable[Group]) -> Ledger:
    """Groups that are read already; their judgements stand where they came from."""
    ledger = Ledger()
    for n, group in enumerate(groups, start=1):
        prompt = key(group.prompt) if not group.tools else key(f"{key(group.prompt).hex()}{group.tools}")
        own = key(f"{prompt.hex()}{group.user_id}") if group.user_id else prompt
        answers = [key(response.content) for response in group.responses]
        sizes = [length(response.content) for response in group.responses]
        at, place = None, 0
        for mark in group.marks:
            where = (mark.origin.file, mark.origin.row) if mark.origin else ("groups", n)
            if where != at:
                at, place = where, ledger.row(ledger.file(where[0]), where[1], prompt, own)
            ledger.judged(place, mark, answers, sizes)
    return ledger


def group_of(example: Example, file: str, row: int, columns: Mapping[str, str]) -> Group:
    """One row as a group of its own."""
    assert example.prompt is not None
    places = [Origin(file, row, own_column(column, columns)) for _, column in example.answers]
    responses = tuple(Response(content, (at,)) for (content, _), at in zip(example.answers, places, strict=True))
    marks = tuple(replace(mark, origin=places[0]) for mark in example.marks if not isinstance(mark, Score))
    return Group(example.prompt, responses, marks, example.tools, example.id)


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(message.content for message in content)


def _digested(example: Example) -> Example:
    """The same with digests (and sizes) for texts, and only those judgements that wait for other rows."""
    prompt = None if example.prompt is None else key(example.prompt).hex()
    answers = [(f"{key(content).hex()}{length(content)}", column) for content, column in example.answers]
    marks = [mark for mark in example.marks if prompt is None or isinstance(mark, Score)]
    return Example(prompt, list(answers), marks, example.tools, example.id)


def _undigested(response: Response) -> tuple[bytes, int]:
    assert isinstance(response.content, str)
    return bytes.fromhex(response.content[:16]), int(response.content[16:])


def _lengths(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[int, int] | None:
    """Characters of the better and the worse answer of a pair that cannot be used, where both are texts."""
    better, worse = (row.get(columns.get(name, name)) for name in ("chosen", "rejected"))
    if not isinstance(better, str) or not isinstance(worse, str) or row.get("preference") is not None:
        return None
    if better.startswith(HUMAN) and worse.startswith(HUMAN):
        better, worse = (said[said.rfind(ASSISTANT) + len(ASSISTANT) :] for said in (better, worse))
    return len(better), len(worse)
