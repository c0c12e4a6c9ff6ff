"""What every method of comparisons shares: its examples, and the metrics of a pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from preftune import losses
from preftune.records import Comparison, Group
from preftune.training.method import Example, Scored


def comparisons(groups: Sequence[Group]) -> list[Example]:
    """Every comparison as (chosen, rejected), the likelier winner first; one of weight 0 asks for nothing."""
    found: list[Example] = []
    for n, group in enumerate(groups):
        for mark in group.marks:
            if isinstance(mark, Comparison) and mark.weight > 0:
                chosen, rejected, preference = mark.ordered
                found.append(Example(n, (chosen, rejected), preference, mark.weight, mark.origin))
    return found


def pair_metrics(scored: Scored, reference_logp: Tensor, beta: float) -> dict[str, Tensor]:
    """[P] each, without a graph; margin without beta, reward = beta * log_ratio."""
    policy_logp = scored.policy_logp.detach()
    log_ratio = policy_logp - reference_logp
    reward = losses.rewards(policy_logp, reference_logp, beta)
    chosen, rejected = scored.index.unbind(1)
    margin = log_ratio[chosen] - log_ratio[rejected]
    metrics = {"margin": margin, "accuracy": right_sign(margin, scored.preference)}
    sides = (("reward", reward), ("logp", policy_logp), ("log_ratio", log_ratio), ("length", scored.length))
    for name, values in sides:
        metrics[f"{name}/chosen"] = values[chosen]
        metrics[f"{name}/rejected"] = values[rejected]
    return metrics


def right_sign(margin: Tensor, preference: Tensor) -> Tensor:
    """1 where the margin favours the likelier winner, 0 where not, one half at a margin of 0, NaN for ties."""
    right = torch.where(margin > 0, 1.0, torch.where(margin < 0, 0.0, 0.5))
    right = torch.where(preference < 0.5, 1 - right, right)
    return torch.where(preference == 0.5, torch.nan, right)
