"""What answers and prompts say, counted row by row: refusals, set phrases, how answers begin, words of prompts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Any, Literal

from preftune.checks.codes import finding
from preftune.records import Comparison, Content, Finding, Mark, Ranking, Rating
from preftune.report.words import percent

Side = Literal["better", "worse", "other"]
HEAD, BODY = 200, 20_000  # characters that are looked at: for a refusal, and for everything else
CAPACITY = 50_000  # different words, or beginnings, that are counted at a time
SHOWN = 20
ALL, SOME = 20_000, 10  # prompts whose words are counted: so many from the start, then one of ten
MANY = 0.05  # of the answers
APART = 0.02  # between the shares of both sides

# English alone: what other languages say is not counted
_HINTS = ("sorry", "can't", "can’t", "cannot", "unable", "not able", "won't", "won’t", "not comfortable", "as an ai", "apologi")
_NOT = r"\b(?:can['’]?t|cannot|can not|unable|not able|won['’]?t|will not|not comfortable)\b"
_DONE = r"(?:help|assist|do|provide|answer|give|tell|support|comply|create|write|fulfil)"
_REFUSAL = re.compile(
    r"\W*(?:(?:well|hmm?|oh|no|um+|uh+)\W+)*(?:"
    rf"i(?:['’]?m| am) (?:very |so |really |truly )?(?:sorry|afraid)\b.{{0,60}}?{_NOT}"
    rf"|(?:sorry|i apologi[sz]e|apologies)\b.{{0,40}}?\b(?:i|we)\b.{{0,20}}?{_NOT}"
    rf"|i (?:can['’]?t|cannot|can not|won['’]?t|will not) {_DONE}"
    r"|i(?:['’]m| am) (?:unable|not able|not comfortable|not going)\b"
    rf"|as an ai\b.{{0,80}}?(?:{_NOT}|\bdo(?:n['’]?t| not)\b)"
    r")"
)
PHRASES = (
    "as an ai", "i hope this helps", "let me know if", "is there anything else", "feel free to", "it's important to note",
    "it is important to note", "great question", "certainly!", "i'd be happy to", "in conclusion", "happy to help",
)  # fmt: skip
_PUNCTUATION = str.maketrans(dict.fromkeys(".,;:!?()[]{}<>\"“”«»‘’'`*_/\\|#=+-–—~…", " "))
# the commonest words, which say nothing of a topic
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "about above after again also assistant because been before being below between both cannot could does doing down "
        "during each even every following from further give going good have having here hers herself himself human into itself "
        "just know like make many more most much myself need only other over please really same should some such tell than "
        "that their them then there these they think this those through under until used using very want well were what when "
        "where which while will with would write your yours yourself",
    )
)


class Frequent:
    """The most frequent of any number of things, in bounded memory: counts that are small are forgotten now and then.

    What is counted at the end is at most `lost` too low (lossy counting; Manku and Motwani 2002).
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.counts: Counter[str] = Counter()
        self.lost = 0
        self._capacity = capacity

    def add(self, things: Iterable[str]) -> None:
        """Each of them once."""
        self.counts.update(things)
        if len(self.counts) > self._capacity:
            self._forget()

    def one(self, thing: str) -> None:
        self.counts[thing] += 1
        if len(self.counts) > self._capacity:
            self._forget()

    def _forget(self) -> None:
        while len(self.counts) > self._capacity:
            self.lost += 1
            self.counts = Counter({thing: n - 1 for thing, n in self.counts.items() if n > 1})

    def most(self, number: int = SHOWN, but: Callable[[str], bool] = lambda thing: False) -> list[tuple[str, int]]:
        """(thing, count), the most frequent first; of equally frequent ones by the alphabet."""
        left = ((thing, count) for thing, count in self.counts.items() if not but(thing))
        return nsmallest(number, left, key=lambda item: (-item[1], item[0]))


@dataclass
class _Answers:
    """Of one side."""

    answers: int = 0
    refusals: int = 0
    phrases: Counter[str] = field(default_factory=Counter[str])
    beginnings: Frequent = field(default_factory=Frequent)


class Texts:
    """Counts over all texts; of conversations the last message."""

    def __init__(self) -> None:
        self.sides: dict[Side, _Answers] = {"better": _Answers(), "worse": _Answers(), "other": _Answers()}
        self.words = Frequent()
        self.prompts = self._seen = 0

    def prompt(self, content: Content) -> None:
        self._seen += 1
        if self._seen > ALL and self._seen % SOME:
            return
        said = (content if isinstance(content, str) else content[-1].content if content else "")[-BODY:].lower()
        if said:
            self.prompts += 1
            self.words.add(set(said.translate(_PUNCTUATION).split()))

    def answer(self, content: Content, side: Side) -> None:
        found = self.sides[side]
        found.answers += 1
        said = (content if isinstance(content, str) else content[-1].content if content else "")[:BODY].lower()
        found.refusals += refuses(said)
        for phrase in [phrase for phrase in PHRASES if phrase in said]:
            found.phrases[phrase] += 1
        found.beginnings.one(" ".join(said[:80].split(None, 3)[:3]))

    def summary(self) -> dict[str, Any]:
        """`answers, refusals, phrases, beginnings` of each side that has answers, and `words` of so many `prompts`: shares."""
        sides = {name: side for name, side in self.sides.items() if side.answers}
        phrases = {p: {name: side.phrases[p] / side.answers for name, side in sides.items()} for p in PHRASES}
        begun = Frequent()
        for side in sides.values():
            begun.counts.update(side.beginnings.counts)
        first = [text for text, _ in begun.most(10)]
        return {
            "answers": {name: side.answers for name, side in sides.items()},
            "refusals": {name: side.refusals / side.answers for name, side in sides.items()},
            "phrases": {p: shares for p, shares in phrases.items() if any(shares.values())},
            "beginnings": {
                text: {name: side.beginnings.counts[text] / side.answers for name, side in sides.items()} for text in first
            },
            "words": {word: count / self.prompts for word, count in self.words.most(12, but=_says_nothing)},
            "prompts": self.prompts,
        }

    def findings(self, said: Mapping[str, Any]) -> list[Finding]:
        """Of a summary."""
        found: list[Finding] = []
        refusals = said["refusals"]
        if any(share >= MANY for share in refusals.values()):
            what = f"{_shares(refusals)} refuse to answer, as far as English words tell: {_more_or_less(refusals)}"
            found.append(finding("refusals", what))
        for phrase, shares in said["phrases"].items():
            if _apart(shares, said["answers"]):
                what = f"{phrase!r} stands in {_shares(shares)}: the labels may prefer the phrase, or its absence"
                found.append(finding("boilerplate", what))
        return found


def _says_nothing(word: str) -> bool:
    return len(word) < 4 or word in _COMMON or not word.isalpha()


def refuses(lowered: str) -> bool:
    """Whether an answer, in small letters, begins by refusing."""
    head = lowered[:HEAD]
    return any([hint in head for hint in _HINTS]) and _REFUSAL.match(head) is not None


def _shares(shares: dict[str, float]) -> str:
    names = {"better": "better answers", "worse": "worse ones" if "better" in shares else "worse answers"}
    names["other"] = "others" if len(shares) > 1 else "answers"
    *first, last = [f"{percent(share)} of the {names[name]}" for name, share in shares.items()]
    return " and ".join(filter(None, [", ".join(first), last]))


def _apart(shares: Mapping[str, float], answers: Mapping[str, int]) -> bool:
    """Whether the shares of both sides differ, and by more than two standard errors: a few answers say nothing."""
    if "better" not in shares or "worse" not in shares:
        return False
    together = (shares["better"] * answers["better"] + shares["worse"] * answers["worse"]) / (
        answers["better"] + answers["worse"]
    )
    error = math.sqrt(together * (1 - together) * (1 / answers["better"] + 1 / answers["worse"]))
    return abs(shares["better"] - shares["worse"]) >= max(APART, 2 * error)


def _more_or_less(shares: dict[str, float]) -> str:
    if "better" not in shares or "worse" not in shares:
        return "training on them teaches to refuse"
    if abs(shares["better"] - shares["worse"]) < APART:
        return "as many on either side"
    return "training makes the model refuse " + ("more" if shares["better"] > shares["worse"] else "less")


def alike(first: Content, second: Content) -> bool:
    """Whether two answers that are not equal differ in case and spacing alone."""
    one, other = (c if isinstance(c, str) else c[-1].content if len(c) == 1 else "" for c in (first, second))
    if _bare(one[:40])[:10] != _bare(other[:40])[:10]:  # nearly all pairs
        return False
    return bool(bare := _bare(one)) and bare == _bare(other)


def _bare(text: str) -> str:
    return "".join(text.lower().split())


def sides(marks: Sequence[Mark], answers: int) -> list[Side]:
    """Which side each answer of a row is on: better or worse where the row says so, else other."""
    found: list[Side] = ["other"] * answers
    for mark in marks[:1]:
        if isinstance(mark, Comparison) and mark.preference != 0.5:
            better, worse, _ = mark.ordered
            found[better], found[worse] = "better", "worse"
        elif isinstance(mark, Ranking) and len(mark.tiers) > 1:
            for n, tier in enumerate(mark.tiers):
                for index in tier:
                    found[index] = "worse" if n else "better"
        elif isinstance(mark, Rating):
            found[mark.response] = "better" if mark.desirable else "worse"
    return found
