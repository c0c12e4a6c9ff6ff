"""One training run: reference values first, then steps with held-out evaluations between them, then the verdict.

Nothing here knows where data or models came from; `runs.train` and `preftune.fit` bring them. A run that goes on after a stop
begins like any other, on the weights that it began with, and takes up what its checkpoint holds before the next step.
"""

from __future__ import annotations

import contextlib
import logging
import signal as signals
from collections.abc import Generator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from preftune import processes
from preftune.errors import Interrupted, RunFailed
from preftune.evaluation.held_out import held_out, needed_rows
from preftune.generation.sample import Sample
from preftune.methods.pairs import comparisons
from preftune.models.randomness import random_state_kept
from preftune.runs import checkpoint
from preftune.runs import folder as files
from preftune.runs.answers import Prompts, answers, kl, sample_of, sample_prompts, side_by_side
from preftune.runs.costs import with_samples
from preftune.runs.course import Course, kept
from preftune.runs.job import Job, Run, Stopped, plan_of, planned_rows, scored
from preftune.runs.metrics import open_metrics
from preftune.runs.reference import references
from preftune.scoring.scorer import Scorer
from preftune.scoring.selfcheck import check_path
from preftune.training.guards import Guards
from preftune.training.memory import give_freed_back, is_out_of_memory
from preftune.training.precision import Weights
from preftune.training.signals import Stop
from preftune.training.steps import Plan

log = logging.getLogger("preftune")

START = "start.json"  # in checkpoints/: what was measured before the first step


def run(job: Job, stop: Stop) -> Run:
    """Trains `job.model` in place and returns what was measured.

    Args:
        job: what the run is made of.
        stop: asked after every pass, so that a signal is answered within one.

    Raises:
        RunFailed: the first invariant does not hold, or a step is not finite; what was trained is in checkpoints/.
        Interrupted: after Ctrl-C or SIGTERM, with what was trained in checkpoints/.
    """
    the_plan = plan_of(job.method, job.train, job.keys)
    if job.in_parts:  # the check calls the model in ways that one in parts does not know
        _check(job.model, job, the_plan)
    weights = Weights(job.model, job.dtype, in_parts=job.in_parts, share=job.keys.train.shares)
    result = Run(job.model, job.method.name, out=job.out)
    with _seeded(job.keys.seed, job.model.device), contextlib.ExitStack() as taken:
        course: Course | None = None
        try:
            job = with_samples(job, weights, stop)
            the_plan = plan_of(job.method, job.train, job.keys)
            if not job.in_parts:
                _check(weights.compute, job, the_plan)
            reference, held = references(job, weights, the_plan, needed_rows(job.held, job.method), stop)
            prompts = sample_prompts(job)
            result.before, earlier = _before(job, weights, held, prompts, stop)
            guards = Guards(len(comparisons(job.held.groups)), job.keys.train.kl_budget)
            place = job.out if job.writes else None
            sink = taken.enter_context(open_metrics(place, job.keys, guards, after=_measured_until(job)))
            course = Course(job, weights, the_plan, held, stop, result, sink, prompts)
            course.go(reference)
            give_freed_back()  # for the reference, which is loaded again for the KL
            result.kept_step = course.best.restore() or result.metrics[-1]["step"]
            result.after = course.measured()
            later = answers(job, weights, prompts, stop)
            result.after |= kl(job, weights, later, stop)
            result.samples = side_by_side(job, prompts, earlier, later)
        except (Stopped, KeyboardInterrupt) as stopped:
            number = stop.signal or signals.SIGINT
            line = f"stopped by {signals.Signals(number).name} after step {_taken(job, result)} of {len(the_plan)}"
            raise Interrupted(line + (course.saved() if course else kept(job)), signal_number=number) from stopped
        except Exception as error:  # nothing that was trained is lost, whatever it is
            # in parts it takes all processes to save, and these errors may have come to this one alone
            alone = job.in_parts and (not isinstance(error, RunFailed) or error.code == "out_of_memory")
            saved = (kept(job) if alone else course.saved()) if course and result.metrics else ""
            if isinstance(error, RunFailed):
                error.message += saved
                raise
            if is_out_of_memory(error):
                where = f" in process {processes.rank()} of {processes.size()}" if processes.size() > 1 else ""
                budget = course.training.budget if course else job.keys.train.tokens_per_microbatch
                half = f"={budget // 2}" if budget else ""
                line = f"out of memory{where}: lower train.tokens_per_microbatch{half} or max_length{saved}"
                raise RunFailed(line, code="out_of_memory") from error
            if processes.is_lost(error):
                done = _taken(job, result)
                line = f"another process of this run has ended, after step {done}: its own line says why{saved}"
                raise RunFailed(line, code="lost_process") from error
            log.warning(f"stopped after step {_taken(job, result)} of {len(the_plan)}{saved}")
            raise
    return result


def _check(model: Any, job: Job, the_plan: Plan) -> None:
    """That the first rows are scored right by the path that the run takes."""
    scorer, first = Scorer(model, share=job.keys.train.shares), planned_rows(job.train, the_plan, steps=1)
    check_path(scorer, job.train, first, dtype=job.dtype, budget=job.keys.train.tokens_per_microbatch)


def _taken(job: Job, result: Run) -> int:
    """The steps that were taken, by an earlier part of the run too."""
    return len(result.metrics) or (checkpoint.facts_of(job.resume)["step"] if job.resume else 0)


def _measured_until(job: Job) -> int:
    """The last step whose line in metrics.jsonl stays."""
    if job.resume is None:
        return 0
    known = checkpoint.facts_of(job.resume)
    return known["step"] - (known["pending"] is not None)


def _before(
    job: Job, weights: Weights, held: Tensor | None, prompts: Prompts, stop: Stop
) -> tuple[dict[str, Any], list[Sample]]:
    """Held-out figures and answers of the start: measured, or of a run that goes on what was measured then."""
    place = job.out / "checkpoints" / START if job.out else None
    if job.resume and place:
        if files.is_sealed(known := files.read_json(place)):
            return known["before"], [sample_of(said) for said in known["answers"]]
        log.warning(f"{place} is damaged: what stands in it is measured again")
    start = scored(job, weights.compute, job.held, needed_rows(job.held, job.method), "evaluate", stop)
    before = held_out(job.held, job.method, start, held, seed=job.keys.seed)
    found = answers(job, weights, prompts, stop)
    if place and job.writes:
        files.write_json(place, files.seal({"before": before, "answers": [asdict(s) for s in found]}))
    return before, found


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Generator[None]:
    """An adapter's dropout draws from torch's generator: seeded inside, and left as it was outside."""
    with random_state_kept(device):
        torch.manual_seed(seed + processes.rank())  # what falls in one process says nothing of another one
        yield
