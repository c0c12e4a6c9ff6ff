"""What the rules of a diagnosis read of a run: its curves with the noise that is on them, its figures, its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

from preftune.report.folder import Json, RunFiles, mapping, number
from preftune.report.words import plain

FEWEST = 10  # steps, under which a curve is an anecdote
FEWEST_ANSWERS = 8
STRETCH = 0.2  # share of the steps that "the end" and "the start" are means over


class NoFigures(Exception):
    """A rule asked for the mean of steps that the run does not have."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Values of neighbouring steps: their mean, and how sure it is, taken as independent draws."""

    steps: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        if not self.values:
            raise NoFigures
        return fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 of a single value, about which nothing is known."""
        return stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else 0.0

    @property
    def where(self) -> str:
        first, last = plain(self.steps[0]), plain(self.steps[-1])
        return f"step {first}" if first == last else f"steps {first}–{last}"


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the steps that have a finite value of it."""

    steps: tuple[float, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    def part(self, low: int, high: int | None = None) -> Stretch:
        return Stretch(self.steps[low:high], self.values[low:high])

    @property
    def end(self) -> Stretch:
        """The last fifth, at least five steps where there are as many."""
        return self.part(-max(5, round(STRETCH * len(self))))

    @property
    def start(self) -> Stretch:
        """The first fifth, at least five steps where there are as many."""
        return self.part(0, max(5, round(STRETCH * len(self))))

    def near(self, step: float, width: float) -> Stretch:
        """The steps at most so far from this one."""
        inside = [n for n, at in enumerate(self.steps) if abs(at - step) <= width]
        return Stretch(tuple(self.steps[n] for n in inside), tuple(self.values[n] for n in inside))


@dataclass(frozen=True)
class Record:
    """A run as the rules see it. `lines`: the training lines of metrics.jsonl; the rest as in its folder."""

    lines: Sequence[Json]
    before: Json
    after: Json
    samples: Sequence[Json]
    settings: Json

    @classmethod
    def of(cls, files: RunFiles) -> Record:
        lines = [line for line in files.metrics if "loss" in line and number(line.get("step")) is not None]
        before, after = (mapping(files.evaluation.get(side)) for side in ("before", "after"))
        return cls(lines, before, after, files.samples, files.settings)

    @cached_property
    def _known(self) -> dict[str, Curve]:
        return {}

    def curve(self, key: str) -> Curve:
        """The finite values of a metric; several rules read the same one."""
        if key not in self._known:
            found = [(float(line["step"]), value) for line in self.lines if (value := number(line.get(key))) is not None]
            self._known[key] = Curve(tuple(step for step, _ in found), tuple(value for _, value in found))
        return self._known[key]

    def has(self, need: str) -> bool:
        """Whether there is enough of a metric; `first.NAME`: in the first step; `before.NAME`, `after.NAME`: a held-out figure;
        `samples`: the lengths of answers."""
        side, _, name = need.partition(".")
        if need == "samples":
            return len(self.lengths) >= FEWEST_ANSWERS
        if name:
            first = self.lines[0] if self.lines else {}
            return number({"first": first, "before": self.before, "after": self.after}[side].get(name)) is not None
        return len(self.curve(need)) >= (2 if need.startswith("eval/") else FEWEST)

    @cached_property
    def lengths(self) -> list[tuple[float, float]]:
        """Tokens of the model's own answers, before and after."""
        both = [(number(row.get("tokens_before")), number(row.get("tokens_after"))) for row in self.samples]
        return [(before, after) for before, after in both if before is not None and after is not None]

    @property
    def beta(self) -> float | None:
        return number(self.after.get("beta")) if self.after else number(self.settings.get("beta"))

    @property
    def batch_size(self) -> float:
        return number(self.settings.get("batch_size")) or 1.0

    @property
    def moving(self) -> bool:
        """Whether the reference follows the policy, so that log-ratios say little of how far it went."""
        return bool(mapping(self.settings.get("reference")).get("sync_steps"))

    def per_token(self, key: str) -> Curve:
        """`NAME/SIDE` divided by the length of that side, step by step: nats per token."""
        curve, length = self.curve(key), self.curve(f"length/{key.partition('/')[2]}")
        tokens = dict(zip(length.steps, length.values, strict=True))
        steps = tuple(step for step in curve.steps if tokens.get(step))
        values = tuple(value / tokens[step] for step, value in zip(curve.steps, curve.values, strict=True) if tokens.get(step))
        return Curve(steps, values)
