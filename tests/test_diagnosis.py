"""The diagnosis: each pattern is found in a real run made to have it, none in a healthy one, and each threshold lies where its
page says."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

import preftune
from preftune.records import Group
from preftune.report import diagnosis
from preftune.report.diagnosis import RULES, diagnose
from preftune.report.folder import RunFiles
from preftune.report.record import Record

FOLDER = Path(__file__).parents[1] / "docs/diagnosis"
NAMES = [rule.name for rule in RULES]
WORDS = ("red", "green", "blue", "tall", "short", "wide", "old", "new", "fast", "slow", "warm", "cold", "dry", "wet", "loud")


@pytest.fixture(autouse=True, scope="module")
def few_short_answers() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preftune.runs.answers.NEW_TOKENS", 3)
        patch.setattr("preftune.runs.answers.SAMPLES", 8)
        yield patch


def pairs(count: int, *, seed: int = 0, wrong: float = 0.15) -> list[Group]:
    """The better answer says "and", the other one "not"; a share of the labels is turned around."""
    draw, found = random.Random(seed), list[Group]()
    for n in range(count):
        first, second, asked = draw.sample(WORDS, 3)
        answers = [f"{first} and {second}", f"{first} not {second}"]
        if draw.random() < wrong:
            answers.reverse()
        found.append(tiny.pair(f"{asked} {n}: ", answers[0], answers[1], row=n + 1))
    return found


def alike(count: int) -> list[Group]:
    """Answers that differ in their last letter alone."""
    draw, found = random.Random(0), list[Group]()
    for n in range(count):
        first, second, asked = draw.sample(WORDS, 3)
        found.append(tiny.pair(f"{asked} {n}: ", f"{first} {second} a", f"{first} {second} b", row=n + 1))
    return found


def trained(groups: list[Group], held: list[Group], **keys: Any) -> RunFiles:
    """A real run of a tiny model, as its folder would be read."""
    keys = {"steps": 20, "batch_size": 8, "learning_rate": 1e-3, "dtype": "float32"} | keys
    run = preftune.fit(tiny.model(), tiny.tokenizer(), groups, eval_groups=held, **keys)
    settings = {"batch_size": keys["batch_size"]}
    evaluation = {"before": run.before, "after": run.after}
    return RunFiles(Path("run"), metrics=run.metrics, evaluation=evaluation, samples=run.samples, settings=settings)


@pytest.fixture(scope="module")
def healthy() -> RunFiles:
    return trained(pairs(160), pairs(40, seed=1), train={"eval_every": 10})


def found_in(files: RunFiles) -> dict[str, str]:
    return {finding.name: finding.evidence for finding in diagnose(files).findings}


def test_a_healthy_run_is_judged_in_full_and_found_to_have_nothing(healthy: RunFiles) -> None:
    assert diagnose(healthy) == diagnosis.Diagnosis((), (), len(RULES))
    assert healthy.evaluation["after"]["accuracy"] > 0.7, "it has to have learned something"


# -- real runs made to have it ----------------------------------------------------------------------------------------------


def drifting(patch: pytest.MonkeyPatch) -> RunFiles:
    """Demonstrations of one letter, for a model that writes on and on."""
    patch.setattr("preftune.runs.answers.NEW_TOKENS", 24)
    shown = [tiny.shown(f"{n}: ", "a", row=n + 1) for n in range(40)]
    return trained(shown, shown[:8], method="sft", learning_rate=2e-2)


MADE: dict[str, Any] = {
    "reference_mismatch": lambda: trained(pairs(80), [], reference=tiny.model(seed=1), steps=1),
    "learning_rate_too_high": lambda: trained(pairs(160), [], learning_rate=1.0),
    "learning_rate_too_low": lambda: trained(pairs(80), [], learning_rate=1e-7, steps=10),
    "beta_too_small": lambda: trained(pairs(160), [], beta=0.005, learning_rate=5e-3),
    "beta_too_large": lambda: trained(pairs(160), [], beta=10.0, learning_rate=1e-4),
    "likelihood_displacement": lambda: trained(alike(130), [], learning_rate=0.1, steps=16),
    "overfitting": lambda: trained(pairs(16, wrong=0.3), pairs(40, seed=1, wrong=0.3), beta=1.0, learning_rate=0.01),
    "noisy_labels": lambda: trained(pairs(160, wrong=0.5), pairs(240, seed=1, wrong=0.5), learning_rate=0.01),
    "accuracy_stuck": lambda: trained(pairs(160, wrong=0), [], learning_rate=5e-3),
    "data_too_easy": lambda: trained(pairs(160, wrong=0.01, seed=2), [], learning_rate=5e-3),
}


@pytest.mark.parametrize("name", MADE)
def test_a_run_made_to_have_it_is_found_out(name: str) -> None:
    found = found_in(MADE[name]())
    assert name in found
    assert re.search(r"\d", found[name]), "evidence has figures"


def test_answers_that_get_shorter_are_found_out(few_short_answers: pytest.MonkeyPatch) -> None:
    with few_short_answers.context() as patch:
        assert list(found_in(drifting(patch))) == ["length_drift"]


def test_every_rule_is_triggered_by_a_run() -> None:
    assert {*MADE, "length_drift"} == set(NAMES)


# -- where the thresholds lie, on made-up figures -----------------------------------------------------------------------------


def line(step: int, **changed: float) -> dict[str, Any]:
    """A step of a healthy run of 50, with answers of 20 tokens."""
    noise = 0.01 * (-1) ** step
    values: dict[str, float] = {
        "step": step,
        "epoch": 0,
        "loss": 0.69 - 0.004 * step + noise,
        "grad_norm": 1.0 + noise,
        "learning_rate": 1e-6,
        "margin": 0.2 * (step - 1),
        "accuracy": 0.75 + noise,
        "log_ratio/chosen": -0.02 * (step - 1) + noise * (step > 1),
        "log_ratio/rejected": -0.1 * (step - 1) + noise * (step > 1),
        "logp/chosen": -40.0 + noise,
        "logp/rejected": -45.0 + noise,
        "reward/chosen": -0.02,
        "length/chosen": 20.0,
        "length/rejected": 20.0,
    }
    return values | {name.replace("__", "/"): value for name, value in changed.items()}


def record(change: Any = None, *, before: Any = None, after: Any = None, settings: Any = None, samples: Any = ()) -> Record:
    """The healthy run, with lines changed by `change(step)`, a dict, and figures besides."""
    lines = [line(step, **(change(step) if change else {})) for step in range(1, 51)]
    before = {"loss": 0.69, "logp_accuracy": 0.55, "comparisons": 200} | (before or {})
    after = {"loss": 0.6, "accuracy": 0.7, "comparisons": 200, "kl": 5.0, "beta": 0.1} | (after or {})
    settings = {"batch_size": 16, "beta": 0.1} | (settings or {})
    return Record(lines, before, after, samples or answers(20.0), settings)


def answers(after: float, count: int = 12) -> list[dict[str, float]]:
    """Samples of 20 tokens before, and so many after, give or take one."""
    return [{"tokens_before": 20 + n % 2, "tokens_after": after + (n + 1) % 2} for n in range(count)]


def at(name: str, value: float, since: int = 1) -> Any:
    return lambda step: {name: value} if step >= since else {}


def held(*accuracies: float) -> Any:
    """Held-out accuracies at steps 10, 20, ..."""
    return lambda step: {"eval__accuracy": accuracies[step // 10 - 1]} if step % 10 == 0 else {}


def both(value: float) -> Any:
    """Both log-ratios, from the second step on."""
    return lambda step: {"log_ratio__chosen": value, "log_ratio__rejected": value} if step > 1 else {}


def peaks(size: float, height: float) -> Any:
    return lambda step: {"grad_norm": size, "loss": height} if step in (20, 30) else {}


EDGES: dict[str, list[tuple[Record, Record]]] = {  # (just there, just not)
    "reference_mismatch": [
        (record(at("log_ratio__chosen", 0.41)), record(at("log_ratio__chosen", 0.39))),
        (
            record(at("log_ratio__rejected", -9)),
            record(at("log_ratio__rejected", -9), settings={"adapter": {"type": "prefix"}}),
        ),
    ],
    "learning_rate_too_high": [
        (record(at("loss", 0.77, 40)), record(at("loss", 0.74, 40))),
        (record(peaks(10.5, 1.4)), record(peaks(10.5, 1.1))),
        (record(peaks(10.5, 1.4)), record(peaks(9, 1.4))),
        (record(lambda s: both(-10.5)(s) | {"margin": 2}), record(lambda s: both(-10.5)(s) | {"margin": 3})),
        (record(lambda s: both(-10.5)(s) | {"margin": 2}), record(lambda s: both(-9.5)(s) | {"margin": 2})),
    ],
    "learning_rate_too_low": [
        (record(lambda s: both(0.019)(s) | {"margin": 0.1}), record(lambda s: both(0.021)(s) | {"margin": 0.1})),
        (record(lambda s: both(0.019)(s) | {"margin": 0.9}), record(lambda s: both(0.019)(s) | {"margin": 1.1})),
    ],
    "beta_too_small": [
        (record(after={"kl": 21}), record(after={"kl": 19})),
        (record(after={"kl": 21}), record(lambda s: {"margin": 22.5}, after={"kl": 21})),
        (record(at("log_ratio__rejected", -10.5, 2)), record(at("log_ratio__rejected", -9.5, 2))),
        (
            record(at("log_ratio__rejected", -10.5, 2)),
            record(lambda s: {"log_ratio__rejected": -10.5, "margin": 2} if s > 1 else {}),
        ),
    ],
    "beta_too_large": [
        (record(at("margin", 0.9), after={"beta": 1.2, "kl": 0.5}), record(at("margin", 0.9), after={"beta": 1, "kl": 0.5})),
        (record(at("margin", 0.9), after={"beta": 1.2, "kl": 0.5}), record(at("margin", 1.1), after={"beta": 1.2, "kl": 0.5})),
        (record(at("margin", 0.9), after={"beta": 1.2, "kl": 0.5}), record(at("margin", 0.9), after={"beta": 1.2, "kl": 1.5})),
    ],
    "likelihood_displacement": [
        (record(at("log_ratio__chosen", -2.1, 2)), record(at("log_ratio__chosen", -1.9, 2))),
        (
            record(at("log_ratio__chosen", -2.1, 2)),
            record(lambda s: {"log_ratio__chosen": -2.1 + 9 * (-1) ** s} if s > 1 else {}),
        ),
        (
            record(lambda s: at("logp__chosen", -42.1, 40)(s), settings={"reference": {"sync_steps": 5}}),
            record(lambda s: at("logp__chosen", -41.9, 40)(s), settings={"reference": {"sync_steps": 5}}),
        ),
    ],
    "length_drift": [
        (record(samples=answers(25.3)), record(samples=answers(25))),
        (record(samples=answers(15.5)), record(samples=answers(16.5))),
        (record(samples=answers(30)), record(samples=[*answers(20), {"tokens_before": 20, "tokens_after": 200}])),
    ],
    "overfitting": [
        (record(held(0.6, 0.7, 0.6, 0.6, 0.63)), record(held(0.6, 0.7, 0.6, 0.6, 0.64))),
        (
            record(held(0.6, 0.7, 0.6, 0.6, 0.67), after={"comparisons": 10_000}),
            record(held(0.6, 0.7, 0.6, 0.6, 0.685), after={"comparisons": 10_000}),
        ),
        (
            record(held(0.6, 0.7, 0.6, 0.6, 0.6)),
            record(lambda s: held(0.6, 0.7, 0.6, 0.6, 0.6)(s) | {"margin": min(s, 20)}),
        ),
        (record(after={"loss": 0.77}), record(after={"loss": 0.75})),
    ],
    "noisy_labels": [
        (record(at("accuracy", 0.53), after={"accuracy": 0.53}), record(at("accuracy", 0.57), after={"accuracy": 0.57})),
        (record(at("accuracy", 0.47), after={"accuracy": 0.47}), record(at("accuracy", 0.43), after={"accuracy": 0.43})),
        (
            record(at("accuracy", 0.5), after={"accuracy": 0.5}),
            record(lambda s: both(0.9)(s) | {"accuracy": 0.5, "margin": 0.9}, after={"accuracy": 0.5}),
        ),
        (
            record(at("accuracy", 0.5), after={"accuracy": None}),
            record(at("accuracy", 0.5), after={"accuracy": None}, settings={"batch_size": 3}),
        ),
    ],
    "accuracy_stuck": [
        (record(at("accuracy", 0.0, 26)), record(at("accuracy", 0.0, 27))),
        (record(at("accuracy", 1.0)), record(lambda s: {"accuracy": 1.0, "epoch": int(s > 1)})),
        (record(after={"accuracy": 1.0, "comparisons": 32}), record(after={"accuracy": 1.0, "comparisons": 31})),
    ],
    "data_too_easy": [
        (record(before={"logp_accuracy": 0.96}), record(before={"logp_accuracy": 0.94})),
        (record(before={"logp_accuracy": 0.96}), record(before={"logp_accuracy": 0.96, "comparisons": 49})),
        (
            record(at("accuracy", 0.96, 11), after={"accuracy": 0.96}),
            record(at("accuracy", 0.96, 13), after={"accuracy": 0.96}),
        ),
        (
            record(at("accuracy", 0.96, 11), after={"accuracy": 0.96}),
            record(at("accuracy", 0.96, 11), after={"accuracy": 0.94}),
        ),
    ],
}


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, edges in EDGES.items() for n in range(len(edges))])
def test_a_threshold_parts_what_is_just_there_from_what_is_not(name: str, number: int) -> None:
    there, not_there = EDGES[name][number]
    (rule,) = (rule for rule in RULES if rule.name == name)
    assert rule.found(there) is not None and rule.can_judge(not_there)
    assert rule.found(not_there) is None


def test_made_up_figures_are_healthy_where_nothing_is_changed() -> None:
    assert [rule.name for rule in RULES if rule.found(record())] == []
    assert set(EDGES) == set(NAMES)


def test_what_cannot_be_judged_is_said(healthy: RunFiles) -> None:
    told = diagnose(replace(healthy, samples=healthy.samples[:7]))
    assert told.unjudged == (("The length of answers drifts", "fewer than 8 sampled answers with their lengths"),)
    assert told.said == "10 patterns looked for, none found."
    short = diagnose(replace(healthy, metrics=healthy.metrics[:9]))
    assert not short.findings and dict(short.unjudged)["Learning rate too high"] == "no loss and grad_norm on 10 steps or more"
    assert dict(short.unjudged)["Chosen answers got less likely"] == "no logp/chosen and length/chosen on 10 steps or more"
    assert diagnose(RunFiles(Path("none"))).unjudged[0][1] == "no log_ratio/chosen at step 1"
    assert len(diagnose(RunFiles(Path("none"))).unjudged) == len(RULES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "word", 0.0])
def test_figures_that_are_none_break_no_rule(healthy: RunFiles, value: Any) -> None:
    broken = [{name: value if name not in ("step", "epoch") else own for name, own in one.items()} for one in healthy.metrics]
    evaluation = {side: dict.fromkeys(figures, value) for side, figures in healthy.evaluation.items()}
    samples = [dict.fromkeys(row, value) for row in healthy.samples]
    diagnose(replace(healthy, metrics=broken, evaluation=evaluation, samples=samples))
    diagnose(replace(healthy, metrics=[dict.fromkeys(one, value) for one in healthy.metrics]))


@pytest.mark.parametrize("lacking", ["loss", "grad_norm"])
def test_a_step_may_lack_its_loss_or_its_gradient_alone(lacking: str) -> None:
    """A gradient that was not finite has no number, and its loss may have one: the others are still told apart by step."""
    (rule,) = (rule for rule in RULES if rule.name == "learning_rate_too_high")
    skipped = at(lacking, float("nan"), 50)
    assert rule.found(record(skipped)) is None
    found = rule.found(record(lambda step: {lacking: float("nan")} if step == 5 else peaks(10.5, 1.4)(step)))
    assert found is not None and "2 steps (20, 30)" in found.evidence


# -- the pages ----------------------------------------------------------------------------------------------------------------


def test_every_pattern_has_its_page_and_every_page_its_pattern() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == {*NAMES, "README"}
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(.+?)\]\((\w+)\.md\) \|", index, flags=re.MULTILINE) == [(r.title, r.name) for r in RULES]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_page_says_what_the_rule_says(rule: diagnosis.Rule) -> None:
    text = (FOLDER / f"{rule.name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {rule.title}\n")
    assert re.findall(r"^## (.*)", text, flags=re.MULTILINE) == [
        "What it looks like",
        "Why it happens",
        "What to do",
        "Where the threshold comes from",
    ]
    flowing = " ".join(text.split())
    assert f"Found when: {rule.threshold}." in flowing
    assert rule.change in flowing
    assert "arxiv.org/abs/" in text
