"""Constraints: what a method is held to besides its own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from preftune import losses
from preftune.data.render import Batch, Rendered
from preftune.errors import RunFailed
from preftune.functions import load_function
from preftune.methods.options import ConstraintOptions
from preftune.records import Group, Message, Response
from preftune.scoring.head import Kind
from preftune.training.method import Example, ExampleScores, Method, Render


@dataclass(frozen=True, slots=True)
class Sampled:
    """An answer that the policy wrote before it was trained, its cost, and the nats that it had then."""

    row: Rendered
    cost: float
    logp: float


class Constraint(Protocol):
    """One constraint. extra: rows beside an example's responses that it reads."""

    name: str
    options: ConstraintOptions
    extra: int

    def of(self, scored: ExampleScores, extra: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """([P] what is added to the loss before its weight, [P] the value that is logged, without a graph).

        extra: [P, n] into R, of its own rows, -1 where there is none; known: [P, n, 2] their costs and nats when written.
        """
        ...


class OfResponses:
    """The mean over an example's responses of what a value has over the threshold.

    Args:
        value: [R] of the scores.
        width: how many of an example's rows are responses that were judged; None: all.
    """

    extra = 0

    def __init__(
        self, name: str, options: ConstraintOptions, value: Callable[[ExampleScores], Tensor], width: int | None
    ) -> None:
        self.name, self.options, self.value, self.width = name, options, value, width

    def of(self, scored: ExampleScores, extra: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        index = scored.index[:, : self.width]
        value = self.value(scored)
        if value.shape != scored.policy_logp.shape:
            line = f"{self.options.penalty} gave a tensor of {tuple(value.shape)} for {len(scored.policy_logp)} responses"
            raise RunFailed(f"{line}: give one number for each", code="bad_scorer", key=f"method.constraints.{self.name}")
        return _mean(losses.excess(value, self.options.limit), index), _mean(value.detach(), index)


class OfPhrases:
    """The mean over the phrases of what their log-probability, as the beginning of an answer, has over the threshold."""

    def __init__(self, name: str, options: ConstraintOptions) -> None:
        assert options.phrases
        self.name, self.options, self.extra = name, options, len(options.phrases)

    def of(self, scored: ExampleScores, extra: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        logp = scored.policy_logp
        return _mean(losses.excess(logp, self.options.limit), extra), _mean(logp.detach(), extra)


class Cost:
    """`losses.score_function` over the prompt's samples, of what each costs over the threshold. Its value is their mean cost
    under the policy: by importance weights, which are 1 before the first step."""

    def __init__(self, name: str, options: ConstraintOptions) -> None:
        self.name, self.options, self.extra = name, options, options.samples

    def of(self, scored: ExampleScores, extra: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        there = extra >= 0
        example = there.nonzero()[:, 0]
        logp, (cost, sampled) = scored.policy_logp[extra[there]], known[there].unbind(-1)
        over = losses.excess(cost, self.options.limit)
        each = losses.score_function(logp, sampled, over, example)
        share = (logp.detach() - sampled).clamp(max=0).exp()
        count, total, spent = (logp.new_zeros(len(extra)) for _ in range(3))
        count = count.index_add(0, example, torch.ones_like(cost)).clamp(min=1)
        total, spent = total.index_add(0, example, share), spent.index_add(0, example, share * cost)
        loss = logp.new_zeros(len(extra)).index_add(0, example, each) / count
        return loss, torch.where(total > 0, spent / total, torch.nan)


class Constrained:
    """A method and its constraints: its loss + weight of the example * sum over constraints of weight * penalty.

    Each constraint is logged as constraint/NAME, before threshold and weight.
    """

    def __init__(self, method: Method, constraints: Mapping[str, ConstraintOptions]) -> None:
        self.method = method
        self.constraints = [_made(name, options, method) for name, options in constraints.items()]
        self.phrases = [c for c in self.constraints if isinstance(c, OfPhrases)]
        self.costs = [c for c in self.constraints if isinstance(c, Cost)]
        self.samples: dict[str, tuple[Sampled, ...]] = {}  # of each group, by its id: those of all costs, in their order
        self.name, self.beta = method.name, method.beta
        self.head: Kind = method.head
        self.width, self.examples_are = method.width, method.examples_are
        self.separable, self.baseline = method.separable, method.baseline
        self.needs_reference = method.needs_reference or any(c.options.needs_reference for c in self.constraints)

    def rows(self, batch: Batch, render: Render) -> Batch:
        """With the phrases under each prompt, after what the method itself asks for."""
        batch = self.method.rows(batch, render)
        phrases = [text for c in self.phrases for text in c.options.phrases or ()]
        if not phrases:
            return batch
        # one by one: together their spans would begin where all of them are still alike
        alone = render([_answered(group, text) for group in batch.groups for text in phrases])
        under = {g: alone.sequences[g * len(phrases) : (g + 1) * len(phrases)] for g in range(len(batch.groups))}
        return batch.beside({g: [replace(row, group=g) for row in own] for g, own in under.items()})

    def with_samples(self, batch: Batch, samples: Mapping[str, Sequence[Sampled]]) -> Batch:
        """With what the policy wrote under each prompt, by the ids of groups; groups that have none are left as they are."""
        self.samples = {name: tuple(own) for name, own in samples.items()}
        found = ((g, self.samples.get(group.id, ())) for g, group in enumerate(batch.groups))
        return batch.beside({g: [each.row for each in own] for g, own in found})

    def roles(self, example: Example) -> list[str]:
        return self.method.roles(example)

    def examples(self, groups: Sequence[Group]) -> list[Example]:
        own = self.method.examples(groups)
        free = [len(group.responses) for group in groups]
        for example in own:
            free[example.group] = max(free[example.group], 1 + max(example.rows))
        phrases = sum(c.extra for c in self.phrases)
        found: list[Example] = []
        for example in own:
            samples = self.samples.get(groups[example.group].id, ())
            first, known = free[example.group], [(0.0, 0.0)] * phrases + [(each.cost, each.logp) for each in samples]
            extra = tuple(range(first, first + len(known)))
            found.append(replace(example, extra=extra, known=tuple(known)))
        return found

    def weight(self, example: Example, lengths: Sequence[int]) -> float:
        return self.method.weight(example, lengths)

    def loss(self, scored: ExampleScores) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.method.loss(scored)
        weight, at = scored.weight, 0
        if self.examples_are == "demonstrations":  # whose loss is divided by tokens
            weight = weight * scored.length[scored.index[:, 0]]
        for constraint in (*(c for c in self.constraints if not c.extra), *self.phrases, *self.costs):
            own = slice(at, at + constraint.extra)
            at = own.stop
            penalty, value = constraint.of(scored, scored.extra[:, own], scored.known[:, own])
            loss = loss + weight * constraint.options.weight * penalty
            metrics[f"constraint/{constraint.name}"] = value
        return loss, metrics


def _answered(group: Group, text: str) -> Group:
    """The prompt with the beginning of one answer."""
    content = text if isinstance(group.prompt, str) else (Message("assistant", text),)
    return Group(group.prompt, (Response(content, finished=False),), tools=group.tools)


def _made(name: str, options: ConstraintOptions, method: Method) -> Constraint:
    if options.cost:
        return Cost(name, options)
    if options.penalty == "phrases":
        return OfPhrases(name, options)
    built_in: dict[str, Callable[[ExampleScores], Tensor]] = {"drift": _drift, "log_ratio": _log_ratio}
    value: Any = built_in.get(options.penalty or "") or load_function(
        options.penalty or "", f"method.constraints.{name}.penalty"
    )
    return OfResponses(name, options, value, method.width or None)


def _drift(scored: ExampleScores) -> Tensor:
    assert scored.reference_logp is not None
    return losses.drift(scored.policy_logp, scored.reference_logp, scored.length)


def _log_ratio(scored: ExampleScores) -> Tensor:
    assert scored.reference_logp is not None
    return (scored.policy_logp - scored.reference_logp).abs()


def _mean(values: Tensor, index: Tensor) -> Tensor:
    """[P] means of values [R] over the places [P, n] that are not -1; 0 where there are none."""
    there = index >= 0
    return torch.where(there, values[index.clamp(min=0)], 0.0).sum(1) / there.sum(1).clamp(min=1)
