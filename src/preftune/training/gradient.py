"""The gradient of one optimizer step, the same for every cut of its batch into micro-batches.

The total weight of the whole batch is known before the first backward pass, and every micro-batch adds
sum(weight * loss) / total. A loss that looks at all examples at once is not separable like that. It is computed on the scores
of the whole step first, without a graph; its gradient with respect to each log-probability is then a number, and a second pass
brings sum(number * logp) through the model, micro-batch by micro-batch: the same gradient for one more forward pass.

Where a method has a baseline, one number for the whole step, the rows that it is taken of are scored first, without a graph.

Several processes share out the examples of a step, not its loss: each divides by the total of all of them, and the gradients
are added up, never averaged. So the step is the same for every number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preftune import processes
from preftune.data.render import Batch
from preftune.models.randomness import evaluation_mode, random_state, set_random_state
from preftune.scoring.plan import shares
from preftune.scoring.score import passes
from preftune.scoring.scorer import PassScores, Scorer
from preftune.training.method import Example, ExampleScores, Method


@dataclass(frozen=True, slots=True)
class Step:
    """The examples of one optimizer step, the rows of the batch that each needs, and how these are cut.

    cuts: of each process its micro-batches of examples, by index. beside: rows that a baseline is taken of, one for each
    example that has one, and `cuts_beside` how their forward pass is cut, by index. reference_logp: [len(batch)] nats, where
    the method needs a reference.
    """

    batch: Batch
    method: Method
    examples: Sequence[Example]
    needs: list[list[int]]
    cuts: list[list[list[int]]]
    beside: list[int]
    cuts_beside: list[list[list[int]]]
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

        def cut(needs: list[list[int]]) -> list[list[list[int]]]:
            found: list[list[list[int]]] = []
            for own in shares(batch.sequences, needs, processes.size()):
                micro_batches = passes(scorer, batch, [needs[place] for place in own], budget)
                found.append([[own[n] for n in places] for places in micro_batches])
            # of a model that is in parts all take part in every pass of any of them: one without examples counts for nothing
            most = max(map(len, found)) if scorer.in_parts else 0
            return [[*own, *[[]] * (most - len(own))] for own in found]

        needs = [[batch.index(e.group, r) for r in e.read] for e in examples]
        beside = [batch.index(e.group, r) for e in examples for r in e.beside]
        return cls(batch, method, examples, needs, cut(needs), beside, cut([[row] for row in beside]), reference_logp)

    def rows(self, places: Sequence[int]) -> list[int]:
        """The distinct rows that these examples need."""
        return list(dict.fromkeys(row for place in places for row in self.needs[place]))

    @property
    def cut(self) -> list[list[int]]:
        """The micro-batches of this process."""
        return self.cuts[processes.rank()]

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
    """Accumulates the gradient of sum(weight * loss) / sum(weight) over the examples of a step; of several processes each its
    own part of that sum.

    Returns:
        The mean loss and metrics, and how many tokens the step's gradient and baseline took, each pass's own; of a loss in two
        passes those of the second. Of all processes.
    """
    baseline, tokens = _baseline(scorer, step)
    passed = _one_pass if step.method.separable or sum(map(len, step.cuts)) == 1 else _two_passes
    line, more = passed(scorer, step, baseline)
    return line, sum(processes.gathered(tokens + more))


def _baseline(scorer: Scorer, step: Step) -> tuple[Tensor | None, int]:
    """The method's baseline over the whole step, and the tokens it took. Dropout is off: it is of the policy itself."""
    if step.method.baseline is None:
        return None, 0
    assert step.reference_logp is not None
    log_ratios, tokens = torch.zeros(len(step.beside), device=scorer.device), 0
    with torch.no_grad(), evaluation_mode(scorer.model):
        for places in step.cuts_beside[processes.rank()]:
            rows = [step.beside[place] for place in places]
            scores = _scores(scorer, step, rows)
            if places:
                log_ratios[places] = scores.logp - step.reference_logp[rows].to(scorer.device)
                tokens += scores.tokens
    processes.add_up([log_ratios])
    return step.method.baseline(log_ratios), tokens


def _one_pass(scorer: Scorer, step: Step, baseline: Tensor | None) -> tuple[dict[str, float], int]:
    metrics = _Means()
    loss_sum, tokens, total = 0.0, 0, step.total
    for places in step.cut:
        rows = step.rows(places)
        scores = _scores(scorer, step, rows)
        if not places:
            (0.0 * scores.logp.sum()).backward()
            continue
        loss, found = step.method.loss(step.scored(places, rows, scores.logp, baseline))
        (loss.sum() / total).backward()
        loss_sum += float(loss.detach().sum())
        tokens += scores.tokens
        metrics.add(found)
    metrics.add_others()
    return {"loss": math.fsum(processes.gathered(loss_sum)) / total, **metrics.means()}, tokens


def _two_passes(scorer: Scorer, step: Step, baseline: Tensor | None) -> tuple[dict[str, float], int]:
    rows = [step.rows(places) for places in step.cut]
    states: list[list[Tensor]] = []
    logp: list[Tensor] = []
    with torch.no_grad():
        for own in rows:
            states.append(random_state(scorer.device))
            logp.append(_scores(scorer, step, own).logp[: len(own)])
    # of all processes: each computes the whole loss, and takes its own part of the gradient
    before = sum(len(step.rows(places)) for cut in step.cuts[: processes.rank()] for places in cut)
    every = [part for parts in processes.gathered([part.cpu() for part in logp]) for part in parts]
    leaf = torch.cat(every).to(scorer.device).requires_grad_()
    cuts = [places for cut in step.cuts for places in cut]
    # a row that stands in two micro-batches is read in the last of them, and takes its whole gradient there
    places, rows_of_all = [place for own in cuts for place in own], [row for own in cuts for row in step.rows(own)]
    loss, found = step.method.loss(step.scored(places, rows_of_all, leaf, baseline))
    total, tokens, metrics = step.total, 0, _Means()
    metrics.add(found)
    (gradient,) = torch.autograd.grad(loss.sum() / total, leaf)
    factors = gradient[before : before + sum(map(len, rows))].split([len(own) for own in rows])
    for own, state, factor in zip(rows, states, factors, strict=True):
        set_random_state(scorer.device, state)  # an adapter's dropout falls as it did in the first pass
        scores = _scores(scorer, step, own)
        ((factor * scores.logp).sum() if own else 0.0 * scores.logp.sum()).backward()
        tokens += scores.tokens if own else 0
    return {"loss": float(loss.detach().sum()) / total, **metrics.means()}, tokens


def _scores(scorer: Scorer, step: Step, rows: Sequence[int]) -> PassScores:
    """Of these rows; of a pass that other processes need and this one has nothing for, of any row."""
    return scorer([step.batch.sequences[row] for row in rows or step.needs[0][:1]])


class _Means:
    """Metrics of examples, one micro-batch after the other; NaN = does not count."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, each in values.items():
            self.parts.setdefault(name, []).append(each)

    def add_others(self) -> None:
        """Those of the other processes."""
        found = processes.gathered({name: torch.cat(parts).detach().cpu() for name, parts in self.parts.items()})
        if len(found) > 1:
            names = dict.fromkeys(name for own in found for name in own)
            self.parts = {name: [own[name] for own in found if name in own] for name in names}

    def means(self) -> dict[str, float]:
        means = {name: float(torch.cat(parts).nanmean()) for name, parts in self.parts.items()}
        return {name: value for name, value in means.items() if not math.isnan(value)}
