"""Methods of pairs: one class for all, whose loss is the function of that name in `losses`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from preftune import losses
from preftune.data.render import Batch
from preftune.losses.algebra import expected, nll_per_token
from preftune.losses.divergence import Divergence
from preftune.records import Comparison, Group, Pairs, Ranking
from preftune.scoring.head import Kind
from preftune.training.method import Example, ExampleScores, Render

Loss = Callable[..., Tensor]


class Pairwise:
    """A loss of pairs. What it takes of the scores is read from its signature.

    Args:
        hyperparameters: of the loss, besides beta.
        divergence, divergence_alpha: see `losses.diverge`.
        weighting: wpo, see `losses.wpo_weight`: what the batch is divided by stays the sum of the marks' own weights.
        pairs: which pairs of a ranking.
    """

    examples_are = "comparisons"
    head: Kind = "logp"
    width = 2
    baseline = None

    def __init__(
        self,
        name: str,
        loss: Loss,
        *,
        beta: float | None = 0.1,
        hyperparameters: Mapping[str, float] | None = None,
        divergence: Divergence = "reverse_kl",
        divergence_alpha: float = 0.5,
        weighting: str | None = None,
        pairs: Pairs = "all",
    ) -> None:
        self.name, self.beta = name, beta
        self.pairs: Pairs = pairs
        self.given = {"beta": beta, **(hyperparameters or {})}
        self.divergence: Divergence = divergence
        self.divergence_alpha, self.weighting = divergence_alpha, weighting
        self.function, self.takes = loss, set(signature(loss).parameters)
        self.needs_reference = "reference_logp" in self.takes
        self.separable = name not in losses.COUPLED

    def rows(self, batch: Batch, render: Render) -> Batch:
        return batch

    def roles(self, example: Example) -> list[str]:
        return ["chosen", "rejected"]

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        return comparisons(groups, self.pairs)

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        return example.weight

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = scored.index[:, 0], scored.index[:, 1]
        policy_logp, weight = scored.policy_logp, scored.weight
        if self.divergence != "reverse_kl":
            assert scored.reference_logp is not None
            policy_logp = losses.diverge(policy_logp, scored.reference_logp, self.divergence, alpha=self.divergence_alpha)
        if self.weighting == "wpo":
            weight = weight * losses.wpo_weight(scored.policy_logp, scored.length, chosen, rejected)
        found = {
            "policy_logp": policy_logp,
            "reference_logp": scored.reference_logp,
            "length": scored.length,
            "chosen": chosen,
            "rejected": rejected,
            "preference": scored.preference,
            "weight": weight,
            "margin": scored.strength,
            **self.given,
        }
        return self.function(**taken(found, self.takes)), pair_metrics(scored, self.beta if self.needs_reference else None)


def taken(found: Mapping[str, Any], takes: set[str]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name in takes}


def likelihood(
    policy_logp: Tensor, length: Tensor, chosen: Tensor, rejected: Tensor, *, preference: Tensor, weight: Tensor
) -> Tensor:
    """`sft` as a part of a mix: -logp / length of the chosen answer, nats per token of this answer (rpo's own term). The soft
    label is the expectation over the label."""
    nll = nll_per_token(policy_logp, length)
    return expected(lambda a, b: nll[a], chosen, rejected, preference, weight)


def comparisons(groups: Sequence[Group], pairs: Pairs = "all") -> list[Example]:
    """Every comparison as (chosen, rejected), the likelier winner first, and a ranking as its pairs; one of weight 0 asks for
    nothing."""
    found: list[Example] = []
    for n, group in enumerate(groups):
        for m, mark in enumerate(group.marks):
            if isinstance(mark, Comparison | Ranking) and mark.weight > 0:
                for pair in mark.pairs(pairs):
                    chosen, rejected, preference = pair.ordered
                    strength = pair.by.strength if pair.by and pair.by.strength is not None else 0.0
                    found.append(Example(n, (chosen, rejected), preference, pair.weight, mark.origin, strength, mark=m))
    return found


def pair_metrics(scored: ExampleScores, beta: float | None) -> dict[str, Tensor]:
    """[P] each, without a graph; margin without beta, reward = beta * log_ratio. Without a reference there are neither."""
    policy_logp = scored.policy_logp.detach()
    chosen, rejected = scored.index[:, 0], scored.index[:, 1]
    metrics: dict[str, Tensor] = {}
    sides = {"logp": policy_logp, "length": scored.length}
    if scored.reference_logp is None or beta is None:
        metrics["logp_accuracy"] = right_sign(policy_logp[chosen] - policy_logp[rejected], scored.preference)
    else:
        log_ratio = policy_logp - scored.reference_logp
        margin = log_ratio[chosen] - log_ratio[rejected]
        metrics |= {"margin": margin, "accuracy": right_sign(margin, scored.preference)}
        sides |= {"reward": losses.rewards(policy_logp, scored.reference_logp, beta), "log_ratio": log_ratio}
    for name, values in sides.items():
        metrics[f"{name}/chosen"] = values[chosen]
        metrics[f"{name}/rejected"] = values[rejected]
    return metrics


def right_sign(margin: Tensor, preference: Tensor) -> Tensor:
    """1 where the margin favours the likelier winner, 0 where not, one half at a margin of 0, NaN for ties."""
    right = torch.where(margin > 0, 1.0, torch.where(margin < 0, 0.0, 0.5))
    right = torch.where(preference < 0.5, 1 - right, right)
    return torch.where(preference == 0.5, torch.nan, right)
