"""What a run is made of, what it leaves, and what its parts share: its plan, scoring by its settings, and the way to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune import processes
from preftune.data.render import Batch
from preftune.evaluation.evaluate import counted
from preftune.keys import TrainKeys
from preftune.scoring.score import score_logp
from preftune.scoring.store import Stored
from preftune.training.method import Example, Method
from preftune.training.order import Mixing
from preftune.training.signals import Stop
from preftune.training.steps import Plan, plan

Progress = Callable[[str, int, int, dict[str, Any]], None]  # phase, done, total, last metrics
Keep = Callable[[list[int], list[Tensor]], None]  # rows of a pass, and nats of each scored token of each


@dataclass
class Run:
    """What a run leaves in memory; `out` is its folder, where it has one."""

    model: Any
    method: str
    metrics: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    kept_step: int | None = None  # whose weights the model has: the last step's, or those of the best evaluation
    out: Path | None = None


@dataclass
class Job:
    """What a run is made of: the model that trains, rendered data, and where the reference comes from.

    `load_reference` gives another model as reference; None: the reference is the starting policy.
    `load_start` gives the starting policy once more, for the KL after training; None where it is gone.
    `stored` has what was scored with the same reference, by this run and by earlier ones: the first that has a value gives it,
    and all are given it.
    `resume` is the whole checkpoint of a run that stopped, which this one goes on for in the same folder.
    """

    model: Any
    tokenizer: Any
    train: Batch
    held: Batch
    method: Method
    keys: TrainKeys
    dtype: torch.dtype
    new_adapter: bool = False
    load_reference: Callable[[], Any] | None = None
    load_start: Callable[[], Any] | None = None
    stored: tuple[Stored, ...] = ()
    out: Path | None = None
    resume: Path | None = None
    progress: Progress = lambda phase, done, total, line: None

    @property
    def writes(self) -> bool:
        """Whether this process has a folder to write: of several the first one alone."""
        return self.out is not None and processes.rank() == 0

    @property
    def in_parts(self) -> bool:
        """Whether the model lies on several processes, a part on each."""
        return self.keys.train.parallel == "fsdp" and processes.size() > 1

    @property
    def again(self) -> str:
        """How the run goes on when it was stopped; "" of one whose data came from memory."""
        return f"train resume={self.out}" if self.out and self.keys.data.sources else ""


def plan_of(method: Method, batch: Batch, keys: TrainKeys) -> Plan:
    """The steps that a resolved run takes over its training data."""
    assert keys.learning_rate is not None, "resolved before a run starts"
    return plan(
        method.examples(batch.groups),
        batch_size=keys.batch_size,
        epochs=keys.epochs,
        steps=keys.steps,
        seed=keys.seed,
        learning_rate=keys.learning_rate,
        options=keys.train,
        mixing=Mixing.of(keys.data.sources),
    )


def rows_of(batch: Batch, examples: Iterable[Example]) -> list[int]:
    """The rows that examples need scores of, each once: they may share some."""
    return list(dict.fromkeys(batch.index(e.group, r) for e in examples for r in e.rows))


def planned_rows(batch: Batch, the_plan: Plan, steps: int | None = None) -> list[int]:
    """The rows that the first steps of a plan use, all steps where none are named."""
    return rows_of(batch, (e for _, examples in the_plan.batches[:steps] for e in examples))


def scored(job: Job, model: Any, batch: Batch, rows: list[int], phase: str, stop: Stop, keep: Keep | None = None) -> Tensor:
    """[len(batch)] nats of these rows, without a graph; what `keep` is given is not kept here."""
    options, advance = job.keys.train, advancing(job, phase, len(rows), stop)
    budget, share = options.tokens_per_microbatch, options.shares
    return score_logp(model, batch, rows, tokens_per_microbatch=budget, share=share, progress=advance, keep=keep)


def advancing(job: Job, phase: str, total: int, stop: Stop) -> Callable[[int], None]:
    """A function that is told how many more are done; a run that was asked to stop does so there."""
    advance = counted(job.progress, phase, total)

    def advance_or_stop(count: int) -> None:
        advance(count)
        stop_here(stop)

    return advance_or_stop


class Stopped(Exception):
    """The flag was set: unwind to where it is saved."""


def stop_here(stop: Stop) -> None:
    """All processes of a run ask at the same places: a signal that came to one of them stops all."""
    stop.signal = max(processes.gathered(stop.signal or 0)) or None
    if stop.signal:
        raise Stopped
