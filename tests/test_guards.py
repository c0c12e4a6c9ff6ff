"""What a run does about figures that are not finite, what it warns of, and what it says nothing about."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import PAIRS, write_model, write_rows
from test_resume import Killed, at, go_on, same

import preftune
from preftune import methods
from preftune.config import resolve
from preftune.data.render import render
from preftune.errors import Refusal, RunFailed
from preftune.keys import TrainKeys
from preftune.runs.course import Best
from preftune.runs.metrics import open_metrics
from preftune.runs.train import train
from preftune.scoring.score import score
from preftune.training import steps as loop
from preftune.training.guards import SPIKE, Guards, written
from preftune.training.options import TrainOptions
from preftune.training.precision import Weights
from preftune.training.steps import SKIPS, Plan, begin, steps

pytestmark = pytest.mark.usefixtures("short_answers", "no_report")

Line = dict[str, Any]


# -- steps that are not finite ------------------------------------------------------------------------------------------------


def taken(model: Any, tokenizer: Any, bad: set[int], count: int, after: list[Any] | None = None) -> list[Line]:
    """Steps of one comparison each; the loss of those in `bad` (from 1) is infinite."""
    batch = render([tiny.pair("Q: ", "yes", "no", row=n + 1) for n in range(1)], tokenizer)
    method = methods.make("dpo", beta=0.1)
    (sound,) = method.examples(batch.groups)
    batches = tuple((0, (replace(sound, weight=math.inf) if n + 1 in bad else sound,)) for n in range(count))
    the_plan = Plan(batches, 1e-3, TrainOptions(not_finite="skip"))
    training, lines = begin(Weights(model, torch.float32), the_plan), list[Line]()
    for line in steps(training, batch, method, the_plan, score(model, batch).logp.detach()):
        lines.append(line)
        if after is not None:
            after.append((tiny.state(model), training.skipped))
    return lines


def test_a_step_that_is_not_finite_is_skipped_and_moves_nothing(
    model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    after: list[Any] = []
    lines = taken(model, tokenizer, {3, 4}, 5, after)
    states = [state for state, _ in after]
    assert tiny.same(states[1], states[2]) and tiny.same(states[1], states[3]) and not tiny.same(states[3], states[4])
    assert [skipped for _, skipped in after] == [0, 0, 1, 2, 0]
    assert [line.get("skipped") for line in lines] == [None, None, True, True, None]
    assert lines[2]["loss"] is None and lines[2]["grad_norm"] is None and lines[2]["margin"] is not None
    for line in lines:
        json.dumps(line, allow_nan=False)
    said = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(said) == 2 and "step 3: " in said[0] and "pairs.jsonl row 1" in said[0] and "2 times in a row" in said[1]


def test_the_moments_of_the_optimizer_know_nothing_of_a_skipped_step(tokenizer: Any) -> None:
    """With a constant rate three sound steps and a skipped one between them are three steps."""
    ends: list[Any] = []
    for bad, count in (({2}, 4), (set[int](), 3)):
        model = tiny.model()
        batch = render(tiny.pairs(1), tokenizer)
        method = methods.make("dpo", beta=0.1)
        (sound,) = method.examples(batch.groups)
        batches = tuple((0, (replace(sound, weight=math.inf) if n + 1 in bad else sound,)) for n in range(count))
        options = TrainOptions(not_finite="skip", schedule="constant", warmup=0.0)
        the_plan = Plan(batches, 1e-3, options)
        list(steps(begin(Weights(model, torch.float32), the_plan), batch, method, the_plan, score(model, batch).logp.detach()))
        ends.append(tiny.state(model))
    assert tiny.same(*ends)


def test_too_many_in_a_row_stop_the_run(model: Any, tokenizer: Any) -> None:
    assert len(taken(tiny.model(), tokenizer, {*range(2, 1 + SKIPS), *range(2 + SKIPS, 5 + SKIPS)}, 5 + SKIPS)) == 5 + SKIPS
    with pytest.raises(
        RunFailed, match=rf"step {SKIPS + 2}: .*{SKIPS} times in a row\. The weights are those of step 2\."
    ) as e:
        taken(model, tokenizer, set(range(3, 40)), 40)
    assert e.value.code == "not_finite"


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(model: Any) -> None:
    best = Best(Weights(model, torch.float32), _job())
    for step, loss in enumerate((math.inf, math.nan, -math.inf, None), start=1):
        best.offer(step, loss)
        assert (best.step, best.waited) == (0, step)
    best.offer(5, 0.3)
    assert (best.step, best.loss) == (5, 0.3)


def _job() -> Any:
    class Keys:
        train = TrainOptions(eval_every=1, keep_best=False)

    class Job:
        keys = Keys()

    return Job()


# -- warnings -----------------------------------------------------------------------------------------------------------------


def seen(lines: list[Line], **keys: Any) -> list[tuple[int, str]]:
    guards = Guards(**({"comparisons": 200} | keys))
    return [(w.step, w.kind) for line in lines for w in guards.see(line)]


def course(count: int, *, noise: float = 0.02, seed: int = 0, every: int = 10) -> list[Line]:
    """A healthy run: the loss falls, its noise grows from nothing, the margin grows and held-out accuracy with it."""
    draw, lines = random.Random(seed), list[Line]()
    for n in range(1, count + 1):
        far = 1 - math.exp(-n / 60)
        loss = math.log(2) - 0.4 * far + noise * far * (draw.expovariate(1) - 1)
        line = {"step": n, "loss": loss, "grad_norm": 1.0, "margin": 5 * far + draw.gauss(0, 0.3 * far)}
        if n % every == 0:
            line |= {"eval/loss": 0.6, "eval/accuracy": 0.5 + 0.2 * far + draw.gauss(0, 0.01), "eval/kl": 2 * far}
        lines.append(line)
    return lines


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_warned_of_in_a_healthy_run(seed: int) -> None:
    assert seen(course(400, noise=0.1, seed=seed), kl_budget=5.0) == []


def test_a_loss_spike_is_warned_of_once() -> None:
    lines = course(200)
    lines[120]["loss"] += 1.0
    lines[150]["loss"] += 1.0
    assert seen(lines) == [(121, "loss_spike")]
    assert seen(lines[100:]) == [(121, "loss_spike")], "20 steps before it suffice"
    assert seen(lines[101:140]) == [], "19 do not"


def test_a_spike_is_many_deviations_and_a_part_of_the_first_loss() -> None:
    """Losses of 1 +- 0.1, of which MAD is 0.1: the bound is 1 + 14.8 * 0.1; where they do not vary at all, 1 + 0.2."""
    even = [{"step": n, "loss": 0.9 + 0.2 * (n % 2)} for n in range(1, 31)]
    bound = 1.0 + SPIKE * 1.4826 * 0.1
    assert seen([*even, {"step": 31, "loss": bound - 0.01}]) == []
    assert seen([*even, {"step": 31, "loss": bound + 0.01}]) == [(31, "loss_spike")]
    flat = [{"step": n, "loss": 1.0} for n in range(1, 31)]
    assert seen([*flat, {"step": 31, "loss": 1.19}]) == [] and seen([*flat, {"step": 31, "loss": 1.21}])


def test_zero_gradients_are_warned_of_and_single_ones_are_not() -> None:
    lines = course(40, every=100)
    for n in (3, 4, 10, 20, 21, 22, 30):
        lines[n]["grad_norm"] = 0.0
    assert seen(lines) == [(23, "zero_gradient")]
    assert seen([{"step": n, "loss": 1.0, "grad_norm": None, "skipped": True} for n in range(1, 5)]) == [(1, "skipped_step")]


def evaluated(*pairs: tuple[float, float]) -> list[Line]:
    """(training margin, held-out accuracy) of evaluations, two steps apart."""
    lines = [[{"step": 2 * n + 1, "margin": m}, {"step": 2 * n + 2, "margin": m, "eval/accuracy": a}]
             for n, (m, a) in enumerate(pairs)]  # fmt: skip
    return [line for both in lines for line in both]


def test_a_growing_margin_over_a_falling_accuracy_is_warned_of() -> None:
    """Of 200 comparisons the standard error of 0.8 is 0.028: the bound lies at 0.743."""
    assert seen(evaluated((1, 0.6), (2, 0.8), (3, 0.73), (4, 0.73))) == [(8, "overfitting")]
    for healthy in (
        [(1, 0.6), (2, 0.8), (3, 0.75), (4, 0.75)],  # within the error
        [(1, 0.6), (2, 0.8), (3, 0.7), (4, 0.8)],  # once
        [(1, 0.6), (2, 0.8), (1.5, 0.7), (1, 0.6)],  # the margin falls too
        [(1, 0.6), (2, 0.7), (3, 0.8), (4, 0.9)],
    ):
        assert seen(evaluated(*healthy)) == []
    assert seen(evaluated((1, 0.6), (2, 0.8), (3, 0.73), (4, 0.73)), comparisons=10) == []


def test_a_kl_above_its_budget_and_a_held_out_loss_that_is_not_finite() -> None:
    lines = [{"step": 1, "eval/kl": 2.0}, {"step": 2, "eval/kl": 2.1, "eval/loss": None}, {"step": 3, "eval/kl": 9.0}]
    assert seen(lines, kl_budget=2.0) == [(2, "held_out_not_finite"), (2, "kl_budget")]
    assert seen(lines) == [(2, "held_out_not_finite")]


def test_what_is_not_finite_has_no_number_in_json() -> None:
    assert written({"a": 1, "b": math.nan, "c": -math.inf, "d": 0.5, "e": True}) == {
        "a": 1, "b": None, "c": None, "d": 0.5, "e": True,
    }  # fmt: skip


# -- in a run -----------------------------------------------------------------------------------------------------------------


def fit(model: Any, tokenizer: Any, **keys: Any) -> Any:
    usual = {"dtype": "float32", "eval_groups": tiny.pairs(2), "learning_rate": 1e-2, "batch_size": 3}
    return preftune.fit(model, tokenizer, tiny.pairs(6), **(usual | keys))


def test_a_kl_budget_is_measured_in_evaluations_and_said(
    model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = fit(
        model, tokenizer, reference=tiny.model(), steps=4, out=tmp_path / "run", train={"eval_every": 2, "kl_budget": 1e-3}
    )
    assert [("eval/kl" in line) for line in run.metrics] == [False, True, False, True]
    assert run.metrics[-1]["eval/kl"] == pytest.approx(run.after["kl"], rel=1e-6), "of the last weights, on the same prompts"
    (noted,) = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert (noted["step"], noted["kind"]) == (2, "kl_budget") and f"step 2: {noted['message']}" in caplog.messages


def test_a_budget_that_nothing_can_measure_is_refused(model: Any, tokenizer: Any) -> None:
    for keys, says in (
        ({"train": {"kl_budget": 1.0}}, "eval_every"),
        ({"train": {"kl_budget": 1.0, "eval_every": 1}}, "the starting policy is gone"),
        ({"train": {"kl_budget": 1.0, "eval_every": 1}, "method": "simpo"}, "simpo has no reference"),
    ):
        with pytest.raises(Refusal, match=says) as refused:
            fit(model, tokenizer, steps=1, **keys)
        assert refused.value.key == "train.kl_budget"


def test_warnings_of_later_steps_are_taken_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, path = resolve(TrainKeys, ["model=m", "data=d.jsonl"]), tmp_path / "warnings.jsonl"

    def goes_on(after: int, *lines: Line) -> list[int]:
        with open_metrics(tmp_path, keys, Guards(kl_budget=1.0), after=after) as sink:
            for line in lines:
                sink(line)
        return [json.loads(text)["step"] for text in path.read_text().splitlines()] if path.exists() else []

    assert goes_on(0, {"step": 1, "eval/kl": 0.5}, {"step": 2, "eval/kl": 2.0}, {"step": 3, "eval/kl": 2.0}) == [2]
    assert goes_on(1) == []
    assert goes_on(1, {"step": 2, "eval/kl": 0.5}, {"step": 3, "eval/kl": 2.0}) == [3]
    assert goes_on(3, {"step": 4, "eval/kl": 3.0}) == [3]
    assert len([r for r in caplog.records if "kl_budget" in r.getMessage()]) == 2, "said once where it is new"


def test_a_run_that_skips_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed between two steps that are skipped: it knows that the second is one."""
    bad, right = set[int](), loop.gradient_norm

    def norm(masters: Any) -> Any:
        nonlocal calls
        calls += 1
        return right(masters) * (math.inf if calls in bad else 1.0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "gradient_norm", norm)
    write_model(tmp_path / "m", positions=128)
    write_rows(tmp_path / "pairs.jsonl", PAIRS[:16])
    words = ["model=m", "data=pairs.jsonl", "batch_size=8", "steps=6", "train.save_every=3", "train.not_finite=skip"]
    words += ["reference.store=off", "learning_rate=1e-3"]
    calls, bad = 0, {3, 4}
    train(resolve(TrainKeys, [*words, "out=whole"]))
    calls = 0
    with pytest.raises(Killed):
        train(resolve(TrainKeys, [*words, "out=run"]), progress=at("train", 4))
    caplog.clear()
    calls, bad = 0, {1}  # step 4
    go_on(tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "whole")
    assert any("step 4" in said and "2 times in a row" in said for said in caplog.messages)
    assert (tmp_path / "run/warnings.jsonl").read_bytes() == (tmp_path / "whole/warnings.jsonl").read_bytes()
