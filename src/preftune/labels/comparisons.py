"""From votes to Comparisons: one probability for each pair, with its weight and the votes it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np

from preftune.errors import Refusal, nearest
from preftune.labels.bradley_terry import bradley_terry
from preftune.labels.dawid_skene import dawid_skene
from preftune.labels.labels import Labels, majority
from preftune.labels.votes import Votes
from preftune.records import By, Choice, Comparison, Group, Mark, Vote

METHODS: Mapping[str, Callable[[Votes], Labels]] = {
    "majority": majority,
    "dawid_skene": lambda votes: dawid_skene(votes).labels,
    "bradley_terry": lambda votes: bradley_terry(votes).labels,
}

_CHOICE_OF: Mapping[float, Choice] = {1.0: "a", 0.5: "tie", 0.0: "b"}
_TURNED: Mapping[Any, Any] = {"a": "b", "tie": "tie", "b": "a", "": ""}


@dataclass(frozen=True, slots=True)
class Label:
    """What becomes of one item: the probability that a is better, the weight, and who said so."""

    item: str
    preference: float
    weight: float
    by: By


def labelled(votes: Votes, method: str = "majority") -> list[Label]:
    """The label of each item that has votes, in order of the items.

    Several votes become one label `by` the method, which holds them. Where all votes that tell about an item are one
    annotator's, there is nothing to learn how good it is from: the label is the share of its votes under every method, and
    that of a single vote is the vote, `by` its own annotator, with its own weight.

    Raises:
        Refusal: an unknown method.
    """
    name = check_name(method)
    labels, shares = METHODS[name](votes), majority(votes)
    preference = np.where(labels.alone, shares.preference, labels.preference).tolist()
    weight = np.where(labels.alone, shares.weight, labels.weight).tolist()
    given: list[list[Vote]] = [[] for _ in votes.items]
    for vote, item in zip(votes.records, votes.item.tolist(), strict=True):
        given[item].append(vote)
    found: list[Label] = []
    for n, mine in enumerate(given):
        if labels.alone[n] and len(mine) == 1:
            by = mine[0].by
        else:
            by = By("majority" if labels.alone[n] else name, kind="rule", votes=tuple(mine))
        if mine:
            found.append(Label(votes.items[n], preference[n], weight[n], by))
    return found


def merged(groups: Sequence[Group], method: str = "majority", votes: Votes | None = None) -> list[Group]:
    """The groups with one Comparison for each pair that several votes judged, where the first of them stood.

    A vote is a Comparison whose preference is 1, 0.5 or 0. Other marks stay as they are, and so does a single vote on what its
    annotator alone judged.

    Args:
        votes: `votes_of(groups)`, where it is there already.

    Raises:
        Refusal: an unknown method.
    """
    labels = {label.item: label for label in labelled(votes_of(groups) if votes is None else votes, method)}
    return [replace(group, marks=tuple(_joined(group, labels))) for group in groups]


def votes_of(groups: Iterable[Group]) -> Votes:
    """The votes among the marks of groups. An item is a group's id and the indices of two responses, the smaller first."""
    votes: list[Vote] = []
    answers: dict[str, tuple[str, str]] = {}
    for group in groups:
        name = group.id
        for mark in filter(_is_vote, group.marks):
            item = _item(name, mark)
            choice, by = _CHOICE_OF[mark.preference], mark.by or By()
            if mark.a > mark.b:
                choice, by = _TURNED[choice], replace(by, side=_TURNED[by.side])
            votes.append(Vote(item, choice, by, mark.weight, mark.origin))
            low, high = sorted(mark.responses)
            answers[item] = f"{name} {low}", f"{name} {high}"
    return Votes.of(votes, answers)


def check_name(method: str) -> str:
    """The canonical name of a way from votes to labels; refused where it is not known."""
    name = method.replace("-", "_").lower()
    if name in METHODS:
        return name
    known = ", ".join(METHODS)
    raise Refusal(
        f"{method!r} is no way to labels; known: {known}.{nearest(name, METHODS)}", code="bad_value", key="data.votes"
    )


def _joined(group: Group, labels: Mapping[str, Label]) -> Iterator[Mark]:
    name, done = group.id, set[str]()
    for mark in group.marks:
        if not _is_vote(mark):
            yield mark
            continue
        item = _item(name, mark)
        label = labels[item]
        if not label.by.votes:
            yield mark
        elif item not in done:
            done.add(item)
            preference = label.preference if mark.a < mark.b else 1 - label.preference
            yield replace(mark, preference=preference, weight=label.weight, by=label.by)


def _is_vote(mark: Mark) -> TypeGuard[Comparison]:
    if not isinstance(mark, Comparison) or mark.preference not in _CHOICE_OF:
        return False
    return mark.weight > 0 and mark.a != mark.b and not (mark.by and mark.by.votes)  # a label is no vote


def _item(group: str, mark: Comparison) -> str:
    low, high = sorted(mark.responses)
    return f"{group} {low} {high}"
