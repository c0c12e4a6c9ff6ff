"""Constraints: the estimator of a cost's gradient, and penalties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import tolerances
import torch
from torch import Tensor

from preftune import fit, losses, methods
from preftune.data.render import render
from preftune.errors import Refusal, RunFailed
from preftune.methods.constraints import Cost
from preftune.records import Group, Rating
from preftune.scoring.score import score
from preftune.training.method import ExampleScores

OUTCOMES = torch.tensor(list(product(range(3), repeat=3)))  # three steps of three tokens


def logp_of(table: Tensor) -> Tensor:
    """[27] log-probabilities of a policy whose 39 logits are given: 3 of the first token, 9 of the second, 27 of the third."""
    first, second, third = table[:3], table[3:12].view(3, 3), table[12:].view(3, 3, 3)
    a, b, c = OUTCOMES.unbind(1)
    return first.log_softmax(-1)[a] + second.log_softmax(-1)[a, b] + third.log_softmax(-1)[a, b, c]


def toy(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(logits of a policy, cost of each outcome)."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(39, dtype=torch.float64, generator=generator, requires_grad=True)
    return table, torch.rand(27, dtype=torch.float64, generator=generator)


def gradient(value: Tensor, table: Tensor) -> Tensor:
    return torch.autograd.grad(value, table)[0]


def expected_cost(table: Tensor, cost: Tensor) -> Tensor:
    return (logp_of(table).exp() * cost).sum()


def drawn(table: Tensor, *, prompts: int, each: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(outcome, prompt) of each sample."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(logp_of(table).exp().detach(), prompts * each, replacement=True, generator=generator)
    return chosen, torch.arange(prompts).repeat_interleave(each)


def estimate(table: Tensor, start: Tensor, cost: Tensor, chosen: Tensor, group: Tensor) -> Tensor:
    logp, sampled = logp_of(table)[chosen], logp_of(start)[chosen].detach()
    return losses.score_function(logp, sampled, cost[chosen], group).mean()


def test_the_estimators_expectation_is_the_gradient_of_the_expected_cost() -> None:
    """Over all 27 * 27 pairs of samples, each with its probability: exact, baseline and all."""
    table, cost = toy()
    logp = logp_of(table)
    i, j = (index.reshape(-1) for index in torch.meshgrid(torch.arange(27), torch.arange(27), indexing="ij"))
    both = torch.stack([i, j], 1).reshape(-1)
    chance = (logp[i] + logp[j]).exp().detach()
    each = losses.score_function(logp[both], logp[both].detach(), cost[both], torch.arange(27 * 27).repeat_interleave(2))
    found = gradient((each.view(-1, 2).mean(1) * chance).sum(), table)
    torch.testing.assert_close(found, gradient(expected_cost(table, cost), table), atol=1e-12, rtol=0)


def test_samples_estimate_it_within_their_error() -> None:
    table, cost = toy()
    exact = gradient(expected_cost(table, cost), table)
    samples = (drawn(table, prompts=32, each=4, seed=seed) for seed in range(200))
    found = torch.stack([gradient(estimate(table, table, cost, *each), table) for each in samples])
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact).abs() < 4.5 * error + 1e-12).all()
    assert float(exact.abs().max()) > 20 * float(error.max())  # the error is small beside what is estimated


@pytest.mark.parametrize("seed", range(3))
def test_training_on_frozen_samples_lowers_the_cost(seed: int) -> None:
    start, cost = toy(seed)
    chosen, group = drawn(start, prompts=256, each=4)
    table = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        estimate(table, start, cost, chosen, group).backward()
        optimizer.step()
    before, after = (float(expected_cost(t.detach(), cost)) for t in (start, table))
    assert after < before - 0.1
    assert float(logp_of(table.detach()).exp().max()) < 1  # bounded: no outcome is pushed beyond all measure
    assert torch.isfinite(table).all()


def test_what_the_policy_gave_up_stops_pushing() -> None:
    logp = torch.tensor([-40.0, -1.0, -1.0, -1.0], requires_grad=True)
    sampled = torch.tensor([-1.0, -40.0, -1.0, -1.0])
    cost, group = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    (found,) = torch.autograd.grad(losses.score_function(logp, sampled, cost, group).sum(), logp)
    assert found.tolist() == pytest.approx([0.0, -1.0, 1.0, -1.0], abs=1e-12)


def test_the_baseline_is_the_mean_cost_of_the_others() -> None:
    logp = torch.full((4,), -1.0, requires_grad=True)
    cost, group = torch.tensor([3.0, 0.0, 6.0, 5.0]), torch.tensor([7, 7, 7, 2])
    loss = losses.score_function(logp, logp.detach(), cost, group, weight=torch.tensor([1.0, 1.0, 2.0, 1.0]))
    (found,) = torch.autograd.grad(loss.sum(), logp)
    assert found.tolist() == pytest.approx([0.0, -4.5, 9.0, 5.0])


def test_penalties() -> None:
    policy, reference = torch.tensor([-8.0, -5.0, -2.0]), torch.tensor([-5.0, -5.0, -6.0])
    found = losses.drift(policy, reference, torch.tensor([10, 10, 4]))
    assert found.tolist() == pytest.approx([0.3, 0.0, 1.0])
    assert losses.excess(found, 0.2).tolist() == pytest.approx([0.1, 0.0, 0.8])


# -- in a run

KEYS: dict[str, Any] = {"learning_rate": 1e-3, "dtype": "float32", "eval_groups": [], "batch_size": 8}


def groups() -> list[Group]:
    return [tiny.pair(f"a question of number {n}", f"good answer {n}", f"bad {n}") for n in range(8)]


def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(text.encode())) for text in responses]


def likely(scored: ExampleScores) -> Tensor:
    return scored.policy_logp / scored.length


def of_wrong_shape(scored: ExampleScores) -> Tensor:
    return scored.policy_logp.sum()


def first_line(constraints: dict[str, Any], *, steps: int = 1, method: str = "dpo", **keys: Any) -> list[dict[str, Any]]:
    asked = {"name": method, "constraints": constraints}
    return fit(tiny.model(), tiny.tokenizer(), groups(), method=asked, steps=steps, **{**KEYS, **keys}).metrics


def plain(*, steps: int = 1, **keys: Any) -> list[dict[str, Any]]:
    return fit(tiny.model(), tiny.tokenizer(), groups(), method="dpo", steps=steps, **{**KEYS, **keys}).metrics


def test_drift_and_log_ratio_are_nothing_at_the_start_and_hold_back_later() -> None:
    free, held = plain(steps=6)[-1], first_line({"drift": {"weight": 30.0}, "log_ratio": {"weight": 3.0}}, steps=6)
    assert held[0]["constraint/drift"] == held[0]["constraint/log_ratio"] == pytest.approx(0, abs=1e-6)
    assert held[0]["loss"] == pytest.approx(plain()[0]["loss"], abs=1e-6)
    assert abs(held[-1]["log_ratio/chosen"]) < 0.5 * abs(free["log_ratio/chosen"])


def test_a_phrase_is_scored_as_the_beginning_of_an_answer_to_each_prompt() -> None:
    """And the penalty is what its log-probability has over the threshold, times the weight."""
    tok, model = tiny.tokenizer(), tiny.model()
    phrases = ["sorry", "no way"]
    logp: list[float] = []
    for group in groups():
        for phrase in phrases:
            ids = torch.tensor([tok(str(group.prompt) + phrase).input_ids])
            start = len(tok(str(group.prompt)).input_ids)
            found = model(input_ids=ids).logits[0].log_softmax(-1)
            logp.append(float(sum(found[t - 1, ids[0, t]] for t in range(start, ids.shape[1])).detach()))
    limit = sorted(logp)[len(logp) // 2]
    (line,) = first_line({"phrases": {"phrases": phrases, "weight": 0.5, "threshold": limit}})
    assert line["constraint/phrases"] == pytest.approx(sum(logp) / len(logp), rel=1e-5)
    over = sum(max(x - limit, 0) for x in logp) / len(logp)
    assert line["loss"] == pytest.approx(plain()[0]["loss"] + 0.5 * over, rel=1e-5)


def test_beside_a_loss_per_token_a_constraint_counts_as_much() -> None:
    (line,) = first_line({"mine": {"penalty": "test_constraints:likely", "weight": 2.0, "threshold": -100.0}}, method="sft")
    run = fit(tiny.model(), tiny.tokenizer(), groups(), method="sft", steps=1, **KEYS)
    scores = score(tiny.model(), render(groups(), tiny.tokenizer()))
    logp, length = scores.logp.detach()[::2], scores.length[::2]  # of the chosen answers; each counts by its tokens
    over = float(((logp / length + 100) * length).sum() / length.sum())
    assert line["loss"] == pytest.approx(run.metrics[0]["loss"] + 2 * over, rel=1e-5)


def test_a_phrase_becomes_less_likely() -> None:
    lines = first_line({"phrases": {"phrases": ["bad"], "weight": 1.0, "threshold": -1000.0}}, steps=8)
    assert lines[-1]["constraint/phrases"] < lines[0]["constraint/phrases"] - 2


def test_a_function_of_the_scores() -> None:
    (line,) = first_line({"mine": {"penalty": "test_constraints:likely", "weight": 2.0, "threshold": -100.0}})
    batch = render(groups(), tiny.tokenizer())
    scores = score(tiny.model(), batch)
    mean = float((scores.logp / scores.length).mean().detach())
    assert line["constraint/mine"] == pytest.approx(mean, rel=1e-5)
    assert line["loss"] == pytest.approx(plain()[0]["loss"] + 2 * (mean + 100), rel=1e-5)


@pytest.mark.parametrize("budget", [60, 4096])
@pytest.mark.parametrize("name", ["simpo", "ld_dpo", "aot", "kto"])
def test_constraints_of_any_method_whatever_the_micro_batches(name: str, budget: int) -> None:
    """After two steps the weights are those of one micro-batch a step."""
    constraints = {"phrases": {"phrases": ["sorry"], "threshold": -100.0}, "log_ratio": {"threshold": 0.01}}
    asked = {"name": name, "constraints": constraints}
    rows = groups()
    if name == "kto":
        rows = [replace(group, marks=(Rating(0, n % 2 == 0),)) for n, group in enumerate(rows)]
    found: list[Tensor] = []
    for tokens in (budget, 100_000):
        model = tiny.model()
        fit(model, tiny.tokenizer(), rows, method=asked, steps=2, **KEYS, train={"tokens_per_microbatch": tokens})
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=tolerances.GRADIENT * 0.1, rtol=1e-4)


def test_a_cost_is_lowered() -> None:
    """Long answers cost. The samples stay what they were, and are worth less as the policy leaves them."""
    constraint = {"short": {"cost": "test_constraints:length", "weight": 0.05, "samples": 6, "max_new_tokens": 12}}
    lines = first_line(constraint, steps=12)
    assert lines[-1]["constraint/short"] < lines[0]["constraint/short"] - 1
    twice = [[line["constraint/short"] for line in first_line(constraint, steps=2)] for _ in range(2)]
    assert twice[0] == twice[1]  # seeded


def test_phrases_and_costs_of_one_run_each_have_their_own_rows() -> None:
    own = {"cost": "test_constraints:length", "max_new_tokens": 8}
    alone: dict[str, dict[str, Any]] = {
        "few": {**own, "samples": 2, "weight": 0.1},
        "phrases": {"phrases": ["sorry", "no way"], "weight": 0.5, "threshold": -100.0},
        "many": {**own, "samples": 3, "weight": 0.2},
    }
    (together,) = first_line(alone)
    loss = start = plain()[0]["loss"]
    for name, constraint in alone.items():
        (line,) = first_line({name: constraint}, seed=1 if name == "many" else 0)  # each cost draws its own samples
        assert together[f"constraint/{name}"] == pytest.approx(line[f"constraint/{name}"], rel=1e-5), name
        loss += line["loss"] - start
    assert together["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_costs_loss_by_hand() -> None:
    """The mean over the samples of a prompt of what they cost over the threshold; one has three of them, one two."""
    options = methods.options_of({"constraints": {"c": {"cost": "test_constraints:length", "samples": 3, "threshold": 2.0}}})
    assert options.constraints is not None
    logp = torch.tensor([-1.0, -4.0, -3.0, -2.0, -5.0, -1.5], requires_grad=True)
    extra, none = torch.tensor([[1, 2, 3], [4, 5, -1]]), torch.zeros(2)
    cost, sampled = torch.tensor([[5.0, 1.0, 3.0], [2.5, 9.0, 0.0]]), torch.tensor([[-4.0, -2.5, -3.0], [-4.0, -1.5, 0.0]])
    scored = ExampleScores(logp, None, torch.ones(6), extra[:, :1], none, none, none, extra, torch.empty(2, 3, 2))
    loss, value = Cost("c", options.constraints["c"]).of(scored, extra, torch.stack([cost, sampled], -1))
    over = [torch.tensor([3.0, 0.0, 1.0]), torch.tensor([0.5, 7.0])]
    by_hand = [
        losses.score_function(logp[own], then, each, torch.zeros(len(own))).mean()
        for own, then, each in zip((extra[0], extra[1, :2]), (sampled[0], sampled[1, :2]), over, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(by_hand))
    shares = [[1.0, math.exp(-0.5), 1.0], [math.exp(-1.0), 1.0]]
    means = [(5 * a + b + 3 * c) / (a + b + c) for a, b, c in shares[:1]] + [(2.5 * a + 9 * b) / (a + b) for a, b in shares[1:]]
    assert value.tolist() == pytest.approx(means)


def test_a_costs_first_value_is_the_mean_over_samples_of_the_policy() -> None:
    from preftune.generation.sample import Sampling, sample

    tok = tiny.tokenizer()
    constraint = {"short": {"cost": "test_constraints:length", "samples": 4, "max_new_tokens": 8}}
    (line,) = first_line(constraint)
    written = sample(tiny.model(), tok, [tok(str(g.prompt)).input_ids for g in groups()], Sampling(samples=4, max_new_tokens=8))
    assert line["constraint/short"] == pytest.approx(sum(length([], [s.text for s in written])) / 32, rel=1e-5)


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        ({"x": {}}, "either a penalty"),
        ({"x": {"penalty": "drift", "cost": "test_constraints:length"}}, "either a penalty"),
        ({"x": {"penalty": "drifts"}}, "none of drift, log_ratio, phrases"),
        ({"x": {"penalty": "nosuch_module:f"}}, "cannot be imported"),
        ({"x": {"cost": "test_constraints:nosuch"}}, "cannot be imported"),
        ({"phrases": {}}, "name the phrases"),
        ({"drift": {"phrases": ["a"]}}, "penalty=phrases alone"),
        ({"drift": {"samples": 8}}, "a cost alone reads it"),
        ({"x": {"cost": "test_constraints:length", "samples": 1}}, "greater than or equal to 2"),
        ({"drift": {"weight": -1.0}}, "greater than 0"),
        ({"drift": {"wieght": 1.0}}, r"unknown key. Did you mean weight\?"),
    ],
)
def test_refusals(constraints: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        methods.options_of({"name": "dpo", "constraints": constraints})
    assert (refused.value.key or "").startswith("method.constraints.")


def test_what_a_function_gives_is_looked_at() -> None:
    with pytest.raises(RunFailed, match="one number for each"):
        first_line({"mine": {"penalty": "test_constraints:of_wrong_shape"}})
    with pytest.raises(Refusal, match="a reward model has none"):
        methods.options_of({"name": "reward", "constraints": {"drift": {}}})


def test_a_written_run_has_its_constraints(tmp_path: Path) -> None:
    first_line({"drift": {"weight": 0.5}}, out=tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "constraints:" in text and "penalty: drift" in text and "weight: 0.5" in text
