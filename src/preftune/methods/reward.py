"""Reward models: a number per answer, larger for what people prefer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from preftune import losses
from preftune.data.render import Batch
from preftune.methods.pairs import comparisons, right_sign
from preftune.records import Group, Pairs
from preftune.scoring.head import Kind
from preftune.training.method import Example, ExampleScores, Render


class Reward:
    """Bradley-Terry: see `losses.reward`.

    Args:
        centering: of the loss.
        margin_scale: the lead that is asked for, per unit of a judgement's strength.
        pairs: which pairs of a ranking.
    """

    head: Kind = "scalar"
    examples_are = "comparisons"
    width = 2
    beta = None
    baseline = None
    needs_reference = False
    separable = True

    def __init__(self, name: str, *, centering: float = 0.0, margin_scale: float = 0.0, pairs: Pairs = "all") -> None:
        self.name, self.centering, self.margin_scale = name, centering, margin_scale
        self.pairs: Pairs = pairs

    def rows(self, batch: Batch, render: Render) -> Batch:
        return batch

    def roles(self, example: Example) -> list[str]:
        return ["chosen", "rejected"]

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        return comparisons(groups, self.pairs)

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        return example.weight

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.reward(
            scored.policy_logp,
            scored.index[:, 0],
            scored.index[:, 1],
            preference=scored.preference,
            weight=scored.weight,
            margin=self.margin_scale * scored.strength if self.margin_scale else None,
            centering=self.centering,
        )
        return loss, reward_metrics(scored)


def reward_metrics(scored: ExampleScores) -> dict[str, Tensor]:
    """[P] each, without a graph; the margin is of the rewards."""
    rewards, chosen, rejected = scored.policy_logp.detach(), scored.index[:, 0], scored.index[:, 1]
    margin = rewards[chosen] - rewards[rejected]
    return {
        "margin": margin,
        "accuracy": right_sign(margin, scored.preference),
        "reward/chosen": rewards[chosen],
        "reward/rejected": rewards[rejected],
        "length/chosen": scored.length[chosen],
        "length/rejected": scored.length[rejected],
    }
