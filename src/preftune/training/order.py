"""Which examples an epoch takes, and in which order: groups together, sources by their shares, by margin where asked."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

from preftune.data.options import Source
from preftune.errors import Refusal
from preftune.training.options import Curriculum

if TYPE_CHECKING:
    from preftune.training.method import Example


@dataclass(frozen=True, slots=True)
class Mixing:
    """paths: of the sources, as their users wrote them. weights: of each, greater than 0."""

    paths: tuple[str, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, sources: Sequence[Source]) -> Self | None:
        """None where the sources have no weights: all examples of all of them are an epoch then."""
        weights = tuple(source.weight for source in sources if source.weight is not None)
        return cls(tuple(str(Path(source.path)) for source in sources), weights) if weights else None

    def parts(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The examples of each source."""
        found: list[list[Example]] = [[] for _ in self.paths]
        place: dict[str, int] = {}
        for example in examples:
            assert example.origin is not None, "weights are of sources, whose judgements know where they stood"
            file = example.origin.file
            if file not in place:
                own = (str(Path(file)), str(Path(file).parent))  # a file, or one in a folder
                place[file] = next(self.paths.index(path) for path in own if path in self.paths)
            found[place[file]].append(example)
        return found

    def expected(self, sizes: Sequence[int]) -> list[float]:
        """Examples of each source in an epoch, in expectation: its share of as many as there are. Of a source without examples
        the others have the share."""
        shares = [weight if size else 0.0 for weight, size in zip(self.weights, sizes, strict=True)]
        return [sum(sizes) * share / sum(shares) for share in shares]

    def said(self, examples: Sequence[Example]) -> str:
        sizes = list(map(len, self.parts(examples)))
        found = zip(self.paths, self.expected(sizes), sizes, strict=True)
        named = (f"{path} {n / sum(sizes):.1%} ({n / size if size else 0:.2g} times its {size:,})" for path, n, size in found)
        return f"of each epoch of {sum(sizes):,} examples: {', '.join(named)}"


def ordered(
    examples: Sequence[Example], seed: int, *, mixing: Mixing | None = None, curriculum: Curriculum | None = None
) -> Iterator[list[Example]]:
    """The examples of each epoch in their order, without end.

    Groups are shuffled by (seed, epoch), and the examples within a group too. With `mixing` an epoch has as many examples as
    there are, of each source its share in expectation; each source is gone through in an order of its own, from where the epoch
    before had come to, and from the start again when it is through. With `curriculum` the groups are then put in order of their
    mean margin, and the examples within them too; equal ones stay as they were shuffled.
    """
    clear = margins(examples)[0] if curriculum else None
    parts = mixing.parts(examples) if mixing else []
    passes = [_Passes(part, f"{seed}/{n}") for n, part in enumerate(parts)]
    for epoch in count():
        order = random.Random(f"{seed}/{epoch}")  # a string seed is hashed the same way on every machine
        if mixing is None:
            found = blocks(examples, order)
        else:
            drawn = systematic(mixing.expected(list(map(len, parts))), order.random())
            found = [block for source, n in zip(passes, drawn, strict=True) for block in source.take(n)]
            order.shuffle(found)
        if clear is not None:
            found = _sorted(found, clear, descending=curriculum == "easy_first")
        yield list(chain.from_iterable(found))


def blocks(examples: Sequence[Example], order: random.Random) -> list[list[Example]]:
    """The examples by group, both shuffled."""
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    found = list(groups.values())
    order.shuffle(found)
    for block in found:
        order.shuffle(block)
    return found


class _Passes:
    """One source, gone through again and again, each time in another order."""

    def __init__(self, examples: Sequence[Example], name: str) -> None:
        self.blocks = (block for n in count() for block in blocks(examples, random.Random(f"{name}/{n}")))
        self.rest: list[Example] = []

    def take(self, number: int) -> Iterator[list[Example]]:
        """The next examples, by group; of a group that is cut the rest comes next time."""
        while number > 0:
            block = self.rest or next(self.blocks)
            self.rest = block[number:]
            number -= len(block)
            yield block[: len(block) - len(self.rest)]


def systematic(expected: Sequence[float], start: float) -> list[int]:
    """Whole numbers with these expectations over `start`, uniform in [0, 1), whose sum is theirs, a whole number: the parts of
    a line that the points start, start + 1, ... fall on."""
    ends = [0.0, *accumulate(expected)]
    ends[-1] = round(ends[-1])  # whatever rounding left of it
    return [math.ceil(high - start) - math.ceil(low - start) for low, high in pairwise(ends)]


def margins(examples: Sequence[Example]) -> tuple[Callable[[Example], float], str]:
    """(how clear a comparison is, what that is called): the strength of the judgement where every one that is no tie has one,
    otherwise how far the probability is from a tie, |2 p - 1|. A tie is 0."""
    decided = [e for e in examples if e.preference != 0.5]
    if decided and all(e.strength for e in decided):
        return lambda e: e.strength if e.preference != 0.5 else 0.0, "strength"
    return lambda e: abs(2 * e.preference - 1), "certainty"


def check_curriculum(curriculum: Curriculum, examples: Sequence[Example]) -> str:
    """One line on the order that is taken.

    Raises:
        Refusal: all comparisons are equally clear.
    """
    clear, name = margins(examples)
    found = [clear(e) for e in examples]
    low, high = min(found), max(found)
    if low == high:
        what = (
            f"all comparisons have the same {name}, {low:g}: columns strength or preference, or data.votes, would give an order"
        )
        raise Refusal(what, code="no_order", key="train.curriculum")
    first, last = (high, low) if curriculum == "easy_first" else (low, high)
    return f"curriculum: by {name}, from {first:.3g} to {last:.3g}"


def _sorted(found: Sequence[list[Example]], clear: Callable[[Example], float], *, descending: bool) -> list[list[Example]]:
    sign = -1 if descending else 1
    inside = [sorted(block, key=lambda e: sign * clear(e)) for block in found]
    return sorted(inside, key=lambda block: sign * sum(map(clear, block)) / len(block))
