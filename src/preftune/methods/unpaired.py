"""Methods of ratings: one answer at a time, desirable or not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor

from preftune import losses
from preftune.data.render import Batch, Rendered
from preftune.methods.pairs import Loss, taken
from preftune.records import Group, Rating, digest
from preftune.scoring.head import Kind
from preftune.training.method import Example, ExampleScores, Render

log = logging.getLogger("preftune")

Place = tuple[int, int]  # a group and a response of it


class Unpaired:
    """A loss of ratings. One that takes a baseline is given `losses.kto_baseline` of a mismatched answer for each rating: the
    answer of another prompt, under this one.

    Which answer stands under which prompt follows from their contents alone: it is the same in every epoch, whatever the seed,
    order and batch size are, so that its reference values are scored once and kept. A baseline is the mean over all ratings of
    a step, however that is cut.
    """

    examples_are = "ratings"
    head: Kind = "logp"
    width = 1
    needs_reference = True

    def __init__(self, name: str, loss: Loss, *, beta: float | None, hyperparameters: Mapping[str, float]) -> None:
        assert beta is not None
        self.name, self.beta = name, beta
        self.given = {"beta": beta, **hyperparameters}
        self.function, self.takes = loss, set(signature(loss).parameters)
        self.separable = name not in losses.COUPLED
        self.baseline = _baseline if "baseline" in self.takes else None

    def rows(self, batch: Batch, render: Render) -> Batch:
        if self.baseline is None:
            return batch
        found = partners(batch.groups)
        if not found and (count := len(rated(batch.groups))):
            log.warning(f"{self.name}: {count:,} ratings of one prompt: no answer is mismatched, and the baseline is 0")
        longest = max((len(s.ids) for s in batch.sequences), default=0)
        extra: dict[int, list[Rendered]] = {}
        for own, other in found.items():
            prompt, answer = (batch.sequences[batch.index(*place)] for place in (own, other))
            extra.setdefault(own[0], []).append(mismatched(prompt, answer, longest))
        return batch.beside(extra)

    def roles(self, example: Example) -> list[str]:
        return ["desirable" if example.preference > 0.5 else "undesirable"]

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        free = {n: len(group.responses) for n, group in enumerate(groups)}
        row: dict[Place, int] = {}
        for place in partners(groups) if self.baseline else ():
            row[place] = free[place[0]]
            free[place[0]] += 1
        return [
            Example(n, (mark.response,), float(mark.desirable), mark.weight, mark.origin, beside=beside, mark=m)
            for (n, m, mark) in rated(groups)
            for beside in [(row[n, mark.response],) if (n, mark.response) in row else ()]
        ]

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        return example.weight

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        assert scored.reference_logp is not None
        response, desirable = scored.index[:, 0], scored.preference > 0.5
        found = {
            "policy_logp": scored.policy_logp,
            "reference_logp": scored.reference_logp,
            "response": response,
            "desirable": desirable,
            "weight": scored.weight,
            "baseline": scored.baseline,
            **self.given,
        }
        return self.function(**taken(found, self.takes)), self._metrics(scored, response, desirable)

    def _metrics(self, scored: ExampleScores, response: Tensor, desirable: Tensor) -> dict[str, Tensor]:
        """As of pairs, with the desirable answers as chosen and the others as rejected."""
        assert scored.reference_logp is not None
        policy_logp = scored.policy_logp.detach()
        sides = {
            "reward": losses.rewards(policy_logp, scored.reference_logp, self.beta),
            "logp": policy_logp,
            "log_ratio": policy_logp - scored.reference_logp,
            "length": scored.length,
        }
        metrics = {} if scored.baseline is None else {"baseline": scored.baseline.to(policy_logp).expand(len(response))}
        for name, values in sides.items():
            metrics[f"{name}/chosen"] = torch.where(desirable, values[response], torch.nan)
            metrics[f"{name}/rejected"] = torch.where(desirable, torch.nan, values[response])
        return metrics


def _baseline(log_ratios: Tensor) -> Tensor:
    return losses.kto_baseline(log_ratios) if len(log_ratios) else log_ratios.new_zeros(())


def rated(groups: Sequence[Group]) -> list[tuple[int, int, Rating]]:
    """(group, number of the mark, rating) of each that asks for something."""
    return [
        (n, m, mark)
        for n, group in enumerate(groups)
        for m, mark in enumerate(group.marks)
        if isinstance(mark, Rating) and mark.weight > 0
    ]


def partners(groups: Sequence[Group]) -> dict[Place, Place]:
    """For each rated answer one of another prompt: the next in the order of their digests. Nothing for a single prompt."""
    places = {(n, mark.response) for n, _, mark in rated(groups)}
    if len({n for n, _ in places}) < 2:
        return {}
    ids = {n: groups[n].id for n, _ in places}
    order = sorted(places, key=lambda place: (digest(f"{ids[place[0]]} {groups[place[0]].responses[place[1]].id}"), place))
    found: dict[Place, Place] = {}
    after = order[0]
    for place in [*order[::-1], *order[::-1]]:  # twice: what comes after the last is the first
        if after[0] == place[0]:
            after = found.get(after, after)
        found[place] = after
        after = place
    return {place: found[place] for place in sorted(places)}


def mismatched(own: Rendered, other: Rendered, longest: int) -> Rendered:
    """The prompt of `own` with the answer of `other` under it, cut where no row of the data goes on."""
    end = other.start + min(len(other.ids) - other.start, longest - own.start)
    moved = own.start - other.start
    mask = None if other.mask is None else other.mask[: end - other.start]
    if mask is not None and not any(mask):
        mask = None  # what it scores was cut off: the rest of it will do
    of_prompt = tuple(a for a in own.attachments if a[0] < own.start)
    of_answer = tuple((place + moved, digest) for place, digest in other.attachments if other.start <= place < end)
    return replace(own, ids=own.ids[: own.start] + other.ids[other.start : end], mask=mask, attachments=of_prompt + of_answer)
