"""The loop: a generator of optimizer steps. It knows scores, losses and weights, and no method by name."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preftune import processes
from preftune.data.render import Batch
from preftune.errors import RunFailed
from preftune.scoring.score import default_budget
from preftune.scoring.scorer import scorer_of
from preftune.training import optimizers
from preftune.training.gradient import Step, backward
from preftune.training.guards import written
from preftune.training.memory import finer_if_needed, fits, indivisible, memory_gb
from preftune.training.method import Example, Method
from preftune.training.moving import Moving
from preftune.training.options import TrainOptions
from preftune.training.order import Mixing, ordered
from preftune.training.precision import Weights, gradient_norm
from preftune.training.state import Saved, Training

log = logging.getLogger("preftune")

SKIPS = 10  # steps in a row that may be skipped


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does, decided before it starts: every step's examples, and the learning rate it is taken with."""

    batches: tuple[tuple[int, tuple[Example, ...]], ...]  # (epoch from 0, examples)
    learning_rate: float
    options: TrainOptions

    def __len__(self) -> int:
        return len(self.batches)

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 1): a linear rise over the warm-up, then the schedule, ending near 0."""
        total, rise = len(self), math.ceil(self.options.warmup * len(self))
        if step <= rise:
            return self.learning_rate * step / rise
        left = (total - step + 1) / (total - rise + 1)
        shape = {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}
        return self.learning_rate * shape[self.options.schedule]


def plan(
    examples: Sequence[Example],
    *,
    batch_size: int,
    epochs: float,
    steps: int | None,
    seed: int,
    learning_rate: float,
    options: TrainOptions,
    mixing: Mixing | None = None,
) -> Plan:
    """Each epoch's examples in their order (see `order.ordered`), cut into steps: a group's may go on in the next one, and the
    last batch of an epoch may be smaller."""
    assert examples, "nothing to train on is refused before"
    total = count_steps(len(examples), batch_size=batch_size, epochs=epochs, steps=steps)
    batches: list[tuple[int, tuple[Example, ...]]] = []
    for epoch, order in enumerate(ordered(examples, seed, mixing=mixing, curriculum=options.curriculum)):
        batches += [(epoch, tuple(order[at : at + batch_size])) for at in range(0, len(order), batch_size)]
        if len(batches) >= total:
            break
    return Plan(tuple(batches[:total]), learning_rate, options)


def count_steps(examples: int, *, batch_size: int, epochs: float, steps: int | None) -> int:
    """Optimizer steps of a run: `steps` where given, else `epochs` passes over the examples, at least one step."""
    return steps if steps is not None else max(1, round(epochs * math.ceil(examples / batch_size)))


def begin(weights: Weights, the_plan: Plan, moving: Moving | None = None) -> Training:
    """A run before its first step."""
    options = the_plan.options
    optimizer = optimizers.make(options.optimizer, weights.masters, the_plan.learning_rate, options.weight_decay)
    return Training(weights, optimizer, moving, options.tokens_per_microbatch)


def steps(
    training: Training,
    batch: Batch,
    method: Method,
    the_plan: Plan,
    reference_logp: Tensor | None,
    earlier: Saved | None = None,
) -> Generator[dict[str, Any]]:
    """Takes the plan's optimizer steps, and yields each step's metrics, measured before that step's update; of one that is
    skipped too, with `skipped`, and None for what is not finite.

    Args:
        training: from `begin`; between two steps it is what a checkpoint holds.
        batch: all rendered training responses.
        reference_logp: [len(batch)] nats, where the method needs a reference that stays; one that moves is scored each step.
        earlier: tensors and facts of a run of the same plan, which goes on after its last step.

    Raises:
        RunFailed: a loss or gradient that is not finite, or too many in a row, and the optimizer has not stepped on it; a
            micro-batch that does not fit into memory and cannot be cut.
    """
    options, weights, moving = the_plan.options, training.weights, training.moving
    scorer = scorer_of(weights.compute, share=options.shares)
    budget = training.budget or default_budget(scorer.model)

    def taken(examples: Sequence[Example], budget: int) -> tuple[dict[str, float], int]:
        reference = reference_logp
        if moving is not None:
            rows = [batch.index(e.group, r) for e in examples for r in e.rows]
            reference = moving.logp(batch, rows, budget, share=scorer.wanted)
        return backward(scorer, Step.of(scorer, batch, method, examples, reference, budget))

    with weights.collecting(scorer.head):
        if earlier is not None:
            budget = earlier.facts["budget"]
        budget = fits(scorer, training.optimizer, batch, method, [examples for _, examples in the_plan.batches], budget)
        if earlier is not None:
            training.restore(earlier)
            del earlier  # as large as weights and optimizer together
        for number, (epoch, examples) in list(enumerate(the_plan.batches, start=1))[training.step :]:
            began = time.perf_counter()
            training.optimizer.zero_grad(set_to_none=True)
            (line, tokens), budget = finer_if_needed(
                lambda budget, own=examples: taken(own, budget),
                budget,
                least=indivisible(scorer, batch, examples),
                clear=lambda: training.optimizer.zero_grad(set_to_none=True),
            )
            weights.add_up_gradients()
            norm = gradient_norm(weights.masters)
            random = training.random_states()  # an update draws none
            rate, finite = the_plan.rate(number), math.isfinite(line["loss"]) and bool(torch.isfinite(norm))
            if finite:
                training.moves = True
                torch.nn.utils.clip_grads_with_norm_(weights.masters, options.max_grad_norm, norm)
                optimizers.step_at(training.optimizer, rate)
                weights.refresh()
            else:
                _skip_or_stop(training, options, number, line["loss"], norm, examples)
            training.skipped = 0 if finite else training.skipped + 1
            if moving is not None:
                moving.follow(number, weights)
            training.taken(number, budget, random)
            seconds = time.perf_counter() - began
            figures = {
                "step": number,
                "epoch": epoch,
                **line,
                "grad_norm": float(norm),
                **({} if finite else {"skipped": True}),
                "learning_rate": rate,
                **({"pairs_per_s": len(examples) / seconds} if method.width == 2 else {}),
                "tokens_per_s": tokens / seconds,
                "memory_gb": max(processes.gathered(memory_gb())),
            }
            yield written(figures)


def _skip_or_stop(
    training: Training, options: TrainOptions, number: int, loss: float, norm: Tensor, examples: Sequence[Example]
) -> None:
    """A step that is not finite moves no weight; whether the run goes on, its options say."""
    rows = list(dict.fromkeys(f"{e.origin.file} row {e.origin.row}" for e in examples if e.origin))
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    times = training.skipped + 1
    what = f"step {number}: loss {loss}, gradient norm {float(norm)}: not finite" + (f" {times} times in a row" * (times > 1))
    batch = f"Rows of this batch: {', '.join(rows[:5])}{more}"
    if options.not_finite == "skip" and times < SKIPS:
        log.warning(f"{what}: skipped. {batch}")
        return
    kept = f"The weights are those of step {number - times}"
    raise RunFailed(f"{what}. {kept}. {batch}. Lower learning_rate, or look at these rows.", code="not_finite")
