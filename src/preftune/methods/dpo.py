"""Direct Preference Optimization: comparisons, and a reference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from preftune import losses
from preftune.methods.pairs import comparisons, pair_metrics
from preftune.records import Group
from preftune.training.method import Example


class DPO:
    name = "dpo"
    width = 2
    needs_reference = True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        return comparisons(groups)

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        return example.weight

    def loss(
        self,
        policy_logp: Tensor,
        reference_logp: Tensor | None,
        length: Tensor,
        index: Tensor,
        preference: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert reference_logp is not None
        chosen, rejected = index.unbind(1)
        loss = losses.dpo(policy_logp, reference_logp, chosen, rejected, preference=preference, weight=weight, beta=self.beta)
        return loss, pair_metrics(policy_logp.detach(), reference_logp, length, index, preference, self.beta)
