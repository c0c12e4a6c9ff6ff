"""Penalties that hold a policy back, and costs of what it writes: drift, excess, score_function."""

from __future__ import annotations

from torch import Tensor

from preftune.losses.algebra import weighted


def drift(policy_logp: Tensor, reference_logp: Tensor, length: Tensor) -> Tensor:
    """|log_ratio| / length: how far a response has moved from the reference, either way, per token of it.

    Source: ours; the log-ratio is that of DPO (Rafailov et al. 2023, arXiv 2305.18290).

    Args:
        policy_logp, reference_logp: [R] nats, summed over response tokens.
        length: [R] response tokens, at least 1.

    Returns:
        [R] nats per token.

    Example:
        >>> import torch
        >>> drift(torch.tensor([-8.0]), torch.tensor([-5.0]), torch.tensor([10])).tolist()
        [0.30000001192092896]
    """
    return (policy_logp - reference_logp).abs() / length


def excess(value: Tensor, threshold: float) -> Tensor:
    """max(value - threshold, 0): nothing is asked of what keeps within it.

    Source: the exterior penalty of constrained optimisation, of the first power (Zangwill 1967).

    Example:
        >>> import torch
        >>> excess(torch.tensor([3.0, 1.0]), 2.0).tolist()
        [1.0, 0.0]
    """
    return (value - threshold).clamp(min=0)


def score_function(
    policy_logp: Tensor,
    sampled_logp: Tensor,
    cost: Tensor,
    group: Tensor,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """w * (cost - baseline) * logp, with w = min(1, exp(logp - sampled_logp)), both factors without a graph.

    The responses were drawn from the policy once, and stay: sampled_logp is what they had then. While the policy is still that
    one, w is 1, and the gradient's expectation is that of the expected cost, d/dtheta E[cost]. Later
    w is the importance weight, cut at 1 (Espeholt et al. 2018, arXiv 1802.01561, as their truncated weights): a response that
    the policy gave up stops pushing, and none pushes harder than it did at first.

    baseline: the mean cost of the other responses to the same prompt, which leaves the expectation as it is; 0 where there are
    none.

    Source: Williams 1992 (REINFORCE); the baseline is that of Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for
    free"), which leaves one out.

    Args:
        policy_logp: [R] nats, summed over response tokens.
        sampled_logp: [R] nats, of the policy that wrote them.
        cost: [R] any unit; less is better.
        group: [R] integers: responses to one prompt have the same one.
        weight: [R] not negative; None: 1.

    Returns:
        [R] losses, unreduced: only their gradient means something.

    Example:
        >>> import torch
        >>> logp = torch.tensor([-2.0, -3.0])
        >>> score_function(logp, logp, torch.tensor([1.0, 0.0]), torch.tensor([0, 0])).tolist()
        [-2.0, 3.0]
    """
    same = (group[:, None] == group[None, :]).to(cost.dtype)
    others = same.sum(1) - 1
    baseline = (same @ cost - cost) / others.clamp(min=1)
    gap = (policy_logp - sampled_logp).detach()
    factor = gap.clamp(max=0).exp() * (cost - baseline)
    return weighted(factor * policy_logp, weight)
