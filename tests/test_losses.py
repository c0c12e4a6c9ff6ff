"""Losses: what all of them promise. One table of calls; the values stand in test_losses_values.py, the optima that the theory
names in test_losses_optima.py, TRL's own code in test_losses_trl.py."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
import pkgutil
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor

from preftune import losses

ZERO, ONE = torch.tensor([0]), torch.tensor([1])
LN2 = math.log(2)

# name: its keyword arguments with their defaults, besides preference and weight
PAIRWISE: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "noise": 0.1},
    "robust": {"beta": 0.1, "noise": 0.1},
    "ipo": {"beta": 0.1},
    "ipo_mean": {"beta": 0.1},
    "hinge": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "orpo": {"beta": 0.1},
    "cpo": {"beta": 0.1, "alpha": 1.0},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "exo": {"beta": 0.1, "epsilon": 1e-3},
    "nca": {"beta": 0.1},
    "bco": {"beta": 0.1, "delta": None},
    "sppo": {"beta": 0.1},
    "aot": {"beta": 0.1},
    "aot_unpaired": {"beta": 0.1},
    "discopop": {"beta": 0.1, "temperature": 0.05},
    "r_dpo": {"beta": 0.1, "alpha": 0.01},
    "ld_dpo": {"beta": 0.1, "alpha": 0.5},
    "ln_dpo": {"beta": 5.0},
    "rpo": {"beta": 0.1, "alpha": 1.0},
    "dpop": {"beta": 0.1, "penalty": 50.0},
    "mm_dpo": {"margin": inspect.Parameter.empty, "beta": 0.1, "scale": 0.5, "rate": 0.5},
    "reward": {"margin": None, "centering": 0.0},
}
KINDS = {"weight": None, "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
UNPAIRED: dict[str, dict[str, Any]] = {
    "kto": {"baseline": inspect.Parameter.empty, **KINDS},
    "bco_unpaired": {"delta": None, **KINDS},
    "apo_zero_unpaired": KINDS,
}
RANKED: dict[str, dict[str, Any]] = {"plackett_luce": {"weight": None, "beta": 0.1}}
NO_REFERENCE = {"simpo", "orpo", "cpo", "reward"}
NEEDS_LENGTH = {"ipo_mean", "simpo", "orpo", "cpo", "r_dpo", "ld_dpo", "ln_dpo", "rpo"}
# a soft label that is not the expectation of the loss over the label
OWN_SOFT_LABEL = {"exo", "sppo", "aot", "aot_unpaired"}
# a weight that is no factor of each pair's loss
MASS = {"bco", "aot", "aot_unpaired"}
EVERY = [*PAIRWISE, *UNPAIRED, *RANKED, "sft"]


def scores(seed: int = 7, spread: float = 0.7) -> dict[str, Tensor]:
    """Seven responses with their tokens, five pairs, ratings and rankings; one response stands in three pairs."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor([3, 7, 4, 4, 6, 1, 5])
    kept = (torch.arange(7) < length.unsqueeze(1)).double()
    reference = -(torch.rand(7, 7, dtype=torch.float64, generator=generator) + 0.2) * kept
    policy = reference * (spread * torch.randn(7, 7, dtype=torch.float64, generator=generator)).exp()
    return {
        "policy_tokens": policy,
        "reference_tokens": reference,
        "policy_logp": policy.sum(1),
        "reference_logp": reference.sum(1),
        "rewards": policy.sum(1),
        "length": length,
        "chosen": torch.tensor([0, 2, 0, 5, 6]),
        "rejected": torch.tensor([1, 3, 4, 0, 1]),
        "preference": torch.tensor([1.0, 0.9, 0.5, 0.7, 0.0], dtype=torch.float64),
        "weight": torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0], dtype=torch.float64),
        "margin": torch.tensor([2.0, 0.0, 0.3, 1.0, 4.0], dtype=torch.float64),
        "response": torch.tensor([0, 2, 0, 5, 6]),
        "desirable": torch.tensor([True, False, True, True, False]),
        "baseline": torch.tensor(0.4, dtype=torch.float64),
        "ranking": torch.tensor([[0, 1, 2, 3], [4, 6, -1, -1], [2, 5, 0, -1], [3, -1, -1, -1], [6, 5, 4, 3]]),
    }


def source(name: str) -> str:
    """The score that its gradient is taken of."""
    return {"reward": "rewards", "ld_dpo": "policy_tokens"}.get(name, "policy_logp")


def call(name: str, s: dict[str, Tensor], **keys: Any) -> Tensor:
    """The loss on these scores; of preference and weight only what `keys` brings."""
    tokens = {"policy_logp": s["policy_tokens"], "reference_logp": s["reference_tokens"]} if name == "ld_dpo" else {}
    given = {k: v for k, v in (s | tokens).items() if k not in ("preference", "weight", "margin")}
    if name == "mm_dpo":
        given["margin"] = s["margin"]
    if name == "sft":
        del given["response"]
    function = getattr(losses, name)
    return function(**{k: given[k] for k in inspect.signature(function).parameters if k in given} | keys)


def flipped(s: dict[str, Tensor]) -> dict[str, Tensor]:
    return s | {"chosen": s["rejected"], "rejected": s["chosen"], "margin": -s["margin"], "preference": 1 - s["preference"]}


def close(found: Tensor, expected: Tensor, atol: float = tolerances.EXACT) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# -- the contract


OF_CONSTRAINTS = ("drift", "excess", "score_function")  # test_constraints.py


def test_every_loss_is_exported_and_in_a_table_here() -> None:
    assert {*EVERY, *OF_CONSTRAINTS, "COUPLED", "diverge", "kto_baseline", "rewards", "wpo_weight"} == set(losses.__all__)
    assert set(losses.__all__) <= set(vars(losses))


@pytest.mark.parametrize("name", [*PAIRWISE, *UNPAIRED, *RANKED])
def test_signatures_are_the_contracts(name: str) -> None:
    logp = ["rewards"] if name == "reward" else ["policy_logp"] + ["reference_logp"] * (name not in NO_REFERENCE)
    index = ["response", "desirable"] if name in UNPAIRED else ["ranking"] if name in RANKED else ["chosen", "rejected"]
    keys = PAIRWISE.get(name) or UNPAIRED.get(name) or RANKED[name]
    soft = {"preference": None, "weight": None} if name in PAIRWISE else {}
    parameters = inspect.signature(getattr(losses, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == logp + ["length"] * (
        name in NEEDS_LENGTH
    ) + index
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == soft | keys


@pytest.mark.parametrize("name", EVERY)
def test_losses_are_one_number_per_example_in_the_precision_they_are_given(name: str) -> None:
    s = scores()
    found = call(name, s)
    assert found.dtype == torch.float64 and found.shape == ((7,) if name == "sft" else (5,))


@pytest.mark.parametrize("name", EVERY)
def test_losses_that_depend_on_the_rest_of_the_batch_are_named(name: str) -> None:
    s = scores()
    index = [k for k in ("chosen", "rejected", "margin", "response", "desirable", "ranking") if k in s]
    alone = torch.cat([call(name, s | {k: s[k][[n]] for k in index}, **only(name, n)) for n in range(5)])
    if name in losses.COUPLED:
        assert (alone - call(name, s, **only(name))).abs().max() > 1e-3
    else:
        close(alone, call(name, s, **only(name)))


def only(name: str, n: int | None = None) -> dict[str, Any]:
    """sft's response, which `call` would take for ratings alone."""
    return {"response": scores()["response"][slice(None) if n is None else [n]]} if name == "sft" else {}


# -- soft labels and weights


@pytest.mark.parametrize("name", sorted(set(PAIRWISE) - OWN_SOFT_LABEL))
def test_a_soft_label_is_the_expectation_over_the_label(name: str) -> None:
    s, p = scores(), scores()["preference"]
    expected = p * call(name, s) + (1 - p) * call(name, flipped(s))
    close(call(name, s, preference=p), expected)


@pytest.mark.parametrize("name", sorted(set(PAIRWISE) - {"aot", "aot_unpaired"}))
def test_labels_of_1_and_0_are_the_pair_as_given_and_the_other_way_round(name: str) -> None:
    s, ones = scores(), torch.ones(5, dtype=torch.float64)
    close(call(name, s, preference=ones), call(name, s))
    close(call(name, s, preference=0 * ones), call(name, flipped(s)))


@pytest.mark.parametrize("name", PAIRWISE)
def test_swapping_the_answers_and_the_label_changes_nothing(name: str) -> None:
    s = scores()
    other = flipped(s)
    keys = [{"preference": x["preference"], "weight": x["weight"]} for x in (s, other)]
    close(call(name, other, **keys[1]), call(name, s, **keys[0]))


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"aot", "aot_unpaired"}))
def test_weights_multiply_each_example(name: str) -> None:
    s = scores()
    keys = only(name) | ({"delta": 0.2} if name in losses.COUPLED else {})
    close(call(name, s, weight=s["weight"], **keys), s["weight"] * call(name, s, **keys))


@pytest.mark.parametrize("name", sorted(losses.COUPLED))
def test_a_weight_of_2_in_a_coupled_loss_is_the_row_twice(name: str) -> None:
    s, times = scores(), torch.tensor([1, 2, 0, 3, 1])
    rows = torch.arange(5).repeat_interleave(times)
    repeated = s | {k: s[k][rows] for k in ("chosen", "rejected", "response", "desirable")}
    expected = call(name, repeated).sum()
    close(call(name, s, weight=times.double()).sum(), expected)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_soft_label_in_a_sorted_loss_is_rows_in_that_proportion(name: str) -> None:
    """Preference 3/4 and weight 4: three rows one way, one the other."""
    s = scores()
    p = torch.tensor([0.75, 1.0, 0.5, 0.0, 0.25], dtype=torch.float64)
    one, other = (torch.arange(5).repeat_interleave((4 * share).long()) for share in (p, 1 - p))
    repeated = s | {"chosen": torch.cat([s["chosen"][one], s["rejected"][other]])}
    repeated |= {"rejected": torch.cat([s["rejected"][one], s["chosen"][other]])}
    close(4 * call(name, s, preference=p).sum(), call(name, repeated).sum())


def test_sppos_own_soft_label_has_the_gradient_of_the_expectation() -> None:
    s, p = scores(), scores()["preference"]
    policy = s["policy_logp"].requires_grad_()
    own = call("sppo", s, preference=p)
    expectation = p * call("sppo", s) + (1 - p) * call("sppo", flipped(s))
    close(*(torch.autograd.grad(loss.sum(), policy)[0] for loss in (own, expectation)))
    close((expectation - own).detach(), 8 * p * (1 - p) / (2 * 0.1) ** 2)  # of p alone


# -- symmetries, and where the policy is the reference


@pytest.mark.parametrize("name", [*PAIRWISE, *RANKED])
def test_what_both_answers_of_a_prompt_share_does_not_count(name: str) -> None:
    """Added to every logp, or to the logp of every token: losses of a margin do not see it, the others do."""
    plain = {
        "dpo",
        "cdpo",
        "robust",
        "ipo",
        "hinge",
        "exo",
        "discopop",
        "bco",
        "aot",
        "aot_unpaired",
        "r_dpo",
        "mm_dpo",
        "reward",
    }
    per_token = {"ipo_mean", "ln_dpo", "simpo"}
    s = scores()
    all_more = s | {
        "policy_logp": s["policy_logp"] + 3.7,
        "rewards": s["rewards"] + 3.7,
        "policy_tokens": s["policy_tokens"] + 1,
    }
    tokens_more = s | {"policy_logp": s["policy_logp"] + 0.1 * s["length"].double()}
    for changed, unseen in ((all_more, plain | set(RANKED)), (tokens_more, per_token)):
        difference = (call(name, changed) - call(name, s)).abs().max()
        if name in unseen:
            assert difference < tolerances.EXACT
        elif name not in ("reward", "ld_dpo"):  # those two read other scores
            assert difference > 1e-3
    both = {k: s[k] + 3.7 for k in ("policy_logp", "reference_logp")}
    if name not in NO_REFERENCE | {"rpo", "ld_dpo"}:
        close(call(name, s | both), call(name, s))


AT_REFERENCE = {
    **dict.fromkeys(
        ["dpo", "cdpo", "robust", "ln_dpo", "ld_dpo", "dpop", "mm_dpo", "aot", "aot_unpaired", "bco_unpaired"], LN2
    ),
    **dict.fromkeys(["ipo", "ipo_mean"], 25.0),
    **dict.fromkeys(["hinge", "apo_zero", "apo_down"], 1.0),
    **dict.fromkeys(["nca", "bco"], 2 * LN2),
    "exo": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
    "sppo": 50.0,
    "discopop": (LN2 + 1) / 2,
    "apo_zero_unpaired": 0.5,
}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_values_where_the_policy_is_the_reference(name: str) -> None:
    s = scores()
    s |= {"policy_logp": s["reference_logp"], "policy_tokens": s["reference_tokens"]}
    close(call(name, s), torch.full((5,), AT_REFERENCE[name], dtype=torch.float64))


def test_values_where_the_policy_is_the_reference_and_something_else_counts() -> None:
    s = scores()
    s |= {"policy_logp": s["reference_logp"]}
    more = (s["length"][s["chosen"]] - s["length"][s["rejected"]]).double()
    close(call("r_dpo", s), torch.log1p(torch.exp(-0.01 * more)))
    close(call("rpo", s), LN2 - (s["policy_logp"] / s["length"])[s["chosen"]])
    close(call("kto", s, baseline=0.0), torch.full((5,), 0.5, dtype=torch.float64))
    close(call("plackett_luce", s), torch.tensor([math.log(math.factorial(n)) for n in (4, 2, 3, 1, 4)], dtype=torch.float64))


# -- gradients and size


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_right_in_float64(name: str) -> None:
    s = scores()
    keys = {k: s[k] for k in ("preference", "weight") if k in inspect.signature(getattr(losses, name)).parameters}
    keys |= only(name) | ({"delta": 0.2} if "bco" in name else {})
    keys |= {"margin": s["margin"], "centering": 0.01} if name == "reward" else {}
    assert torch.autograd.gradcheck(lambda x: call(name, s | {source(name): x}, **keys), (s[source(name)].requires_grad_(),))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", EVERY)
def test_float32_has_the_values_and_gradients_of_float64(name: str, divergence: Any) -> None:
    def at(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        s = {k: x.to(dtype) if x.is_floating_point() else x for k, x in scores().items()}
        x = s[source(name)].requires_grad_()
        diverged = losses.diverge(s["policy_logp"], s["reference_logp"], divergence)
        loss = call(name, s | ({"policy_logp": diverged} if source(name) == "policy_logp" else {}), **only(name))
        return loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()

    for found, expected in zip(at(torch.float32), at(torch.float64), strict=True):
        torch.testing.assert_close(found, expected, atol=tolerances.GRADIENT, rtol=tolerances.GRADIENT)


@pytest.mark.parametrize("name", ["bco", "bco_unpaired"])
def test_no_gradient_flows_through_bcos_delta(name: str) -> None:
    s = scores()
    policy = s["policy_logp"].requires_grad_()
    r = 0.1 * (policy - s["reference_logp"]).detach()
    liked = r[s["response"]]
    kinds = [liked[s["desirable"]].mean(), liked[~s["desirable"]].mean()]
    sides = [r[s["chosen"]].mean(), r[s["rejected"]].mean()]
    delta = float(sum(sides if name == "bco" else kinds)) / 2
    found, expected = call(name, s), call(name, s, delta=delta)
    close(found.detach(), expected.detach())
    close(*(torch.autograd.grad(loss.sum(), policy)[0] for loss in (found, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize(("name", "p"), [*((name, None) for name in EVERY), *((name, 0.8) for name in PAIRWISE)])
def test_large_log_probabilities_stay_finite(name: str, p: float | None, size: float, dtype: torch.dtype) -> None:
    """In value and gradient; the value is the one of float64."""

    def at(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        values = torch.tensor([size, -size, 0.0], dtype=dtype)
        s: dict[str, Any] = {"length": torch.tensor([1, 1, 1]), "chosen": ZERO, "rejected": ONE, "response": torch.arange(2)}
        s |= {"desirable": torch.tensor([True, False]), "baseline": 0.0, "ranking": torch.tensor([[0, 2, 1], [1, 0, -1]])}
        s |= {"reference_logp": 0 * values, "reference_tokens": 0 * values.unsqueeze(1), "margin": torch.ones(1, dtype=dtype)}
        s |= {"policy_logp": values, "policy_tokens": values.unsqueeze(1), "rewards": values}
        x = s[source(name)].requires_grad_()
        soft = {} if p is None else {"preference": torch.tensor([p], dtype=dtype)}
        loss = call(name, s, **soft)
        return loss, torch.autograd.grad(loss.sum(), x)[0]

    (loss, slope), (exact, _) = at(dtype), at(torch.float64)
    assert loss.dtype == dtype and loss.isfinite().all() and slope.isfinite().all()
    rtol = tolerances.HUGE[str(dtype).removeprefix("torch.")]
    torch.testing.assert_close(loss.double(), exact, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", ["dpo", "ipo", "sppo", "exo", "discopop"])
def test_diverged_scores_stay_finite(name: str, divergence: Any, dtype: torch.dtype) -> None:
    reference = torch.zeros(2, dtype=dtype)
    policy = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = getattr(losses, name)(losses.diverge(policy, reference, divergence), reference, ONE, ZERO, beta=1.0)
    (slope,) = torch.autograd.grad(loss.sum(), policy)
    assert loss.isfinite().all() and slope.isfinite().all()
    if name in ("dpo", "ipo"):
        assert slope[1] < 0  # the answer that is far below its reference is still drawn up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certain_answers_have_finite_odds(dtype: torch.dtype) -> None:
    policy = torch.tensor([0.0, -1e-7, -3.0], dtype=dtype, requires_grad=True)
    loss = losses.orpo(policy, torch.ones(3), torch.tensor([0, 2, 1]), torch.tensor([2, 0, 0]), beta=1.0)
    (slope,) = torch.autograd.grad(loss.sum(), policy)
    assert loss.isfinite().all() and slope.isfinite().all()


# -- refusals and examples


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((name, "beta", value) for name in PAIRWISE if name not in ("orpo", "reward") for value in (0.0, -0.1, math.nan)),
        *((name, "beta", math.inf) for name in [*UNPAIRED, *RANKED]),
        *((name, "noise", value) for name in ("cdpo", "robust") for value in (-0.1, 0.5, 0.7)),
        *(("exo", "epsilon", value) for value in (0.0, 0.5)),
        *(("discopop", "temperature", value) for value in (0.0, 1.1)),
        *(("ld_dpo", "alpha", value) for value in (-0.1, 1.1)),
        *((name, key, -0.1) for name in UNPAIRED for key in ("desirable_weight", "undesirable_weight")),
        *((name, "alpha", -0.1) for name in ("cpo", "r_dpo", "rpo")),
        *[("orpo", "beta", -0.1), ("simpo", "gamma", -0.1), ("dpop", "penalty", -1.0), ("reward", "centering", -0.1)],
        *[("mm_dpo", "scale", -0.1), ("mm_dpo", "rate", 0.0)],
    ],
)
def test_bad_hyperparameters_are_refused_by_name(name: str, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{key} must be .* not {value}$"):
        call(name, scores(), **{key: value})


def test_other_refusals() -> None:
    policy = torch.zeros(2)
    with pytest.raises(ValueError, match="reverse_kl, forward_kl, js, alpha, not kl"):
        losses.diverge(policy, policy, "kl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha must be"):
        losses.diverge(policy, policy, "alpha", alpha=0.0)
    with pytest.raises(ValueError, match="at least one"):
        losses.kto_baseline(policy[:0])


def test_rewards_are_beta_times_the_log_ratio_and_detached() -> None:
    policy = torch.tensor([-3.0, -9.0], requires_grad=True)
    reward = losses.rewards(policy, torch.tensor([-5.0, -4.0]), 0.1)
    assert not reward.requires_grad
    torch.testing.assert_close(reward, torch.tensor([0.2, -0.5]))


def test_docstrings_name_their_source_and_their_examples_are_right() -> None:
    attempted = {}
    for module in pkgutil.iter_modules(losses.__path__, "preftune.losses."):
        finder, runner = doctest.DocTestFinder(exclude_empty=False), doctest.DocTestRunner()
        for test in finder.find(importlib.import_module(module.name)):
            assert runner.run(test).failed == 0
            attempted[test.name.split(".")[-1]] = len(test.examples)
    functions = set(losses.__all__) - {"COUPLED"}
    assert {name for name in functions if not attempted[name]} == {"rewards"}
    assert {name for name in functions if "Source:" not in (getattr(losses, name).__doc__ or "")} == {"sft"}
