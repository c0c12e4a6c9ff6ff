"""Supervised fine-tuning: the negative log-likelihood of responses."""

from __future__ import annotations

from torch import Tensor


def sft(policy_logp: Tensor, response: Tensor | None = None, *, weight: Tensor | None = None) -> Tensor:
    """-logp of each response, in nats summed over its tokens.

    The usual "mean per token" is sum(result) / sum(weight * length), over the whole batch at once.

    Args:
        policy_logp: [R] nats, summed over response tokens.
        response: [P] integer indices into R; None: every response once.
        weight: [P] not negative, multiplied in; None: 1.

    Returns:
        [P] losses, unreduced.

    Example:
        >>> import torch
        >>> sft(torch.tensor([-3.0, -9.0])).tolist()
        [3.0, 9.0]
    """
    loss = -policy_logp if response is None else -policy_logp[response]
    return loss if weight is None else weight * loss
