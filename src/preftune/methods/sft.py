"""Supervised fine-tuning on demonstrations, or on the answers that people preferred."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from preftune import losses
from preftune.data.render import Batch
from preftune.records import Comparison, Demonstration, Group, Mark, Ranking
from preftune.scoring.head import Kind
from preftune.training.method import Example, ExampleScores, Render


class SFT:
    name = "sft"
    examples_are = "demonstrations"
    head: Kind = "logp"
    width = 1
    beta = None
    baseline = None
    needs_reference = False
    separable = True

    def rows(self, batch: Batch, render: Render) -> Batch:
        return batch

    def roles(self, example: Example) -> list[str]:
        return ["response"]

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        """Demonstrations, and each distinct best answer of a comparison or a ranking once; ties have no best answer."""
        found: list[Example] = []
        for n, group in enumerate(groups):
            taken: set[int] = set()
            for m, mark in enumerate(group.marks):
                best = [response for response in _best(mark) if response not in taken and mark.weight > 0]
                taken.update(best)
                found += [Example(n, (response,), 1.0, mark.weight, mark.origin, mark=m) for response in best]
        return found

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        return example.weight * sum(lengths)  # the loss is a mean per token

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        response = scored.index[:, 0]
        metrics = {"logp/chosen": scored.policy_logp.detach()[response], "length/chosen": scored.length[response]}
        return losses.sft(scored.policy_logp, response, weight=scored.weight), metrics


def _best(mark: Mark) -> tuple[int, ...]:
    """The answers that the mark says to imitate."""
    match mark:
        case Demonstration():
            return (mark.response,)
        case Comparison() if mark.preference != 0.5:
            return (mark.ordered[0],)
        case Ranking() if len(mark.tiers) > 1:
            return mark.tiers[0]
        case _:
            return ()
