"""What the training loop knows of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from preftune.data.render import Batch
from preftune.records import Group, Origin
from preftune.scoring.head import Kind


@dataclass(frozen=True, slots=True)
class Example:
    """One unit of a batch: responses of one group (by index there), and the label that goes with them.

    strength: of the judgement, where it says one. beside: rows of the group that the method's baseline is taken of.
    extra: rows that its loss reads besides the responses, and `known`, what is known of each of them: a cost, and the nats that
    it had when it was written. mark: which of the group's marks it is made of. `rows`: all that it needs scores of.
    """

    group: int
    responses: tuple[int, ...]
    preference: float = 1.0
    weight: float = 1.0
    origin: Origin | None = None
    strength: float = 0.0
    beside: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    known: tuple[tuple[float, float], ...] = ()
    mark: int = 0

    @property
    def read(self) -> tuple[int, ...]:
        """Rows that its loss reads."""
        return (*self.responses, *self.extra)

    @property
    def rows(self) -> tuple[int, ...]:
        return (*self.read, *self.beside)


@dataclass(frozen=True, slots=True)
class ExampleScores:
    """Scores of R responses, and P examples over them.

    policy_logp, reference_logp: [R] nats, summed over the scored tokens; the reference is None where no method needs it. Of a
        reward model policy_logp is its rewards.
    length: [R] scored tokens.
    index: [P, most responses of an example] into R, each row padded at its end with -1; `extra` likewise, of the extra rows,
        and known [P, most of these, 2]. preference, weight, strength: [P].
    baseline: of the whole step, where the method has one; a constant.
    """

    policy_logp: Tensor
    reference_logp: Tensor | None
    length: Tensor
    index: Tensor
    preference: Tensor
    weight: Tensor
    strength: Tensor
    extra: Tensor
    known: Tensor
    baseline: Tensor | None = None

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        rows: Sequence[Sequence[int]],
        policy_logp: Tensor,
        reference_logp: Tensor | None,
        lengths: Sequence[int],
        baseline: Tensor | None = None,
    ) -> ExampleScores:
        """rows: of what each example reads, its places in R. lengths: of the R responses."""
        device = policy_logp.device
        labels = torch.tensor([(e.preference, e.weight, e.strength) for e in examples], device=device).view(-1, 3)
        preference, weight, strength = labels.unbind(1)
        extra = padded([own[len(e.responses) :] for e, own in zip(examples, rows, strict=True)], device)
        known = torch.zeros(*extra.shape, 2, device=device)
        for n, example in enumerate(examples):
            if example.known:
                known[n, : len(example.known)] = torch.tensor(example.known, device=device)
        return cls(
            policy_logp=policy_logp,
            reference_logp=reference_logp,
            length=torch.tensor(lengths, device=device, dtype=torch.float32),
            index=padded([own[: len(e.responses)] for e, own in zip(examples, rows, strict=True)], device),
            preference=preference,
            weight=weight,
            strength=strength,
            extra=extra,
            known=known,
            baseline=baseline,
        )


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[len(rows), longest], each row padded at its end with -1."""
    width = max(map(len, rows), default=1)
    filled = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(filled, device=device, dtype=torch.long).view(len(rows), width)


Render = Callable[[Sequence[Group]], Batch]


class Method(Protocol):
    """Arithmetic on scores. The loop never asks which method it is.

    head: what a response is scored by: its `logp`, or the `scalar` of a reward model, which stands in place of it everywhere.
    examples_are: which judgements it makes examples of: comparisons, rankings, ratings or demonstrations.
    width: answers that are judged together. beta: None where it has none.
    separable: whether the loss of an example depends on no other group's, so that a batch may be cut between groups.
    baseline: one number for a whole step, of the log-ratios [M] of the rows `beside` its examples; None: there is none.
    """

    # properties, which an attribute of a narrower type satisfies too
    @property
    def name(self) -> str: ...
    @property
    def head(self) -> Kind: ...
    @property
    def examples_are(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def beta(self) -> float | None: ...
    @property
    def needs_reference(self) -> bool: ...
    @property
    def separable(self) -> bool: ...
    @property
    def baseline(self) -> Callable[[Tensor], Tensor] | None: ...

    def rows(self, batch: Batch, render: Render) -> Batch:
        """The batch with the rows that its examples ask for besides the responses of the groups. render: as the batch was."""
        ...

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        """The training examples in the marks of these groups."""
        ...

    def roles(self, example: Example) -> list[str]:
        """What a person calls the first of the example's responses, those that were judged."""
        ...

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        """The example's share of the batch's denominator; `lengths`: scored tokens of its responses."""
        ...

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        """([P] unreduced losses times weight, metrics [P] to be averaged over examples; NaN = does not count)."""
        ...
