"""ld_dpo: a pair, and the longer of its answers cut to the length of the shorter one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from preftune import losses
from preftune.data.render import Batch, Rendered
from preftune.methods.pairs import comparisons, pair_metrics
from preftune.records import Group, Pairs
from preftune.scoring.head import Kind
from preftune.training.method import Example, ExampleScores, Render


class CutPairs:
    """Examples are (chosen, rejected, chosen cut, rejected cut): what of an answer stands within the shorter one's length has a
    logp of its own. On a trie the cut answer is the beginning of the whole one, and costs nothing more.

    Each answer is then two numbers to `losses.ld_dpo`, as if it had two tokens: the log-probability of its beginning, and that
    of the rest.
    """

    examples_are = "comparisons"
    head: Kind = "logp"
    width = 2
    baseline = None
    needs_reference = True
    separable = True

    def __init__(self, name: str, *, beta: float | None, alpha: float, pairs: Pairs = "all") -> None:
        assert beta is not None
        self.name, self.beta, self.alpha = name, beta, alpha
        self.pairs: Pairs = pairs

    def rows(self, batch: Batch, render: Render) -> Batch:
        extra: dict[int, list[Rendered]] = {}
        for example in comparisons(batch.groups, self.pairs):
            both = [batch.sequences[batch.index(example.group, r)] for r in example.responses]
            least = min(answer.length for answer in both)
            extra.setdefault(example.group, []).extend(cut(answer, least) for answer in both)
        return batch.beside(extra)

    def roles(self, example: Example) -> list[str]:
        return ["chosen", "rejected"]

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        found: list[Example] = []
        free = [len(group.responses) for group in groups]  # the next row beside each group's own
        for example in comparisons(groups, self.pairs):
            first = free[example.group]
            free[example.group] += 2
            found.append(replace(example, responses=(*example.responses, first, first + 1)))
        return found

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        return example.weight

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        assert scored.reference_logp is not None
        whole, beginning = scored.index[:, :2].T.reshape(-1), scored.index[:, 2:].T.reshape(-1)

        def in_two(logp: Tensor) -> Tensor:
            return torch.stack([logp[beginning], logp[whole] - logp[beginning]], 1)

        pair = torch.arange(len(scored.index), device=whole.device)
        loss = losses.ld_dpo(
            in_two(scored.policy_logp),
            in_two(scored.reference_logp),
            torch.where(scored.length[whole] > scored.length[beginning], 2, 1),
            pair,
            pair + len(pair),
            preference=scored.preference,
            weight=scored.weight,
            beta=self.beta,
            alpha=self.alpha,
        )
        return loss, pair_metrics(scored, self.beta)


def cut(answer: Rendered, length: int) -> Rendered:
    """The answer with its first `length` scored tokens."""
    if answer.length <= length:
        return answer
    scored = [True] * answer.length if answer.mask is None else list(answer.mask)
    places = [n for n, yes in enumerate(scored) if yes]
    end = places[length - 1] + 1
    mask = None if answer.mask is None else answer.mask[:end]
    attachments = tuple((place, digest) for place, digest in answer.attachments if place < answer.start + end)
    return replace(answer, ids=answer.ids[: answer.start + end], mask=mask, attachments=attachments)
