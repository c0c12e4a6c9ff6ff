"""What is wrong with a run, in words: a table of patterns, each with its evidence, its threshold and what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from preftune.report import rules
from preftune.report.folder import RunFiles
from preftune.report.record import FEWEST, FEWEST_ANSWERS, NoFigures, Record
from preftune.report.words import count, figure, percent


@dataclass(frozen=True, slots=True)
class Finding:
    """A pattern that a run shows. page: in the sources, what it looks like, why it happens, what to do."""

    name: str
    title: str
    evidence: str
    threshold: str
    change: str
    page: str

    @property
    def line(self) -> str:
        """For the terminal."""
        return f"{self.title}: {self.evidence}. {self.change} ({self.page})"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table. needs: any of these lets it judge; several names in one stand together (see `Record.has`)."""

    judge: Callable[[Record], str | None]
    title: str
    needs: tuple[str, ...]
    threshold: str
    change: str

    @property
    def name(self) -> str:
        return self.judge.__name__

    @property
    def page(self) -> str:
        return f"docs/diagnosis/{self.name}.md"

    def can_judge(self, run: Record) -> bool:
        return any(all(run.has(name) for name in together.split()) for together in self.needs)

    def found(self, run: Record) -> Finding | None:
        try:
            evidence = self.judge(run) if self.can_judge(run) else None
        except NoFigures:  # there are enough steps, but not of those that count
            evidence = None
        return Finding(self.name, self.title, evidence, self.threshold, self.change, self.page) if evidence else None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """findings: what was found, in the order of the table. unjudged: (title, what the run does not have for it)."""

    findings: tuple[Finding, ...]
    unjudged: tuple[tuple[str, str], ...]
    looked_for: int

    @property
    def said(self) -> str:
        judged = count(self.looked_for - len(self.unjudged), "patterns")
        found = f"{len(self.findings)} found" if self.findings else "none found"
        return f"{judged} looked for, {found}."


_RATIOS = "log_ratio/chosen length/chosen"

RULES = (
    Rule(
        rules.reference_mismatch,
        "The reference is not where the policy starts",
        ("first.log_ratio/chosen",),
        f"log-ratios at step 1 over {rules.MISMATCH:g} nats per token",
        "Leave `reference` away, unless another one is meant; check that both got the same chat template.",
    ),
    Rule(
        rules.learning_rate_too_high,
        "Learning rate too high",
        ("loss grad_norm",),
        f"training loss at the end {percent(rules.RISEN)} above its start; or peaks of loss and gradient; "
        f"or {rules.FAR:g} nats per token lost on both sides alike",
        "Divide `learning_rate` by three to ten.",
    ),
    Rule(
        rules.learning_rate_too_low,
        "Nothing was learned",
        (f"{_RATIOS} length/rejected margin",),
        f"answers moved by less than {rules.UNMOVED:g} nats per token",
        "Three to ten times the `learning_rate`, or more steps; an adapter takes ten times that of all weights.",
    ),
    Rule(
        rules.beta_too_small,
        "Beta too small",
        (f"{_RATIOS} length/rejected margin", "after.kl margin"),
        f"KL over {rules.KL_BUDGET:g} nats per response, or {rules.FAR:g} nats per token on the judged answers, "
        f"with beta * margin under {figure(rules.SURE)}",
        "Two to five times the `beta`, or fewer steps.",
    ),
    Rule(
        rules.beta_too_large,
        "Beta too large",
        ("margin reward/chosen",),
        f"beta * margin over {figure(rules.AGREED)} at a margin, and a KL, under {rules.HARDLY:g} nat",
        "A tenth of the `beta`.",
    ),
    Rule(
        rules.likelihood_displacement,
        "Chosen answers got less likely",
        ("logp/chosen length/chosen",),
        f"{rules.FALLEN:g} nats per token lost on the chosen answers",
        "A larger `beta` or fewer steps; `method=rpo`, `nca` or `dpop` hold the chosen answers up.",
    ),
    Rule(
        rules.length_drift,
        "The length of answers drifts",
        ("samples",),
        f"the mean length changed by a factor of {rules.LONGER:g}, over {FEWEST_ANSWERS} answers or more, "
        "and by more than twice the standard error",
        "`method=ld_dpo`, `ln_dpo` or `r_dpo`; or pairs of about equal length.",
    ),
    Rule(
        rules.overfitting,
        "Overfitting",
        ("margin eval/accuracy", "margin before.loss after.loss"),
        f"held-out accuracy {100 * rules.DROPPED:g} points and two standard errors under its best, with a growing margin; "
        f"or a held-out loss {percent(rules.RISEN)} above the untrained one",
        "Fewer epochs, and `train.eval_every`, so that the best weights are kept; `method=ipo`; more prompts.",
    ),
    Rule(
        rules.noisy_labels,
        "Labels are mostly noise",
        (f"accuracy {_RATIOS}",),
        f"accuracy on unseen rows within {percent(1 - rules.CHANCE)} to {percent(rules.CHANCE)}, "
        f"on {rules.FEWEST_UNSEEN} or more, after answers moved by {rules.HARDLY:g} nat",
        "Read twenty pairs yourself; see whether the sides are swapped in a part; `data.votes`, soft labels, `method=robust`.",
    ),
    Rule(
        rules.accuracy_stuck,
        "Accuracy is stuck at 0 or 1",
        ("accuracy",),
        f"exactly 0 or 1 over the later half of the first epoch or held out, on {rules.FEWEST_STUCK} comparisons or more",
        "At 0: swap chosen and rejected. At 1: look for what gives the answer away, such as an ending or a format.",
    ),
    Rule(
        rules.data_too_easy,
        "Data too easy",
        ("accuracy", "before.logp_accuracy"),
        f"{percent(rules.EASY)} ranked right before training, or after a fifth of the first epoch",
        "Pairs that are closer to each other, or fewer of these; look for a leak.",
    ),
)


def diagnose(files: RunFiles) -> Diagnosis:
    """Every pattern of the table, looked for in the files of a run."""
    run = Record.of(files)
    findings = tuple(found for rule in RULES if (found := rule.found(run)))
    return Diagnosis(findings, tuple((rule.title, _lacks(rule, run)) for rule in RULES if not rule.can_judge(run)), len(RULES))


def _lacks(rule: Rule, run: Record) -> str:
    """What would have let a rule judge, by its first way."""
    missing = [name for name in rule.needs[0].split() if not run.has(name)]
    if missing == ["samples"]:
        return f"fewer than {FEWEST_ANSWERS} sampled answers with their lengths"
    figures = [f"{name} {WHEN[side]}" for side, _, name in (one.partition(".") for one in missing) if name]
    curves = [name for name in missing if "." not in name]
    if curves:
        figures.append(f"{' and '.join(curves)} on {count(FEWEST, 'steps')} or more")
    return f"no {', no '.join(figures)}"


WHEN = {"first": "at step 1", "before": "before training", "after": "after training"}
