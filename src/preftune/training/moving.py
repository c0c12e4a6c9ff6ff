"""A reference that follows the policy: every so many steps a part of the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.data.render import Batch
from preftune.models.weights import copy_sharing
from preftune.scoring.score import score_logp
from preftune.training.precision import Weights


class Moving:
    """reference := alpha * policy + (1 - alpha) * reference, weight by weight, every `every` steps; it starts as the policy.

    Source: Gorbatovski et al. 2024 (TR-DPO, arXiv 2404.09656): alpha below 1 is its soft update, 1 the hard one. Frozen
    weights are shared with the policy: of an adapter a copy of the adapter alone is held. There alpha mixes its factors, and so
    not quite their product. What the reference says of a row is computed when it is asked, in the policy's own precision.

    `masters` are its weights in float32, in the policy's order.

    Args:
        weights: the model that trains.
        every: optimizer steps between two updates.
        alpha: in (0, 1].
    """

    def __init__(self, weights: Weights, *, every: int, alpha: float) -> None:
        self.every, self.alpha = every, alpha
        self.model: Any = copy_sharing(weights.compute, lambda parameter: not parameter.requires_grad)
        self._used = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        self.masters = [p if p.dtype == torch.float32 else p.float() for p in self._used]

    def logp(self, batch: Batch, rows: Sequence[int], budget: int, *, share: bool) -> Tensor:
        """[len(batch)] nats of these rows, now."""
        return score_logp(self.model, batch, rows, tokens_per_microbatch=budget, share=share)

    @torch.no_grad()
    def follow(self, step: int, weights: Weights) -> None:
        """Call after each optimizer step, with its number."""
        if step % self.every:
            return
        for own, used, policy in zip(self.masters, self._used, weights.masters, strict=True):
            own.lerp_(policy, self.alpha)
            if used is not own:
                used.copy_(own)

    @torch.no_grad()
    def put(self, masters: Sequence[Tensor]) -> None:
        """Its weights, float32, as `masters` held them."""
        for own, used, value in zip(self.masters, self._used, masters, strict=True):
            own.copy_(value)
            if used is not own:
                used.copy_(own)
