"""Steps: what a batch's gradient is, how a run is planned, and how it ends."""

from __future__ import annotations

import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tolerances
import torch
from torch import Tensor

import preftune
from preftune import methods
from preftune.data.render import Batch, render
from preftune.errors import Interrupted, RunFailed
from preftune.records import Group
from preftune.scoring.score import score
from preftune.scoring.scorer import Scorer
from preftune.training.gradient import Step, backward
from preftune.training.method import Example
from preftune.training.options import TrainOptions
from preftune.training.precision import Weights
from preftune.training.steps import Plan, begin, plan, steps

pytestmark = [
    pytest.mark.usefixtures("short_answers", "no_report"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),  # peft reads it by its older name
]

EVERY_STEP = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_s", "memory_gb"}
PAIR_KEYS = {"margin", "accuracy", "pairs_per_s"} | {
    f"{name}/{side}" for name in ("reward", "logp", "log_ratio", "length") for side in ("chosen", "rejected")
}


def unequal(count: int = 6) -> list[Group]:
    """Comparisons with weights and soft labels, one prompt with three of them."""
    groups = [tiny.pairs(n + 1, weight=0.5 + n, preference=1 - 0.1 * n)[-1] for n in range(count - 1)]
    many = tiny.Group("Many: ", tiny.answers("Many: ", "the one", "two", "three, four"), first_marks())
    return [*groups, many]


def first_marks() -> tuple[Any, ...]:
    from preftune.records import Comparison

    return Comparison(0, 1, weight=3.0), Comparison(2, 0, 0.2), Comparison(1, 2, 0.5, weight=0.25)


def gradient(
    model: Any, batch: Batch, name: str, reference: Tensor | None, budget: int, places: slice = slice(None)
) -> tuple[dict[str, Tensor], dict[str, float]]:
    model.zero_grad()
    method = methods.make(name, beta=0.3)
    weights = Weights(model, torch.float32)
    scorer = Scorer(model)
    with weights.collecting():
        line, _ = backward(scorer, Step.of(scorer, batch, method, method.examples(batch.groups)[places], reference, budget))
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}, line


def close(a: dict[str, Tensor], b: dict[str, Tensor], bound: float) -> None:
    assert a.keys() == b.keys() and a
    size = max(float(g.abs().max()) for g in b.values())
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=bound * size, rtol=0)


def fit(model: Any, tokenizer: Any, groups: list[Group], **keys: Any) -> Any:
    """preftune.fit in float32 with nothing held out, unless said otherwise."""
    return preftune.fit(model, tokenizer, groups, **({"dtype": "float32", "eval_groups": [], "learning_rate": 1e-3} | keys))


# -- the gradient of one batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_a_gradient_and_its_figures_do_not_depend_on_the_cut(name: str, model: Any, tokenizer: Any) -> None:
    batch = render(unequal(), tokenizer)
    reference = score(tiny.model(seed=1), batch).logp.detach()
    whole, told = gradient(model, batch, name, reference, 10**6)
    for budget in (1, 60):
        cut, line = gradient(model, batch, name, reference, budget)
        close(cut, whole, tolerances.GRADIENT)
        assert line == pytest.approx(told, abs=tolerances.FIGURE)


def test_dpo_divides_by_the_total_weight_of_the_whole_batch(model: Any, tokenizer: Any) -> None:
    batch = render(unequal(), tokenizer)
    reference = score(tiny.model(seed=1), batch).logp.detach()
    found, line = gradient(model, batch, "dpo", reference, 1)
    model.zero_grad()
    log_ratio = score(model, batch).logp - reference
    total, weights, first = torch.zeros(()), 0.0, 0
    for group in batch.groups:  # the formula, one comparison at a time
        for mark in group.marks:
            z = 0.3 * (log_ratio[first + mark.a] - log_ratio[first + mark.b])
            p = mark.preference
            total = total - mark.weight * (p * torch.sigmoid(z).log() + (1 - p) * torch.sigmoid(-z).log())
            weights += mark.weight
        first += len(group.responses)
    (total / weights).backward()
    close(found, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}, tolerances.GRADIENT)
    assert line["loss"] == pytest.approx(float(total.detach()) / weights, abs=tolerances.FIGURE)


@pytest.mark.parametrize("budget", [1, 10**6])
def test_sft_is_the_mean_per_token_of_the_whole_batch_and_no_mean_of_means(budget: int, model: Any, tokenizer: Any) -> None:
    groups = [tiny.shown("Q: ", "a"), tiny.shown("R: ", "the end of it all", weight=2.0), tiny.shown("S: ", "yes")]
    batch = render(groups, tokenizer)
    found, line = gradient(model, batch, "sft", None, budget)
    model.zero_grad()
    scores = score(model, batch)
    weight = torch.tensor([1.0, 2.0, 1.0])
    loss = -(weight * scores.logp).sum() / (weight * scores.length).sum()
    loss.backward()
    close(found, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}, tolerances.GRADIENT)
    assert line["loss"] == pytest.approx(float(loss.detach()), abs=tolerances.FIGURE)
    assert abs(float((-scores.logp / scores.length).detach().mean()) - line["loss"]) > 0.01, "too alike to tell"


def test_sft_takes_each_chosen_answer_once_and_no_ties() -> None:
    many = tiny.Group("Many: ", tiny.answers("Many: ", "one", "two", "three"), first_marks())
    found = methods.make("sft", beta=1.0).examples([many, *tiny.pairs(1), tiny.shown("Q: ", "yes")])
    assert [(e.group, e.responses) for e in found] == [(0, (0,)), (1, (0,)), (2, (0,))]


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_weights_after_three_steps_do_not_depend_on_the_cut(method: str, tokenizer: Any) -> None:
    ends: list[dict[str, Tensor]] = []
    for budget in (1, 10**6):
        model = tiny.model()
        fit(model, tokenizer, unequal(), method=method, steps=3, batch_size=4, train={"tokens_per_microbatch": budget})
        ends.append(tiny.state(model))
    assert not tiny.same(ends[0], tiny.state(tiny.model()))
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], atol=tolerances.WEIGHTS, rtol=0)


# -- the plan ---------------------------------------------------------------------------------------------------------------


def planned(sizes: list[int], **keys: Any) -> Plan:
    examples = [Example(group, (mark, mark + 1)) for group, count in enumerate(sizes) for mark in range(count)]
    given = {"batch_size": 4, "epochs": 1.0, "steps": None, "seed": 0, "learning_rate": 1.0, "options": TrainOptions()}
    return plan(examples, **(given | keys))


def order(the_plan: Plan, epoch: int = 0) -> list[Example]:
    return [e for number, batch in the_plan.batches for e in batch if number == epoch]


def test_every_mark_stands_once_in_an_epoch_and_a_groups_marks_follow_each_other() -> None:
    the_plan = planned([1, 3, 2, 5, 1, 1], epochs=2.0)
    for epoch in (0, 1):
        found = order(the_plan, epoch)
        assert Counter(found) == Counter(order(the_plan, 0)) and len(set(found)) == 13
        runs = [e.group for n, e in enumerate(found) if n == 0 or found[n - 1].group != e.group]
        assert len(runs) == 6, "a group's marks are torn apart"
    assert [len(b) for _, b in the_plan.batches] == [4, 4, 4, 1] * 2


def test_groups_are_shuffled_by_seed_and_epoch() -> None:
    sizes = [1, 2] * 10
    one = planned(sizes, epochs=2.0)
    assert order(one) != sorted(order(one), key=lambda e: (e.group, e.responses))
    assert order(one, 0) != order(one, 1)
    assert order(one) == order(planned(sizes)) == order(planned(sizes, steps=50))
    assert order(one) != order(planned(sizes, seed=1))
    assert [e.group for e in order(planned([1] * 6))] == [0, 5, 1, 4, 3, 2], "the same on every machine and version"


def test_steps_win_over_epochs_and_go_on_into_the_next_epoch() -> None:
    assert len(planned([1] * 10, steps=7, epochs=1.0)) == 7
    assert [epoch for epoch, _ in planned([1] * 10, steps=7).batches] == [0, 0, 0, 1, 1, 1, 2]
    assert (len(planned([1] * 10, epochs=0.5)), len(planned([1] * 10, epochs=0.01))) == (2, 1)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1]),
        ("constant", 0.4, [0.5, 1, 1, 1, 1]),
        ("linear", 0.0, [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 0.4, [0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", 0.4, [0.5, 1, *(0.5 + 0.5 * math.cos(math.pi * x) for x in (0.25, 0.5, 0.75))]),
        ("cosine", 0.1, [1, *(0.5 + 0.5 * math.cos(math.pi * x) for x in (0.2, 0.4, 0.6, 0.8))]),
    ],
)
def test_learning_rates_rise_over_the_warm_up_and_follow_the_schedule(
    schedule: Any, warmup: float, expected: list[float]
) -> None:
    the_plan = planned([1] * 20, learning_rate=2e-3, options=TrainOptions(schedule=schedule, warmup=warmup))
    assert [the_plan.rate(n) for n in range(1, 6)] == pytest.approx([2e-3 * x for x in expected], abs=1e-15)


# -- a run ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_first_loss_is_ln_2(adapter: str, model: Any, tokenizer: Any) -> None:
    first = fit(model, tokenizer, unequal(), steps=1, adapter=adapter).metrics[0]
    assert abs(first["loss"] - math.log(2)) < tolerances.FIRST_LOSS
    assert abs(first["margin"]) < tolerances.LOGP


def perturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.models import adapters

    at_zero = adapters.add_adapter

    def off_zero(model: Any, options: Any, **keys: Any) -> Any:
        made = at_zero(model, options, **keys)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        return made

    monkeypatch.setattr(adapters, "add_adapter", off_zero)


def test_the_start_check_stops_an_adapter_that_is_not_at_zero(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    perturbed(monkeypatch)
    before = tiny.state(model)
    with pytest.raises(RunFailed) as stopped:
        fit(model, tokenizer, tiny.pairs(2), steps=1, adapter="lora")
    assert stopped.value.code == "start_check" and stopped.value.exit_code == 1
    assert "pairs.jsonl row 1" in str(stopped.value) and "pairs.jsonl row 2" in str(stopped.value)
    assert tiny.same(before, {k.replace("base_layer.", ""): v for k, v in tiny.state(model).items()}, list(before))


def test_a_model_whose_dropout_cannot_be_switched_off_is_refused(model: Any, tokenizer: Any) -> None:
    model.model.embed_tokens.register_forward_hook(lambda layer, given, out: torch.nn.functional.dropout(out, 0.1, True))
    with pytest.raises(RunFailed, match=r"does not give the same numbers twice: .* dropout") as stopped:
        fit(model, tokenizer, tiny.pairs(2), steps=1)
    assert stopped.value.code == "not_deterministic"


def test_fit_trains_in_place_and_measures_exactly_what_the_contract_lists(model: Any, tokenizer: Any) -> None:
    before = tiny.state(model)
    told: list[tuple[str, int, int]] = []
    run = fit(
        model,
        tokenizer,
        tiny.pairs(6),
        epochs=2,
        batch_size=4,
        progress=lambda phase, done, total, line: told.append((phase, done, total)),
    )
    assert run.model is model and not tiny.same(before, tiny.state(model))
    assert [set(line) for line in run.metrics] == [EVERY_STEP | PAIR_KEYS] * 4
    assert [(line["step"], line["epoch"]) for line in run.metrics] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert [t for t in told if t[0] == "train"] == [("train", n, 4) for n in (1, 2, 3, 4)]
    assert all(math.isfinite(value) for line in run.metrics for value in line.values())
    line = run.metrics[-1]
    for side in ("chosen", "rejected"):
        assert line[f"reward/{side}"] == pytest.approx(0.1 * line[f"log_ratio/{side}"], abs=tolerances.FIGURE)
    assert line["margin"] == pytest.approx(line["log_ratio/chosen"] - line["log_ratio/rejected"], abs=tolerances.LOGP)
    assert line["loss"] < math.log(2) and line["margin"] > 0, "training on six pairs does not lower their loss"


def test_sft_measures_what_it_has(model: Any, tokenizer: Any) -> None:
    run = fit(model, tokenizer, tiny.pairs(4), method="sft", epochs=3, batch_size=4, eval_groups=tiny.pairs(2))
    assert [set(line) for line in run.metrics] == [EVERY_STEP | {"logp/chosen", "length/chosen"}] * 3
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    assert run.after["loss"] < run.before["loss"] and run.after["perplexity"] == pytest.approx(math.exp(run.after["loss"]))


def test_log_ratios_are_against_the_start_whatever_the_policy_becomes(model: Any, tokenizer: Any) -> None:
    lines = fit(model, tokenizer, tiny.pairs(1), epochs=4, batch_size=1).metrics
    for side in ("chosen", "rejected"):
        for line in lines:
            moved = line[f"logp/{side}"] - lines[0][f"logp/{side}"]
            assert line[f"log_ratio/{side}"] == pytest.approx(moved, abs=tolerances.LOGP)
    assert abs(lines[-1]["log_ratio/chosen"]) > 0.1


def test_another_reference_is_taken_as_it_is(model: Any, tokenizer: Any) -> None:
    other, groups = tiny.model(seed=1), tiny.pairs(1)
    batch = render(groups, tokenizer)
    with torch.no_grad():
        ratio = score(model, batch).logp - score(other, batch).logp
    line = fit(model, tokenizer, groups, steps=1, reference=other).metrics[0]
    assert (line["log_ratio/chosen"], line["log_ratio/rejected"]) == pytest.approx(tuple(ratio.tolist()), abs=tolerances.LOGP)
    assert tiny.same(tiny.state(other), tiny.state(tiny.model(seed=1)))


def test_a_step_that_is_not_finite_stops_before_the_weights_change(model: Any, tokenizer: Any) -> None:
    batch = render([*tiny.pairs(3), tiny.pair("Q: ", "yes", "no", row=9)], tokenizer)
    method = methods.make("dpo", beta=0.1)
    *sound, last = method.examples(batch.groups)
    examples = [*sound, replace(last, weight=math.inf)]
    the_plan = Plan(tuple((0, (e,)) for e in examples), 1e-3, TrainOptions())
    after: list[dict[str, Tensor]] = []
    with pytest.raises(RunFailed, match=r"step 4: .*step 3.*pairs.jsonl row 9") as stopped:
        for _ in steps(
            begin(Weights(model, torch.float32), the_plan), batch, method, the_plan, score(model, batch).logp.detach()
        ):
            after.append(tiny.state(model))
    assert stopped.value.code == "not_finite" and len(after) == 3
    assert not tiny.same(after[1], after[2]) and tiny.same(after[2], tiny.state(model))


def backwards(groups: list[Group]) -> list[Group]:
    return [tiny.pair(g.prompt, g.responses[1].content, g.responses[0].content, row=90 + n) for n, g in enumerate(groups)]


@pytest.mark.parametrize("keep", [True, False])
def test_keep_best_restores_the_weights_with_the_lowest_held_out_loss(keep: bool, model: Any, tokenizer: Any) -> None:
    """The held-out pairs are the training pairs with the labels turned round: every step makes them worse."""
    after: list[dict[str, Tensor]] = []
    run = fit(
        model,
        tokenizer,
        tiny.pairs(4),
        eval_groups=backwards(tiny.pairs(4)),
        steps=3,
        batch_size=4,
        train={"eval_every": 1, "keep_best": keep},
        progress=lambda phase, done, total, line: after.append(tiny.state(model)) if phase == "train" else None,
    )
    losses = [line["eval/loss"] for line in run.metrics]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert tiny.same(tiny.state(model), after[0 if keep else -1])
    assert run.after["loss"] == pytest.approx(losses[0 if keep else -1], abs=tolerances.FIGURE)
    assert run.before["loss"] == pytest.approx(math.log(2), abs=tolerances.FIRST_LOSS)


def test_held_out_lines_stand_where_eval_every_says(model: Any, tokenizer: Any) -> None:
    run = fit(model, tokenizer, tiny.pairs(4), eval_groups=tiny.pairs(2), steps=5, batch_size=2, train={"eval_every": 2})
    assert [any(key.startswith("eval/") for key in line) for line in run.metrics] == [False, True, False, True, True]
    assert {"eval/loss", "eval/accuracy", "eval/logp_accuracy", "eval/margin"} <= set(run.metrics[1])


def test_gradients_of_a_step_are_its_own(model: Any, tokenizer: Any) -> None:
    """The same pair three times, and no learning rate: three times the same gradient norm."""
    groups = tiny.pairs(1)
    norms = [x["grad_norm"] for x in fit(model, tokenizer, groups, steps=3, batch_size=1, learning_rate=1e-30).metrics]
    assert norms[0] > 1e-3 and norms == pytest.approx([norms[0]] * 3, rel=1e-5)


# -- precision --------------------------------------------------------------------------------------------------------------


def test_bf16_compute_keeps_float32_masters(model: Any, tokenizer: Any) -> None:
    """A step of 1e-6 is lost in bfloat16 weights of size 0.2, whose digits lie 1e-3 apart. The weights start at values that
    bfloat16 holds exactly, so that rounding alone changes none of them."""
    groups = tiny.pairs(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    batch = render(groups, tokenizer)
    touched, _ = gradient(model, batch, "dpo", score(model, batch).logp.detach(), 10**6)
    model.zero_grad()
    before = tiny.state(model)
    run = fit(
        model, tokenizer, groups, dtype="bfloat16", steps=5, learning_rate=1e-6, train={"warmup": 0.0, "schedule": "constant"}
    )
    assert run.model is model and all(p.dtype == torch.float32 for p in model.parameters())
    moved = torch.cat([(p.detach() - before[name])[touched[name] != 0].abs() for name, p in model.named_parameters()])
    assert (moved > 0).float().mean() > 0.95 and moved.max() < 1e-5
    assert abs(run.metrics[0]["loss"] - math.log(2)) < tolerances.BF16


def test_bf16_gradients_of_many_cuts_add_up_in_float32(tokenizer: Any) -> None:
    weights = Weights(tiny.model(), torch.bfloat16)
    used = list(weights.compute.parameters())
    with weights.collecting():
        for gradient in (1.0, 1e-3, 1e-3, 1e-3):
            sum((gradient * parameter).sum() for parameter in used).backward()
            assert all(parameter.grad is None for parameter in used)
    sum(parameter.sum() for parameter in used).backward()
    assert all(parameter.grad is not None for parameter in used), "outside they are the model's own again"
    assert all(m.grad is not None and m.grad.dtype == torch.float32 for m in weights.masters)
    assert all((m.grad - 1.003).abs().max() < 1e-5 for m in weights.masters)  # 1.0 in bfloat16


def test_a_bf16_model_is_trained_through_float32_masters_too(tokenizer: Any) -> None:
    model = tiny.model().bfloat16()
    run = fit(model, tokenizer, tiny.pairs(2), dtype="bfloat16", steps=3, learning_rate=1e-3)
    assert run.model is model and all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not tiny.same(tiny.state(model), tiny.state(tiny.model().bfloat16()))


def test_another_reference_is_computed_in_the_policys_own_precision(model: Any, tokenizer: Any) -> None:
    """A float32 copy of the start as reference, and bfloat16 compute: no log-ratio comes from the digits alone."""
    other = tiny.model()
    line = fit(model, tokenizer, tiny.pairs(1), dtype="bfloat16", steps=1, reference=other).metrics[0]
    assert (line["log_ratio/chosen"], line["log_ratio/rejected"]) == (0.0, 0.0)
    assert all(p.dtype == torch.float32 for p in other.parameters())


# -- interruption -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_and_leaves_a_checkpoint_that_loads(
    number: signal.Signals, code: int, tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def at_step_two(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if phase == "train" and done == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as stopped:
        fit(model, tokenizer, tiny.pairs(6), steps=9, batch_size=2, out=tmp_path / "run", progress=at_step_two)
    assert stopped.value.exit_code == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert folder.name == "step-000002" and str(folder) in str(stopped.value)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert tiny.same(tiny.state(AutoModelForCausalLM.from_pretrained(folder)), tiny.state(model))


@pytest.mark.parametrize(("phase", "after"), [("reference", 0), ("sample", 0), ("sample", 1), ("kl", 1)])
def test_a_signal_is_answered_between_any_two_passes(phase: str, after: int, tmp_path: Path, tokenizer: Any) -> None:
    """Sampling and the KL after training too: the weights of the last step are saved, and the run is not called done."""
    out, seen = tmp_path / "run", list[str]()

    def watch(now: str, done: int, total: int, line: dict[str, Any]) -> None:
        if now == "train" and done == total:
            seen.append(now)
        if now == phase and len(seen) == after:
            os.kill(os.getpid(), signal.SIGINT)

    model = tiny.model()
    with pytest.raises(Interrupted) as stopped:
        fit(model, tokenizer, tiny.pairs(6), steps=2, out=out, reference=tiny.model(seed=1), progress=watch)
    assert stopped.value.exit_code == 130
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == ([f"step-{2 * after:06d}"] if after else [])
    assert not (out / "model").exists() and not (out / "evaluation.json").exists()


def test_a_signal_while_the_end_is_written_lets_it_be_written(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preftune.report.write", lambda folder: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="the run is complete in") as stopped:
        fit(model, tokenizer, tiny.pairs(6), steps=2, out=tmp_path / "run")
    assert stopped.value.exit_code == 143 and (tmp_path / "run" / "evaluation.json").exists()


def test_a_run_that_fails_midway_leaves_what_it_trained(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    def spoil(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if phase == "train" and done == 2:
            with torch.no_grad():
                model.model.norm.weight.fill_(math.inf)

    with pytest.raises(RunFailed, match=r"step 3: .* the weights are in .*step-000002"):
        fit(model, tokenizer, tiny.pairs(6), steps=4, batch_size=2, out=tmp_path / "run", progress=spoil)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000002"]


def test_a_frozen_base_is_shared_with_the_compute_copy(model: Any) -> None:
    """An adapter that trains in float32 over a bfloat16 base: the base is not held twice."""
    model.bfloat16().requires_grad_(False)
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    model.model.norm.weight.requires_grad_(True)
    used = Weights(model, torch.bfloat16).compute
    assert used is not model and used.model.norm.weight.dtype == torch.bfloat16
    assert used.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("new", [signal.SIGTERM, RuntimeError("odd"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_step_that_was_taken_is_counted_and_saved_whatever_ends_the_evaluation_after_it(
    new: Any, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from preftune.runs import course

    out, model, right = tmp_path / "run", tiny.model(), course.method_metrics

    def ends(*arguments: Any) -> Any:
        if isinstance(new, Exception):
            raise new
        os.kill(os.getpid(), new)
        return right(*arguments)

    def watch(phase: str, done: int, total: int, line: dict[str, Any]) -> None:
        if phase == "train" and done == 2:
            monkeypatch.setattr(course, "method_metrics", ends)

    kind = {"odd": RuntimeError, "CUDA out of memory": RunFailed}.get(str(new), Interrupted)
    with pytest.raises(kind) as stopped:
        fit(model, tokenizer, tiny.pairs(6), eval_groups=tiny.pairs(2), steps=5, batch_size=2, out=out, progress=watch,
            train={"eval_every": 1})  # fmt: skip
    assert [p.name for p in sorted((out / "checkpoints").glob("step-*"))] == ["step-000003"]
    assert [json.loads(x)["step"] for x in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    if kind is RunFailed:
        assert "lower train.tokens_per_microbatch" in str(stopped.value) and "step-000003" in str(stopped.value)


def test_what_is_measured_is_what_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    """A bfloat16 model in hand that is trained and measured in float32 is a float32 model afterwards."""
    from transformers import AutoModelForCausalLM

    model = tiny.model().bfloat16()
    keys = {"steps": 10, "learning_rate": 1e-4, "out": tmp_path / "run", "eval_groups": tiny.pairs(4), "dtype": "float32"}
    run = fit(model, tokenizer, tiny.pairs(6), reference=tiny.model().bfloat16(), **keys)
    assert run.after is not None and run.model is model
    for kept in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")):
        assert all(p.dtype == torch.float32 for p in kept.parameters())
        found = preftune.evaluate(kept, tokenizer, tiny.pairs(4), reference=tiny.model().bfloat16().float(), kl_samples=0)
        assert found["logp_accuracy"] == run.after["logp_accuracy"]
        assert found["margin"] == pytest.approx(run.after["margin"], abs=tolerances.LOGP)
