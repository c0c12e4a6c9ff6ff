"""Methods of rankings: several answers in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product

import torch
from torch import Tensor

from preftune import losses
from preftune.data.render import Batch
from preftune.errors import Refusal
from preftune.methods.pairs import pair_metrics
from preftune.methods.reward import reward_metrics
from preftune.records import Comparison, Group, Ranking
from preftune.scoring.head import Kind
from preftune.training.method import Example, ExampleScores, Render, padded

MOST_ORDERS = 120


class Listwise:
    """Plackett-Luce: an example is a ranking, or a comparison as a ranking of two. Of log-ratios times beta; with
    head="scalar", of a reward model's numbers.

    A ranking with ties is the mean over the strict orders that it leaves open: they stand one after the other among the
    example's responses. A soft label is the expectation over the label.
    """

    examples_are = "rankings"
    width = 0  # as many as the longest ranking has
    baseline = None
    separable = True

    def __init__(self, name: str, *, beta: float | None, head: Kind = "logp") -> None:
        assert (beta is None) == (head == "scalar")
        self.name, self.beta = name, beta
        self.head: Kind = head
        self.needs_reference = head == "logp"

    def rows(self, batch: Batch, render: Render) -> Batch:
        return batch

    def roles(self, example: Example) -> list[str]:
        return [f"place {n}" for n in range(1, len(set(example.responses)) + 1)]

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        found: list[Example] = []
        for n, group in enumerate(groups):
            for m, mark in enumerate(group.marks):
                if isinstance(mark, Ranking | Comparison) and mark.weight > 0:
                    responses, preference = _in_order(mark)
                    found.append(Example(n, responses, preference, mark.weight, mark.origin, mark=m))
        return found

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        return example.weight

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        """Its metrics are those of the pair of a ranking's first answer and its last."""
        policy_logp, device = scored.policy_logp, scored.policy_logp.device
        orders: list[list[int]] = []
        shares: list[tuple[int, float]] = []  # of which example each order is, and how much of it
        ends: list[tuple[int, int]] = []
        for n, (row, p) in enumerate(zip(scored.index.tolist(), scored.preference.tolist(), strict=True)):
            given = [place for place in row if place >= 0]
            size = len(set(given))
            ends.append((given[0], given[size - 1]))
            for at in range(0, len(given), size):
                order = given[at : at + size]
                orders += [order, order[::-1]]
                shares += [(n, p * size / len(given)), (n, (1 - p) * size / len(given))]
        none = torch.zeros_like(policy_logp)
        reference_logp = none if scored.reference_logp is None else scored.reference_logp
        each = losses.plackett_luce(policy_logp, reference_logp, padded(orders, device), beta=self.beta or 1.0)
        example, share = (torch.tensor(column, device=device) for column in zip(*shares, strict=True))
        loss = torch.zeros_like(scored.weight).index_add(0, example, share * each)
        pairs = replace(scored, index=torch.tensor(ends, device=device))
        metrics = pair_metrics(pairs, self.beta) if self.head == "logp" else reward_metrics(pairs)
        return scored.weight * loss, metrics


def _in_order(mark: Ranking | Comparison) -> tuple[tuple[int, ...], float]:
    """(responses, best first, of each order that is left open; probability that they are not the other way round)."""
    if isinstance(mark, Comparison):
        chosen, rejected, preference = mark.ordered
        return (chosen, rejected), preference
    count = math.prod(math.factorial(len(tier)) for tier in mark.tiers)
    if count > MOST_ORDERS:
        where = f"{mark.origin.file} row {mark.origin.row}: " if mark.origin else ""
        line = f"{where}a ranking whose ties leave {count:,} orders open; method=dpo takes its pairs, ties among them"
        raise Refusal(line, code="too_many_ties", key="method")
    orders = product(*map(permutations, mark.tiers))
    return tuple(r for order in orders for tier in order for r in tier), 1.0 if len(mark.tiers) > 1 else 0.5
