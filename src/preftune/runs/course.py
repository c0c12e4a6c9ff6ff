"""The steps of a run with its evaluations and checkpoints between them, from the first or from where a run stopped."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from preftune import processes
from preftune.evaluation.held_out import held_out, method_metrics, needed_rows, right_order
from preftune.models.load import save_model
from preftune.models.randomness import random_state_kept
from preftune.models.weights import parted, whole, whole_state
from preftune.runs import checkpoint
from preftune.runs.answers import Prompts, answers, kl
from preftune.runs.job import Job, Run, scored, stop_here
from preftune.runs.metrics import Sink
from preftune.training.guards import written
from preftune.training.memory import give_freed_back
from preftune.training.moving import Moving
from preftune.training.precision import Weights
from preftune.training.signals import Stop
from preftune.training.state import Saved
from preftune.training.steps import Plan, begin, steps

log = logging.getLogger("preftune")

BEST = "best.safetensors"  # in checkpoints/: the float32 weights of the best evaluation
MINUTES = 30  # between two checkpoints, where no number of steps is asked for


class Course:
    """The steps of a run, with its evaluations and checkpoints between them."""

    def __init__(
        self,
        job: Job,
        weights: Weights,
        the_plan: Plan,
        held: Tensor | None,
        stop: Stop,
        result: Run,
        sink: Sink,
        prompts: Prompts,
    ) -> None:
        self.job, self.the_plan, self.held, self.stop, self.result, self.sink = job, the_plan, held, stop, result, sink
        self.prompts = prompts
        self.training = begin(weights, the_plan, _moving(job, weights))
        self.best = Best(weights, job)
        self.pending: dict[str, Any] | None = None  # the line of a step whose evaluation was not made yet

    def go(self, reference: Tensor | None) -> None:
        """All steps that are left."""
        job, training = self.job, self.training
        earlier = self._taken_up() if job.resume else None
        taking = steps(training, job.train, job.method, self.the_plan, reference, earlier)
        last = time.monotonic()
        with contextlib.closing(taking):
            if earlier is not None and self.pending is not None:  # stopped within its evaluation
                training.restore_weights(earlier)
                self._evaluated(self.pending)
            if earlier is not None and self._enough():
                training.restore_weights(earlier)
                return
            del earlier  # the steps alone hold it, until they have taken it up
            for line in taking:
                self._evaluated(line)
                job.progress("train", line["step"], len(self.the_plan), line)
                if self._due(line["step"], last):
                    self._save()
                    give_freed_back()
                    last = time.monotonic()
                stop_here(self.stop)
                if self._enough():
                    why = f"no evaluation since step {self.best.step:,} had a lower held-out loss"
                    log.info(f"train.early_stop: ended after step {line['step']:,}: {why}")
                    return

    def measured(self) -> dict[str, Any]:
        """The held-out figures of the weights as they are."""
        job = self.job
        rows = needed_rows(job.held, job.method)
        now = scored(job, self.training.weights.compute, job.held, rows, "evaluate", self.stop)
        return held_out(job.held, job.method, now, self.held, seed=job.keys.seed)

    def saved(self) -> str:
        """Saves where there is a folder, and says where."""
        if self.training.moves:  # a second signal or an error within an update, or before an earlier run was taken up
            return kept(self.job)
        self.best.put_back()
        folder = self._save()
        if self.pending is not None:  # the step was taken, whatever became of its evaluation
            self.sink(self.pending)
        if folder is None:
            return ""
        return f"; the weights are in {folder}" + (f", and {self.job.again} goes on from there" if self.job.again else "")

    def _evaluated(self, line: dict[str, Any]) -> None:
        """The step was taken: its line is complete once it is evaluated, where that is due, and goes to the metrics then."""
        job, number = self.job, line["step"]
        self.pending = line
        if not self.result.metrics or self.result.metrics[-1]["step"] < number:
            self.result.metrics.append(line)
        if self._evaluates(number):
            rows = needed_rows(job.held, job.method)
            now = scored(job, self.training.weights.compute, job.held, rows, "evaluate", self.stop)
            line |= {f"eval/{k}": v for k, v in written(_held_line(job, now, self.held) | self._kl()).items()}
            self.best.offer(number, line.get("eval/loss"))
            give_freed_back()
        self.sink(line)
        self.pending = None

    def _kl(self) -> dict[str, float]:
        """KL from the reference on answers sampled now, where it has a budget."""
        if self.job.keys.train.kl_budget is None or not self.prompts[0]:
            return {}
        weights = self.training.weights
        with random_state_kept(weights.compute.device):  # a model that is loaded may draw
            samples = answers(self.job, weights, self.prompts, self.stop)
            return {"kl": kl(self.job, weights, samples, self.stop)["kl"]}

    def _evaluates(self, number: int) -> bool:
        every = self.job.keys.train.eval_every
        return bool(every) and (number % every == 0 or number == len(self.the_plan))

    def _enough(self) -> bool:
        patience = self.job.keys.train.early_stop
        return patience is not None and self.best.waited >= patience

    def _due(self, number: int, last: float) -> bool:
        if self.job.out is None:
            return False
        every = self.job.keys.train.save_every
        if every is None:
            return processes.of_first(time.monotonic() - last > 60 * MINUTES)
        return bool(every) and number % every == 0

    def _save(self) -> Path | None:
        job, training, best = self.job, self.training, self.best
        if job.out is None:
            return None
        tensors, state = training.tensors(), whole_state(training.weights.compute)  # all take part, the first one writes
        if not best.caught_up() or not job.writes:  # no checkpoint has another one's best weights
            return None
        place = job.out / "checkpoints"
        facts = training.facts() | {"pending": self.pending, "best": [best.step, best.loss, best.waited] if best.step else None}

        def write() -> Path:
            self.sink.flush()
            return checkpoint.save(
                place,
                training.step,
                Saved(tensors, facts),
                lambda folder: save_model(training.weights.compute, job.tokenizer, folder, state=state),
                beside=place / BEST if best.step else None,
                keep=job.keys.train.keep_checkpoints,
            )

        return checkpoint.tried(f"the checkpoint of step {training.step:,}", place, write)

    def _taken_up(self) -> Saved:
        """What the run that stopped had come to."""
        job = self.job
        assert job.resume is not None and job.out is not None
        saved = checkpoint.load(job.resume)
        step = saved.facts["step"]
        if saved.facts["best"]:
            self.best.take_up(job.resume / BEST, *saved.facts["best"])
        self.pending = saved.facts["pending"]
        self.result.metrics += processes.of_first(self.sink.lines)  # it alone has read them
        if self.pending is not None:
            self.result.metrics.append(self.pending)
        log.info(f"going on after step {step:,} of {len(self.the_plan):,}")
        return saved


class Best:
    """The weights with the lowest held-out loss, in memory, and in checkpoints/ as a model and in float32.

    waited: evaluations since then. behind: the file in checkpoints/ is of an earlier one.
    """

    def __init__(self, weights: Weights, job: Job) -> None:
        self.weights, self.job = weights, job
        self.loss, self.step, self.waited = float("inf"), 0, 0
        self.kept, self.restored, self.behind = list[Tensor](), False, False

    def offer(self, step: int, loss: float | None) -> None:
        if loss is None or not math.isfinite(loss) or loss >= self.loss:
            self.waited += 1
            return
        if self.job.keys.train.keep_best:
            self.kept = [m.detach().clone() for m in self.weights.masters]
            state = whole_state(self.weights.compute) if self.job.out else None
            self._put(step, lambda place, tensors: self._write(place, tensors, state))
        # last: where it was not written to its end, a run that goes on evaluates this step again
        self.loss, self.step, self.waited = loss, step, 0

    def caught_up(self) -> bool:
        """Whether the file is that of these weights; they are written once more where a full disk had no room for them."""
        if processes.of_first(self.behind) if self.job.in_parts else self.behind:
            self._put(self.step, lambda place, tensors: checkpoint.write_tensors(place / BEST, tensors))
        return not self.behind

    def _put(self, step: int, write: Callable[[Path, dict[str, Tensor]], Path]) -> None:
        if self.job.out is None:
            return
        place, tensors = self.job.out / "checkpoints", dict(zip(self.weights.names, map(whole, self.kept), strict=True))
        if self.job.writes:
            what = f"the best evaluation, of step {step:,},"
            self.behind = checkpoint.tried(what, place, lambda: write(place, tensors)) is None

    def _write(self, place: Path, tensors: dict[str, Tensor], state: dict[str, Tensor] | None) -> Path:
        save_model(self.weights.compute, self.job.tokenizer, place / "best", state=state)
        return checkpoint.write_tensors(place / BEST, tensors)

    def take_up(self, path: Path, step: int, loss: float, waited: int) -> None:
        """What a run that stopped had kept, at its checkpoint; later it may have kept something else."""
        self.step, self.loss, self.waited = step, loss, waited
        if not path.is_file():  # train.keep_best=false
            return
        found = load_file(path)
        if self.job.writes and self.job.out:
            checkpoint.write_tensors(self.job.out / "checkpoints" / BEST, found)
        pairs = zip(self.weights.names, self.weights.masters, strict=True)
        self.kept = [parted(found[name].to(m.device), m) for name, m in pairs]

    def restore(self) -> int | None:
        """Puts the kept weights into the model, and says of which step they are; None where none were kept."""
        if not self.kept:
            return None
        self._swap()
        log.info(f"kept: the weights of step {self.step}, with the lowest held-out loss ({self.loss:.4f})")
        return self.step

    def put_back(self) -> None:
        """The last step's weights, where `restore` took them away."""
        if self.restored:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for master, kept in zip(self.weights.masters, self.kept, strict=True):
            last = master.clone()
            master.copy_(kept)
            kept.copy_(last)
        self.weights.refresh()
        self.restored = not self.restored


def kept(job: Job) -> str:
    """Says from where the run can go on, where nothing more can be saved."""
    if job.out is None or not job.again:
        return ""
    newest = checkpoint.newest(job.out / "checkpoints")
    return f"; {job.again} " + (f"goes on from {newest.name}" if newest else "begins anew: there is no checkpoint yet")


def _moving(job: Job, weights: Weights) -> Moving | None:
    options = job.keys.reference
    if not options.sync_steps or not job.method.needs_reference:
        return None
    log.info(
        f"reference: every {options.sync_steps:,} steps {options.sync_alpha:g} of the way to the policy, scored in each step; "
        "held-out figures are against the start"
    )
    return Moving(weights, every=options.sync_steps, alpha=options.sync_alpha)


def _held_line(job: Job, policy: Tensor, reference: Tensor | None) -> dict[str, float]:
    line = method_metrics(job.held, job.method, policy, reference)
    if job.method.head == "scalar":
        return line
    right = right_order(job.held, policy)
    return line | ({"logp_accuracy": float(right.nanmean())} if bool((~right.isnan()).any()) else {})
