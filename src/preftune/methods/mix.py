"""A weighted sum of methods of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from preftune.data.render import Batch
from preftune.methods.pairs import Pairwise
from preftune.records import Group
from preftune.scoring.head import Kind
from preftune.training.method import Example, ExampleScores, Render


class Mix:
    """The loss of a pair is the sum of its parts' losses times their weights; the metrics are those of the first part that has
    a reference, else of the first."""

    examples_are = "comparisons"
    head: Kind = "logp"
    width = 2
    baseline = None

    def __init__(self, name: str, parts: Sequence[tuple[float, Pairwise]], *, beta: float | None) -> None:
        self.name, self.parts, self.beta = name, parts, beta
        self.needs_reference = any(part.needs_reference for _, part in parts)
        self.separable = all(part.separable for _, part in parts)
        self.first = next((part for _, part in parts if part.needs_reference), parts[0][1])

    def rows(self, batch: Batch, render: Render) -> Batch:
        return batch

    def roles(self, example: Example) -> list[str]:
        return ["chosen", "rejected"]

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        return self.first.examples(groups)

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        return example.weight

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        found = [(weight, *part.loss(scored), part) for weight, part in self.parts]
        total = torch.stack([weight * loss for weight, loss, _, _ in found]).sum(0)
        return total, next(metrics for _, _, metrics, part in found if part is self.first)
