"""Pairwise losses: a margin of two responses, a link, and what is done with a soft label.

Everywhere: logp and log_ratio in nats, summed over response tokens; R responses, P pairs; `chosen` and `rejected` index the
R responses, so a response that stands in three pairs is scored once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Link = Callable[[Tensor], Tensor]


def log_ratio_margin(policy_logp: Tensor, reference_logp: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """h = log_ratio(chosen) - log_ratio(rejected), [P], with log_ratio = policy logp - reference logp. No beta."""
    log_ratio = policy_logp - reference_logp
    return log_ratio[chosen] - log_ratio[rejected]


def logistic(z: Tensor) -> Tensor:
    """-log sigmoid(z), exact for large |z|."""
    return -F.logsigmoid(z)


def soft_label(link: Link, z: Tensor, preference: Tensor | None) -> Tensor:
    """p * link(z) + (1 - p) * link(-z): the expected loss when `chosen` is better with probability p."""
    if preference is None:
        return link(z)
    return preference * link(z) + (1 - preference) * link(-z)


def dpo(
    policy_logp: Tensor,
    reference_logp: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    preference: Tensor | None = None,
    weight: Tensor | None = None,
    beta: float = 0.1,
) -> Tensor:
    """Direct Preference Optimization: p * -log sigmoid(beta h) + (1 - p) * -log sigmoid(-beta h).

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7, for p = 1. The soft label is the expectation of that loss
    over the label, the form of Mitchell's note on conservative DPO (2023) with a probability per comparison; its optimum is
    beta h = log(p / (1 - p)).

    Args:
        policy_logp: [R] nats, summed over response tokens.
        reference_logp: [R] the same responses under the reference.
        chosen, rejected: [P] integer indices into R.
        preference: [P] probability in [0, 1] that `chosen` is better; None: 1.
        weight: [P] not negative, multiplied in; the mean of a batch is sum(result) / sum(weight). None: 1.
        beta: greater than 0; how strongly the policy is held to the reference (0.1 to 0.5 is usual).

    Returns:
        [P] losses, unreduced. At policy == reference each is weight * ln 2.

    Raises:
        ValueError: beta not greater than 0.

    Example:
        >>> import torch
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -4.0])
        >>> round(dpo(policy, reference, torch.tensor([0]), torch.tensor([1])).item(), 6)
        0.403186
    """
    if not beta > 0:
        raise ValueError(f"beta must be greater than 0, not {beta}")
    h = log_ratio_margin(policy_logp, reference_logp, chosen, rejected)
    loss = soft_label(logistic, beta * h, preference)
    return loss if weight is None else weight * loss


def rewards(policy_logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    """Implicit rewards beta * (policy logp - reference logp), [R], detached.

    Source: Rafailov et al. 2023, section 4, up to a constant per prompt.
    """
    return beta * (policy_logp - reference_logp).detach()
