"""Reference values of a run: from a store what it has, the others by the model; checked where they must be the policy's."""

from __future__ import annotations

import contextlib
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from preftune import processes
from preftune.data.render import Batch
from preftune.errors import RunFailed
from preftune.models.adapters import adapter_off, virtual_tokens
from preftune.runs.job import Job, Keep, planned_rows, scored
from preftune.scoring.selfcheck import VALUES, check_start
from preftune.training.precision import Weights
from preftune.training.signals import Stop
from preftune.training.steps import Plan

log = logging.getLogger("preftune")

OWN = "reference.sqlite"  # in checkpoints/ of a run: the values that it used, whatever becomes of the user's store


def references(
    job: Job, weights: Weights, the_plan: Plan, held_rows: list[int], stop: Stop
) -> tuple[Tensor | None, Tensor | None]:
    """Reference logp of every training row the plan uses, and of the held-out ones; checked where it must be 0. Of a reference
    that moves the values at the start: of the first step's rows, and of the held-out ones."""
    if not job.method.needs_reference:
        return None, None
    first = planned_rows(job.train, the_plan, steps=1)
    rows = first if job.keys.reference.sync_steps else planned_rows(job.train, the_plan)
    with contextlib.closing(_Reference(job, weights, stop)) as source:
        # the first batch by itself: what does not pass the check is not kept for other runs
        fresh: dict[int, Tensor] = {}

        def collect(rows: list[int], tokens: list[Tensor]) -> None:
            fresh.update(zip(rows, tokens, strict=True))

        reference = source.logp(job.train, first, collect)
        policy = scored(job, weights.compute, job.train, first, "check", stop)
        apart = "the reference is another model" if job.load_reference else ""
        if job.load_reference is None:
            start, which = policy, "policy"
            if job.new_adapter and virtual_tokens(job.model):  # what they do to the policy is no fault, what else differs is
                apart, which = "the policy starts with virtual tokens", "policy without its virtual tokens"
                with adapter_off(weights.compute):
                    start = scored(job, weights.compute, job.train, first, "check", stop)
            try:
                worst = check_start(start, reference, job.train, first, dtype=job.dtype)
            except RunFailed:
                if not source.found:
                    raise
                live = source.live(job.train, first, collect)
                worst = check_start(start, live, job.train, first, dtype=job.dtype)
                source.differs(job.train, first, live - reference)
                reference = live
            log.info(f"start check: {which} and reference agree to {worst:.1e} nats per token")
        if apart:
            ratio = (policy - reference)[first]
            log.info(f"{apart}: log-ratios of the first batch {ratio.mean():.3g} +- {ratio.std():.3g} nats")
        source.keep(job.train, list(fresh), list(fresh.values()))
        later = source.logp(job.train, rows[len(first) :])
        held = source.logp(job.held, held_rows)
        if job.stored and job.keys.reference.store != "off":
            total = len(rows) + len(held_rows)
            log.info(f"reference: {source.found:,} of {total:,} responses from {source.place}")
    return torch.where(reference.isnan(), later, reference), held


class _Reference:
    """Reference values: from the store what it has, the others by the model, which is loaded for the first of them."""

    def __init__(self, job: Job, weights: Weights, stop: Stop) -> None:
        self.job, self.weights, self.stop = job, weights, stop
        self.found = 0  # responses that a store had
        self.place = job.stored[-1].store.path if job.stored else None  # of the store that had the last of them
        self._asked = True

    @cached_property
    def model(self) -> Any:
        # before the first step the policy itself is the reference: it is scored once, and no second model is kept
        job = self.job
        return self.weights.beside(job.load_reference()) if job.load_reference else self.weights.compute

    def logp(self, batch: Batch, rows: list[int], keep: Keep | None = None) -> Tensor:
        """[len(batch)] nats of these rows. `keep` is given what the model scored; None: the store is."""
        job = self.job
        known = processes.of_first(self._known(batch, rows))  # the first alone has stores
        missing = [row for row in rows if row not in known]
        values = torch.full((len(batch),), float("nan"))
        if missing:
            own_base = job.new_adapter and not job.load_reference
            off: AbstractContextManager[None] = adapter_off(self.model) if own_base else nullcontext()
            with off:
                values = scored(job, self.model, batch, missing, "reference", self.stop, keep or partial(self.keep, batch))
        for row, tokens in known.items():
            values[row] = tokens.sum()
        self.found += len(known)
        return values

    def _known(self, batch: Batch, rows: list[int]) -> dict[int, Tensor]:
        """What the stores have; those that are asked first are given what only a later one had."""
        known: dict[int, Tensor] = {}
        for n, stored in enumerate(self.job.stored if self._asked else ()):
            found = stored.find(batch, [row for row in rows if row not in known])
            for earlier in self.job.stored[:n]:
                earlier.put(batch, list(found), list(found.values()))
            known |= found
            self.place = stored.store.path if found else self.place
        return known

    def keep(self, batch: Batch, rows: list[int], tokens: list[Tensor]) -> None:
        for stored in self.job.stored:
            stored.put(batch, rows, tokens)

    def live(self, batch: Batch, rows: list[int], keep: Keep) -> Tensor:
        """The same by the model alone, from here on for every row: a run has its values from one source."""
        self._asked, self.found = False, 0
        return self.logp(batch, rows, keep)

    def differs(self, batch: Batch, rows: list[int], by: Tensor) -> None:
        """Says how far the store's values lie from live ones: another cut, another way to the same sums, or damage."""
        worst = max(abs(float(by[row])) / batch.sequences[row].length for row in rows)
        kind = "rounding" if worst <= VALUES[self.job.dtype] else "more than rounding"
        log.warning(
            f"{self.place}: its values differ by {worst:.2g} nats per token ({kind}) from those of this "
            "run, which scores its reference anew and keeps that"
        )

    def close(self) -> None:
        for stored in self.job.stored:
            stored.store.close()
