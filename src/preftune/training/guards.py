"""What the figures of a run warn of, from the lines of its steps alone. No torch.

A guard sees the lines of a run in order. A run that goes on after a stop shows it the earlier ones again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

WINDOW, LEAST = 50, 20  # steps that a loss is compared with, and how many there have to be
# of 1.4826 * MAD, which is the standard deviation of normal noise. Tails of batch means are heavier: where they fall off as
# exp(-|x|), 10 of these are passed once in 60,000 steps
SPIKE = 10.0
RISE = 0.2  # of the first loss: where it hardly varies, a small rise is many deviations
STILL = 3  # steps without a gradient: one may hold nothing but ties
SURE = 2.0  # standard errors that held-out accuracy lies below its best, in two evaluations in a row


@dataclass(frozen=True, slots=True)
class Warned:
    """step: of the line that showed it. kind: one of loss_spike, zero_gradient, skipped_step, overfitting, kl_budget,
    held_out_not_finite."""

    step: int
    kind: str
    message: str


class Guards:
    """Warns of each kind once.

    Args:
        comparisons: held out, that an accuracy is the mean of.
        kl_budget: nats per response; None: none.
    """

    def __init__(self, comparisons: int = 0, kl_budget: float | None = None) -> None:
        self.comparisons, self.kl_budget = comparisons, kl_budget
        self.warned: list[Warned] = []
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._first: float | None = None
        self._still = 0
        self._margins: list[float] = []  # since the last evaluation
        self._best = (-math.inf, 0.0)  # held-out accuracy, and the training margin before it
        self._below = 0

    def see(self, line: Mapping[str, Any]) -> list[Warned]:
        """What this line shows for the first time."""
        found = {
            "skipped_step": self._skipped(line),
            "loss_spike": self._spike(line),
            "zero_gradient": self._zero(line),
            "held_out_not_finite": self._held_out(line),
            "overfitting": self._overfitting(line),
            "kl_budget": self._kl(line),
        }
        known = {warned.kind for warned in self.warned}
        new = [Warned(line["step"], kind, said) for kind, said in found.items() if said and kind not in known]
        self.warned += new
        return new

    def _skipped(self, line: Mapping[str, Any]) -> str | None:
        return "its loss or gradient was not finite, and no weight was moved by it" if line.get("skipped") else None

    def _spike(self, line: Mapping[str, Any]) -> str | None:
        loss: float | None = line.get("loss")
        if loss is None or line.get("skipped"):
            return None
        first = self._first = loss if self._first is None else self._first
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < LEAST:
            return None
        usual = median(before)
        spread = 1.4826 * median(abs(one - usual) for one in before)
        if loss - usual <= max(SPIKE * spread, RISE * abs(first)):
            return None
        return (
            f"the loss jumped to {loss:.4g}, and was {usual:.4g} with a spread of {spread:.2g} over the {len(before)} steps "
            "before: look at the rows of this step, or lower learning_rate or train.max_grad_norm"
        )

    def _zero(self, line: Mapping[str, Any]) -> str | None:
        self._still = self._still + 1 if line.get("grad_norm") == 0 else 0
        if self._still < STILL:
            return None
        return (
            f"the gradient has been exactly 0 for {STILL} steps: nothing is learned. Either no weight that trains is used, or "
            "the loss is flat on all examples (a hinge that all have passed, a beta so large that it saturates)"
        )

    def _held_out(self, line: Mapping[str, Any]) -> str | None:
        if "eval/loss" not in line or line["eval/loss"] is not None:
            return None
        return "the held-out loss is not finite: these weights are not kept as the best"

    def _overfitting(self, line: Mapping[str, Any]) -> str | None:
        if line.get("margin") is not None:
            self._margins.append(line["margin"])
        accuracy = line.get("eval/accuracy", line.get("eval/logp_accuracy"))
        if accuracy is None or not self._margins or not self.comparisons:
            return None
        margin, self._margins = fmean(self._margins), []
        best, then = self._best
        if accuracy >= best:
            self._best, self._below = (accuracy, margin), 0
            return None
        # add one right and one wrong: an accuracy of 1 on a few comparisons has an error, too
        share = (best * self.comparisons + 1) / (self.comparisons + 2)
        error = math.sqrt(share * (1 - share) / self.comparisons)
        self._below = self._below + 1 if best - accuracy > SURE * error and margin > then else 0
        if self._below < 2:
            return None
        return (
            f"held-out accuracy fell from {best:.1%} to {accuracy:.1%} while the margin on training rows rose from {then:.3g} "
            f"to {margin:.3g} nats: it learns these rows by heart. train.early_stop ends there; a larger beta, a lower "
            "learning_rate or more data help"
        )

    def _kl(self, line: Mapping[str, Any]) -> str | None:
        kl = line.get("eval/kl")
        if kl is None or self.kl_budget is None or kl <= self.kl_budget:
            return None
        return (
            f"the KL from the reference is {kl:.3g} nats per response, over train.kl_budget={self.kl_budget:g}: raise beta, "
            "lower learning_rate, or end here"
        )


def written(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as JSON takes them, which has no word for what is not finite: None."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in figures.items()}
