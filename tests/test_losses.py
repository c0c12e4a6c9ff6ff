"""Losses: values by hand, symmetries, gradients, and the optimum that the theory names."""

from __future__ import annotations

import doctest
import importlib
import math
from itertools import product
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor

from preftune import losses

ZERO, ONE = torch.tensor([0]), torch.tensor([1])


def dpo_at(h: float, **keys: Any) -> float:
    """The loss of one pair whose margin is h."""
    policy = torch.tensor([h - 3.0, -5.0], dtype=torch.float64)
    reference = torch.tensor([-3.0, -5.0], dtype=torch.float64)
    return float(losses.dpo(policy, reference, ZERO, ONE, **keys))


def random_scores(seed: int = 0) -> dict[str, Tensor]:
    """Seven responses, five pairs; one response stands in three of them."""
    order = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, 7, dtype=torch.float64, generator=order)
    return {
        "policy_logp": 5 * normal[0] - 20,
        "reference_logp": 5 * normal[1] - 20,
        "chosen": torch.tensor([0, 2, 0, 5, 6]),
        "rejected": torch.tensor([1, 3, 4, 0, 1]),
        "preference": torch.tensor([1.0, 0.9, 0.5, 0.7, 0.0], dtype=torch.float64),
        "weight": torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0], dtype=torch.float64),
    }


@pytest.mark.parametrize(
    ("h", "beta", "preference", "expected"),
    [
        (7.0, 0.1, None, 0.403186),
        (7.0, 0.1, 1.0, 0.403186),
        (7.0, 0.1, 0.9, 0.473186),  # cDPO with label noise 0.1
        (7.0, 0.1, 0.0, 1.103186),  # -log sigmoid(-0.7) = 0.403186 + 0.7
        (-7.0, 0.1, None, 1.103186),
        (0.0, 0.1, None, math.log(2)),
        (0.0, 5.0, 0.3, math.log(2)),
        (2.0, 0.5, None, math.log(1 + math.exp(-1))),
    ],
)
def test_dpo_golden_values(h: float, beta: float, preference: float | None, expected: float) -> None:
    soft = None if preference is None else torch.tensor([preference], dtype=torch.float64)
    assert dpo_at(h, beta=beta, preference=soft) == pytest.approx(expected, abs=tolerances.LOSS)


def test_a_soft_label_is_the_expectation_over_the_label() -> None:
    s = random_scores()
    p = s.pop("preference")
    ones = torch.ones_like(p)
    expected = p * losses.dpo(**s, preference=ones) + (1 - p) * losses.dpo(**s, preference=0 * ones)
    torch.testing.assert_close(losses.dpo(**s, preference=p), expected, atol=tolerances.EXACT, rtol=0)
    torch.testing.assert_close(losses.dpo(**s, preference=ones), losses.dpo(**s), atol=tolerances.EXACT, rtol=0)


@pytest.mark.parametrize("p", [0.5, 0.7, 0.95])
def test_the_optimum_of_a_soft_label_is_its_log_odds(p: float) -> None:
    preference = torch.tensor([p], dtype=torch.float64)
    best = math.log(p / (1 - p)) / 0.1
    policy = torch.tensor([best, 0.0], dtype=torch.float64, requires_grad=True)
    loss = losses.dpo(policy, torch.zeros(2, dtype=torch.float64), ZERO, ONE, preference=preference, beta=0.1)
    (slope,) = torch.autograd.grad(loss.sum(), policy)
    assert slope.abs().max() < tolerances.EXACT
    assert all(dpo_at(best + step, preference=preference) > float(loss.detach()) for step in (-1, 1))


def test_weights_multiply_each_example() -> None:
    s = random_scores()
    weight = s.pop("weight")
    torch.testing.assert_close(losses.dpo(**s, weight=weight), weight * losses.dpo(**s), atol=tolerances.EXACT, rtol=0)


def test_swapping_the_answers_and_the_label_changes_nothing() -> None:
    s = random_scores()
    swapped = s | {"chosen": s["rejected"], "rejected": s["chosen"], "preference": 1 - s["preference"]}
    torch.testing.assert_close(losses.dpo(**swapped), losses.dpo(**s), atol=tolerances.EXACT, rtol=0)


def test_what_both_answers_of_a_prompt_share_does_not_count() -> None:
    s = random_scores()
    for name in ("policy_logp", "reference_logp"):
        torch.testing.assert_close(losses.dpo(**(s | {name: s[name] + 3.7})), losses.dpo(**s), atol=tolerances.EXACT, rtol=0)
    reward = losses.rewards(s["policy_logp"], s["reference_logp"], 0.1)
    margin = reward[s["chosen"]] - reward[s["rejected"]]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(margin, s["preference"], s["weight"], reduction="none")
    torch.testing.assert_close(losses.dpo(**s), expected, atol=tolerances.EXACT, rtol=0)


def test_gradients_are_right_in_float64() -> None:
    s = random_scores()
    policy = s.pop("policy_logp").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.dpo(x, **s, beta=0.3), (policy,))
    assert torch.autograd.gradcheck(lambda x: losses.sft(x, s["chosen"], weight=s["weight"]), (policy,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_log_probabilities_stay_finite(dtype: torch.dtype, size: float) -> None:
    policy = torch.tensor([size, -size], dtype=dtype, requires_grad=True)
    preference = torch.tensor([0.8], dtype=dtype)
    loss = losses.dpo(policy, torch.zeros(2, dtype=dtype), ZERO, ONE, beta=1.0, preference=preference)
    loss.sum().backward()
    assert loss.isfinite().all() and policy.grad is not None and policy.grad.isfinite().all()
    assert float(loss.detach()) == pytest.approx(2e4 * (0.2 if size > 0 else 0.8), rel=0.01)


def test_rewards_are_beta_times_the_log_ratio_and_detached() -> None:
    policy = torch.tensor([-3.0, -9.0], requires_grad=True)
    reward = losses.rewards(policy, torch.tensor([-5.0, -4.0]), 0.1)
    assert not reward.requires_grad
    torch.testing.assert_close(reward, torch.tensor([0.2, -0.5]))


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_has_to_be_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        dpo_at(1.0, beta=beta)


def test_sft_is_the_negative_log_likelihood() -> None:
    logp = torch.tensor([-3.0, -9.0, -4.0])
    assert losses.sft(logp).tolist() == [3.0, 9.0, 4.0]
    assert losses.sft(logp, torch.tensor([2, 0, 0]), weight=torch.tensor([1.0, 2.0, 0.0])).tolist() == [4.0, 6.0, 0.0]


@pytest.mark.parametrize("name", ["pairwise", "sft"])
def test_docstring_examples_are_right(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"preftune.losses.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_dpo_on_bradley_terry_labels_reaches_the_tilted_reference() -> None:
    """Three steps of three tokens, 27 outcomes, all pairs labelled sigmoid(r_i - r_j): the minimum of the population loss is
    pi_ref exp(r / beta) / Z, the maximum of E[r] - beta KL, which is beta log Z there (Rafailov et al. 2023, section 4)."""
    beta, order = 0.5, torch.Generator().manual_seed(0)
    outcomes = torch.tensor(list(product(range(3), repeat=3)))
    reward = torch.randn(27, dtype=torch.float64, generator=order)

    def logp(table: list[Tensor]) -> Tensor:
        a, b, c = outcomes.unbind(1)
        return table[0].log_softmax(-1)[a] + table[1].log_softmax(-1)[a, b] + table[2].log_softmax(-1)[a, b, c]

    shapes = [(3,), (3, 3), (3, 3, 3)]
    reference = logp([torch.randn(s, dtype=torch.float64, generator=order) for s in shapes])
    policy = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    first, second = torch.combinations(torch.arange(27)).unbind(1)
    label = torch.sigmoid(reward[first] - reward[second])
    optimizer = torch.optim.LBFGS(
        policy, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses.dpo(logp(policy), reference, first, second, preference=label, beta=beta).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        found = logp(policy)
        log_z = (reference + reward / beta).logsumexp(0)
        assert (found.exp() - (reference + reward / beta - log_z).exp()).abs().max() < tolerances.OPTIMUM
        value = (found.exp() * (reward - beta * (found - reference))).sum()
        assert abs(float(value - beta * log_z)) < tolerances.OPTIMUM
