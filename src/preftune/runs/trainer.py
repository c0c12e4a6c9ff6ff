"""One training run: reference values first, then steps with held-out evaluations between them, then the verdict.

Nothing here knows where data or models came from; `runs.train` and `preftune.fit` bring them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal as signals
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from preftune.data.render import render_prompts
from preftune.errors import Interrupted, RunFailed
from preftune.evaluation.held_out import held_out, method_metrics, needed_rows, right_order
from preftune.evaluation.intervals import mean_interval
from preftune.evaluation.kl import kl_per_response
from preftune.generation.sample import Sample, Sampling, sample, with_room
from preftune.methods.pairs import comparisons
from preftune.models.load import save_model
from preftune.models.randomness import random_state_kept
from preftune.records import Group
from preftune.runs.costs import with_samples
from preftune.runs.job import Job, Run, Stopped, advancing, plan_of, planned_rows, scored, stop_here
from preftune.runs.reference import references
from preftune.scoring.scorer import Scorer
from preftune.scoring.selfcheck import check_path
from preftune.training import trackers
from preftune.training.memory import is_out_of_memory
from preftune.training.moving import Moving
from preftune.training.precision import Weights, in_precision
from preftune.training.signals import Stop
from preftune.training.steps import steps

log = logging.getLogger("preftune")

SAMPLES = 20  # prompts answered before and after
NEW_TOKENS = 128


def run(job: Job, stop: Stop) -> Run:
    """Trains `job.model` in place and returns what was measured.

    Args:
        job: what the run is made of.
        stop: asked after every pass, so that a signal is answered within one.

    Raises:
        RunFailed: the first invariant does not hold, or a step is not finite; what was trained is in checkpoints/.
        Interrupted: after Ctrl-C or SIGTERM, with the weights in checkpoints/.
    """
    keys = job.keys
    weights = Weights(job.model, job.dtype)
    the_plan = plan_of(job.method, job.train, keys)
    result = Run(job.model, job.method.name, out=job.out)
    rows = needed_rows(job.held, job.method)
    with _open_metrics(job) as sink, _seeded(keys.seed, job.model.device), contextlib.ExitStack() as taken:
        try:
            job = with_samples(job, weights, stop)
            the_plan = plan_of(job.method, job.train, keys)
            scorer = Scorer(weights.compute, share=keys.train.sharing != "off")
            first = planned_rows(job.train, the_plan, steps=1)
            check_path(scorer, job.train, first, dtype=job.dtype, budget=keys.train.tokens_per_microbatch)
            reference, held_reference = references(job, weights, the_plan, rows, stop)
            start = scored(job, weights.compute, job.held, rows, "evaluate", stop)
            result.before = _figures(job, start, held_reference)
            prompts = _sample_prompts(job)
            answers = _answers(job, weights, prompts, stop)
            best = _Best(weights, job)
            moving = _moving(job, weights)
            taking = steps(weights, job.train, job.method, the_plan, reference, moving)
            for line in taken.enter_context(contextlib.closing(taking)):
                number = line["step"]
                result.metrics.append(line)
                try:
                    if keys.train.eval_every and (number % keys.train.eval_every == 0 or number == len(the_plan)):
                        now = scored(job, weights.compute, job.held, rows, "evaluate", stop)
                        line |= {f"eval/{k}": v for k, v in _held_line(job, now, held_reference).items()}
                        best.offer(number, line.get("eval/loss"))
                finally:  # the step was taken, whatever becomes of its evaluation
                    sink(line)
                job.progress("train", number, len(the_plan), line)
                if keys.train.save_every and number % keys.train.save_every == 0:
                    _checkpoint(job, weights, number)
                stop_here(stop)
            result.kept_step = best.restore() or len(the_plan)
            final = scored(job, weights.compute, job.held, rows, "evaluate", stop)
            result.after = _figures(job, final, held_reference)
            later = _answers(job, weights, prompts, stop)
            result.after |= _kl(job, weights, later, stop)
            result.samples = _side_by_side(job, prompts, answers, later)
        except (Stopped, KeyboardInterrupt) as stopped:
            number = stop.signal or signals.SIGINT
            done = len(result.metrics)
            raise Interrupted(
                f"stopped by {signals.Signals(number).name} after step {done} of {len(the_plan)}"
                f"{_saved_at(job, weights, done)}",
                signal_number=number,
            ) from stopped
        except Exception as error:  # nothing that was trained is lost, whatever it is
            saved = _saved_at(job, weights, len(result.metrics)) if result.metrics else ""
            if isinstance(error, RunFailed):
                error.message += saved
                raise
            if is_out_of_memory(error):
                line = f"out of memory: lower train.tokens_per_microbatch or max_length{saved}"
                raise RunFailed(line, code="out_of_memory") from error
            log.warning(f"stopped after step {len(result.metrics)} of {len(the_plan)}{saved}")
            raise
    return result


def _moving(job: Job, weights: Weights) -> Moving | None:
    options = job.keys.reference
    if not options.sync_steps or not job.method.needs_reference:
        return None
    log.info(
        f"reference: every {options.sync_steps:,} steps {options.sync_alpha:g} of the way to the policy, scored in each step; "
        "held-out figures are against the start"
    )
    return Moving(weights, every=options.sync_steps, alpha=options.sync_alpha)


def _saved_at(job: Job, weights: Weights, step: int) -> str:
    """Saves where there is a folder, and says where."""
    return f"; the weights are in {_checkpoint(job, weights, step)}" if job.out else ""


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Generator[None]:
    """An adapter's dropout draws from torch's generator: seeded inside, and left as it was outside."""
    with random_state_kept(device):
        torch.manual_seed(seed)
        yield


# -- held-out figures -------------------------------------------------------------------------------------


def _figures(job: Job, policy: Tensor, reference: Tensor | None) -> dict[str, Any]:
    return held_out(job.held, job.method, policy, reference, seed=job.keys.seed)


def _held_line(job: Job, policy: Tensor, reference: Tensor | None) -> dict[str, float]:
    line = method_metrics(job.held, job.method, policy, reference)
    if job.method.head == "scalar":
        return line
    right = right_order(job.held, policy)
    return line | ({"logp_accuracy": float(right.nanmean())} if bool((~right.isnan()).any()) else {})


class _Best:
    """The weights with the lowest held-out loss, in memory and in checkpoints/best."""

    def __init__(self, weights: Weights, job: Job) -> None:
        self.weights, self.job = weights, job
        self.loss, self.step, self.kept = float("inf"), 0, list[Tensor]()

    def offer(self, step: int, loss: float | None) -> None:
        if not self.job.keys.train.keep_best or loss is None or not loss < self.loss:
            return
        self.loss, self.step = loss, step
        self.kept = [m.detach().clone() for m in self.weights.masters]
        if self.job.out:
            save_model(self.weights.compute, self.job.tokenizer, self.job.out / "checkpoints" / "best")

    @torch.no_grad()
    def restore(self) -> int | None:
        """Puts the kept weights back, and says of which step they are; None where none were kept."""
        if not self.kept:
            return None
        for master, kept in zip(self.weights.masters, self.kept, strict=True):
            master.copy_(kept)
        self.weights.refresh()
        log.info(f"kept: the weights of step {self.step}, with the lowest held-out loss ({self.loss:.4f})")
        return self.step


# -- answers before and after ---------------------------------------------------------------------------------------------


def _sample_prompts(job: Job) -> tuple[list[Group], list[tuple[int, ...]]]:
    if job.method.head == "scalar":  # it writes no text
        return [], []
    groups = list(job.held.groups or job.train.groups)[:SAMPLES]
    ids = render_prompts(groups, job.tokenizer, template=job.keys.data.template)
    fitting = with_room(job.model, ids)
    return [groups[n] for n in fitting], [ids[n] for n in fitting]


def _answers(job: Job, weights: Weights, prompts: tuple[list[Group], list[tuple[int, ...]]], stop: Stop) -> list[Sample]:
    how = Sampling(max_new_tokens=NEW_TOKENS, seed=job.keys.seed)
    advance = advancing(job, "sample", len(prompts[1]), stop)
    return sample(weights.compute, job.tokenizer, prompts[1], how, progress=advance)


def _side_by_side(
    job: Job, prompts: tuple[list[Group], list[tuple[int, ...]]], before: list[Sample], after: list[Sample]
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for n, (group, ids) in enumerate(zip(*prompts, strict=True)):
        line = {
            "prompt": job.tokenizer.decode(ids, skip_special_tokens=True),
            "before": before[n].text,
            "after": after[n].text,
        }
        pairs = comparisons([group])
        if pairs:
            content = group.responses[pairs[0].responses[0]].content
            line["chosen"] = content if isinstance(content, str) else "\n".join(m.content for m in content)
        lines.append(line)
    return lines


def _kl(job: Job, weights: Weights, samples: list[Sample], stop: Stop) -> dict[str, Any]:
    """KL of the trained policy from its reference, on the answers it just gave; nothing where the reference is gone."""
    off = job.new_adapter and job.load_reference is None  # the base under the adapter is the reference
    load = job.load_reference or job.load_start
    if not samples or not job.method.needs_reference or (not off and load is None):
        return {}
    reference = None if off or load is None else in_precision(load(), job.dtype)
    advance = advancing(job, "kl", len(samples), stop)
    values = kl_per_response(weights.compute, reference, samples, without_adapter=off, progress=advance)
    found = mean_interval(values, range(len(values)), seed=job.keys.seed)
    assert found is not None
    return {"kl": found[0], "kl_samples": len(values), "kl_interval": found[1]}


# -- files ------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_metrics(job: Job) -> Generator[Callable[[dict[str, Any]], None]]:
    """A function that appends a line to metrics.jsonl (flushed) and to the trackers."""
    if job.out is None:
        yield lambda line: None
        return
    open_trackers = trackers.start(job.keys.train.trackers, job.out)
    try:
        with (job.out / "metrics.jsonl").open("w", encoding="utf-8") as file:
            yield lambda line: _write(line, file, open_trackers)
    finally:
        for tracker in open_trackers:
            tracker.close()


def _write(line: dict[str, Any], file: TextIO, open_trackers: list[trackers.TensorBoard]) -> None:
    file.write(json.dumps(line, allow_nan=False) + "\n")
    file.flush()
    for tracker in open_trackers:
        tracker.log(line)


def _checkpoint(job: Job, weights: Weights, step: int) -> Path:
    assert job.out is not None
    parent = job.out / "checkpoints"
    where = parent / f"step-{step:06d}"
    save_model(weights.compute, job.tokenizer, where)
    for old in sorted(parent.glob("step-*[0-9]"))[: -job.keys.train.keep_checkpoints]:
        shutil.rmtree(old)
    return where
