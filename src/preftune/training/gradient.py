"""The gradient of one optimizer step, the same for every cut of its batch into micro-batches.

The total weight of the whole batch is known before the first backward pass, and every micro-batch adds
sum(weight * loss) / total. A loss that looks at all examples at once is not separable like that. It is computed on the scores
of the whole step first, without a graph; its gradient with respect to each log-probability is then a number, and a second pass
brings sum(number * logp) through the model, micro-batch by micro-batch: the same gradient for one more forward pass.

Where a method has a baseline, one number for the whole step, the rows that it is taken of are scored first, without a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preftune.data.render import Batch
from preftune.models.randomness import random_state, set_random_state
from preftune.scoring.score import passes
from preftune.scoring.scorer import Scorer, evaluation_mode
from preftune.training.method import Example, ExampleScores, Method


@dataclass(frozen=True, slots=True)
class Step:
    """The examples of one optimizer step, the rows of the batch that each needs, and how these are cut.

    cut: micro-batches of examples, by index. beside: rows that a baseline is taken of, one for each example that has one, and
    `cut_beside` how their forward pass is cut, by index. reference_logp: [len(batch)] nats, where the method needs a reference.
    """

    batch: Batch
    method: Method
    examples: Sequence[Example]
    needs: list[list[int]]
    cut: list[list[int]]
    beside: list[int]
    cut_beside: list[list[int]]
    reference_logp: Tensor | None

    @classmethod
    def of(
        cls,
        scorer: Scorer,
        batch: Batch,
        method: Method,
        examples: Sequence[Example],
        reference_logp: Tensor | None,
        budget: int | None,
    ) -> Step:
        """budget: tokens of one micro-batch; None: the scorer's default."""
        needs = [[batch.index(e.group, r) for r in e.read] for e in examples]
        beside = [batch.index(e.group, r) for e in examples for r in e.beside]
        cuts = (passes(scorer, batch, rows, budget) for rows in (needs, [[row] for row in beside]))
        return cls(batch, method, examples, needs, next(cuts), beside, next(cuts), reference_logp)

    def rows(self, places: Sequence[int]) -> list[int]:
        """The distinct rows that these examples need."""
        return list(dict.fromkeys(row for place in places for row in self.needs[place]))

    @property
    def total(self) -> float:
        """The denominator of the loss."""
        return denominator(self.method, self.batch, self.examples)

    def scored(self, places: Sequence[int], rows: Sequence[int], logp: Tensor, baseline: Tensor | None) -> ExampleScores:
        """What the method's loss is given: logp [len(rows)] of these rows, and these examples over them."""
        local = {row: n for n, row in enumerate(rows)}
        return ExampleScores.of(
            [self.examples[place] for place in places],
            [[local[row] for row in self.needs[place]] for place in places],
            logp,
            None if self.reference_logp is None else self.reference_logp[list(rows)].to(logp.device),
            [self.batch.sequences[row].length for row in rows],
            baseline,
        )


def denominator(method: Method, batch: Batch, examples: Sequence[Example]) -> float:
    """What the loss of these examples is divided by."""
    lengths = ([batch.sequences[batch.index(e.group, r)].length for r in e.responses] for e in examples)
    return sum(method.weight(example, own) for example, own in zip(examples, lengths, strict=True))


def backward(scorer: Scorer, step: Step) -> tuple[dict[str, float], int]:
    """Accumulates the gradient of sum(weight * loss) / sum(weight) over the examples of a step.

    Returns:
        The mean loss and metrics, and how many tokens went through the model.
    """
    baseline, tokens = _baseline(scorer, step)
    passed = _one_pass if step.method.separable or len(step.cut) == 1 else _two_passes
    line, more = passed(scorer, step, baseline)
    return line, tokens + more


def _baseline(scorer: Scorer, step: Step) -> tuple[Tensor | None, int]:
    """The method's baseline over the whole step, and the tokens it took. Dropout is off: it is of the policy itself."""
    if step.method.baseline is None:
        return None, 0
    assert step.reference_logp is not None
    log_ratios, tokens = torch.zeros(len(step.beside), device=scorer.device), 0
    with torch.no_grad(), evaluation_mode(scorer.model):
        for places in step.cut_beside:
            rows = [step.beside[place] for place in places]
            scores = scorer([step.batch.sequences[row] for row in rows])
            log_ratios[places] = scores.logp - step.reference_logp[rows].to(scorer.device)
            tokens += scores.tokens
    return step.method.baseline(log_ratios), tokens


def _one_pass(scorer: Scorer, step: Step, baseline: Tensor | None) -> tuple[dict[str, float], int]:
    metrics = _Means()
    loss_sum, tokens, total = 0.0, 0, step.total
    for places in step.cut:
        rows = step.rows(places)
        scores = scorer([step.batch.sequences[row] for row in rows])
        loss, found = step.method.loss(step.scored(places, rows, scores.logp, baseline))
        (loss.sum() / total).backward()
        loss_sum += float(loss.detach().sum())
        tokens += scores.tokens
        metrics.add(found)
    return {"loss": loss_sum / total, **metrics.means()}, tokens


def _two_passes(scorer: Scorer, step: Step, baseline: Tensor | None) -> tuple[dict[str, float], int]:
    rows = [step.rows(places) for places in step.cut]
    states: list[list[Tensor]] = []
    logp: list[Tensor] = []
    with torch.no_grad():
        for own in rows:
            states.append(random_state(scorer.device))
            logp.append(scorer([step.batch.sequences[row] for row in own]).logp)
    leaf = torch.cat(logp).requires_grad_()
    # a row that stands in two micro-batches is read in the last of them, and takes its whole gradient there
    places = [place for places in step.cut for place in places]
    loss, found = step.method.loss(step.scored(places, [row for own in rows for row in own], leaf, baseline))
    total, tokens, metrics = step.total, 0, _Means()
    metrics.add(found)
    (gradient,) = torch.autograd.grad(loss.sum() / total, leaf)
    for own, state, factor in zip(rows, states, gradient.split([len(own) for own in rows]), strict=True):
        set_random_state(scorer.device, state)  # an adapter's dropout falls as it did in the first pass
        scores = scorer([step.batch.sequences[row] for row in own])
        (factor * scores.logp).sum().backward()
        tokens += scores.tokens
    return {"loss": float(loss.detach().sum()) / total, **metrics.means()}, tokens


class _Means:
    """Metrics of examples, one micro-batch after the other; NaN = does not count."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, each in values.items():
            self.parts.setdefault(name, []).append(each)

    def means(self) -> dict[str, float]:
        means = {name: float(torch.cat(parts).nanmean()) for name, parts in self.parts.items()}
        return {name: value for name, value in means.items() if not math.isnan(value)}
