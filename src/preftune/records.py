"""The nouns: plain records that every room shares. No torch in here.

A Group is one prompt with its distinct responses, and the Marks are people's judgements of them. `chosen` and `rejected`
are not stored: they are derived from a Comparison at the last moment (`Comparison.ordered`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, Self

Severity = Literal["error", "warning", "info"]
Pairs = Literal["all", "best_vs_rest"]
Choice = Literal["a", "tie", "b"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `extra` keeps what a chat template may ask for (tool calls, name, reasoning)."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content, **self.extra}


# Plain text, or the turns of a conversation. A plain prompt goes with plain responses; conversations with messages.
Content = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a response was read: rows count records from 1."""

    file: str
    row: int
    column: str


@dataclass(frozen=True, slots=True)
class Response:
    """One answer. `origins` lists every place it was read from; `id` is a digest of its content.

    `finished` is False for a sample that a length limit cut: no end token belongs after it.
    """

    content: Content
    origins: tuple[Origin, ...] = ()
    finished: bool = True

    @property
    def id(self) -> str:
        return digest(self.content)


@dataclass(frozen=True, slots=True)
class By:
    """Who judged, and how: whatever the data says about it. Empty fields were not said.

    `side` is the response that stood first. `votes` are those that a judgement was made of, as they were given.
    """

    who: str = ""
    kind: Literal["person", "model", "rule", ""] = ""
    time: str = ""
    side: Literal["a", "b", ""] = ""
    strength: float | None = None
    reason: str = ""
    votes: tuple[Vote, ...] = ()


@dataclass(frozen=True, slots=True)
class Vote:
    """What one annotator said of one pair, the item: a is better, b is, or neither. Several of them make a Comparison."""

    item: str
    choice: Choice
    by: By = By()
    weight: float = 1.0
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """`preference` is the probability, in [0, 1], that response `a` is better than `b`; 0.5 is a tie."""

    a: int
    b: int
    preference: float = 1.0
    weight: float = 1.0
    by: By | None = None
    origin: Origin | None = None

    @property
    def ordered(self) -> tuple[int, int, float]:
        """(chosen, rejected, probability that chosen is better): the likelier winner first, ties as they stand."""
        if self.preference < 0.5:
            return self.b, self.a, 1.0 - self.preference
        return self.a, self.b, self.preference

    @property
    def responses(self) -> tuple[int, ...]:
        return self.a, self.b

    def pairs(self, which: Pairs = "all") -> tuple[Comparison, ...]:
        """Itself: as a Ranking gives its own."""
        return (self,)

    def moved(self, place: Callable[[int], int]) -> Self:
        """The same judgement where responses stand at other indices."""
        return replace(self, a=place(self.a), b=place(self.b))


@dataclass(frozen=True, slots=True)
class Ranking:
    """Several responses in order: `tiers`, best first; those of one tier tie."""

    tiers: tuple[tuple[int, ...], ...]
    weight: float = 1.0
    by: By | None = None
    origin: Origin | None = None

    @property
    def responses(self) -> tuple[int, ...]:
        return tuple(response for tier in self.tiers for response in tier)

    def moved(self, place: Callable[[int], int]) -> Self:
        return replace(self, tiers=tuple(tuple(map(place, tier)) for tier in self.tiers))

    def without(self, lost: Container[int]) -> Self | None:
        """What it says of its other responses; None where there are not two of them."""
        left = (tuple(response for response in tier if response not in lost) for tier in self.tiers)
        tiers = tuple(tier for tier in left if tier)
        return replace(self, tiers=tiers) if sum(map(len, tiers)) > 1 else None

    def pairs(self, which: Pairs = "all") -> tuple[Comparison, ...]:
        """The comparisons that the ranking says: of all its responses, or of the first tier with each of the others. Ties are
        0.5, and the weight is shared among them: a ranking counts as one judgement however long it is."""
        place = [(n, response) for n, tier in enumerate(self.tiers) for response in tier]
        found = [(a, b, i, j) for (i, a), (j, b) in combinations(place, 2) if which == "all" or i == 0 < j]
        weight = self.weight / max(1, len(found))
        return tuple(Comparison(a, b, 1.0 if i < j else 0.5, weight, self.by, self.origin) for a, b, i, j in found)


@dataclass(frozen=True, slots=True)
class Rating:
    """One response judged alone: desirable or not."""

    response: int
    desirable: bool
    weight: float = 1.0
    by: By | None = None
    origin: Origin | None = None

    @property
    def responses(self) -> tuple[int, ...]:
        return (self.response,)

    def moved(self, place: Callable[[int], int]) -> Self:
        return replace(self, response=place(self.response))


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response to imitate."""

    response: int
    weight: float = 1.0
    by: By | None = None
    origin: Origin | None = None

    @property
    def responses(self) -> tuple[int, ...]:
        return (self.response,)

    def moved(self, place: Callable[[int], int]) -> Self:
        return replace(self, response=place(self.response))


Mark = Comparison | Ranking | Rating | Demonstration


def origins(mark: Mark) -> tuple[Origin | None, ...]:
    """Where a judgement was read: in one place, or where each of the votes that it was made of stood."""
    votes = mark.by.votes if mark.by else ()
    return tuple(vote.origin for vote in votes) or (mark.origin,)


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its distinct responses, with the marks that judge them (by index into `responses`)."""

    prompt: Content
    responses: tuple[Response, ...] = ()
    marks: tuple[Mark, ...] = ()
    tools: tuple[Any, ...] = ()
    user_id: str = ""

    @property
    def id(self) -> str:
        """The user's id, or a digest of the prompt: the same across files, row order and machines."""
        return self.user_id or digest(self.prompt, self.tools)

    def restricted(self, marks: Iterable[Mark], responses: Sequence[int]) -> Self:
        """The group with these marks alone, and these responses (by index, in this order), among them all the marks need."""
        place = {old: new for new, old in enumerate(responses)}
        return replace(
            self,
            responses=tuple(self.responses[i] for i in responses),
            marks=tuple(mark.moved(place.__getitem__) for mark in marks),
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the data check has to say about one place. `error` rows are dropped, and counted."""

    code: str
    severity: Severity
    message: str
    file: str = ""
    row: int | None = None
    column: str | None = None

    def __str__(self) -> str:
        place = self.file + (f", row {self.row}" if self.row is not None else "")
        place += f", column {self.column}" if self.column else ""
        return f"{place}: {self.message}" if place else self.message


def digest(content: Content, tools: tuple[Any, ...] = ()) -> str:
    """20 hexadecimal digits (80 bits) of SHA-256 over the content's canonical JSON."""
    plain: Any = content if isinstance(content, str) else [m.as_dict() for m in content]
    text = json.dumps([plain, list(tools)] if tools else plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]
