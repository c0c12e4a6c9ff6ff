"""Held-out figures, their intervals, win rates and KL: against counts and enumerations by hand."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import tolerances
import torch
from torch import Tensor, nn

import preftune
from preftune import methods
from preftune.data.render import Batch, Rendered, render
from preftune.errors import Refusal, RunFailed
from preftune.evaluation.evaluate import compare
from preftune.evaluation.held_out import held_out, method_metrics, needed_rows
from preftune.evaluation.intervals import mean_interval, share_interval
from preftune.evaluation.kl import kl_per_response
from preftune.evaluation.win_rate import win_rate
from preftune.functions import judge, load_function
from preftune.generation.sample import Sample
from preftune.records import Comparison, Group
from preftune.scoring.score import score

KEYS = {
    *("comparisons", "demonstrations", "prompts", "accuracy", "accuracy_interval", "logp_accuracy", "logp_accuracy_interval"),
    *("margin", "loss", "kl", "kl_samples", "kl_interval", "method", "beta"),
}


def batch_of(*groups: tuple[int, tuple[Comparison, ...]]) -> Batch:
    """Groups of so many responses with these comparisons; the tokens do not matter."""
    made: list[Group] = []
    sequences: list[Rendered] = []
    first: list[int] = []
    for g, (count, marks) in enumerate(groups):
        made.append(Group(f"prompt {g}", tiny.answers("", *(f"answer {n}" for n in range(count))), marks))
        first.append(len(sequences))
        sequences += [Rendered(g, n, (0, 1, 2), 1) for n in range(count)]
    return Batch(tuple(made), tuple(sequences), (), tuple(first))


# -- accuracy -----------------------------------------------------------------------------------------------------------------

HAND = batch_of(
    (2, (Comparison(0, 1),)),  # right by log-ratio, wrong by logp
    (2, (Comparison(0, 1, 0.2),)),  # b is the likelier winner; wrong by log-ratio, right by logp
    (2, (Comparison(0, 1, 0.5),)),  # a tie: does not count
    (3, (Comparison(0, 1, 0.9, weight=3.0), Comparison(2, 1))),  # a margin of 0 counts one half; right
)
POLICY = torch.tensor([-5.0, -4.0, -6.0, -2.0, -1.0, -3.0, -7.0, -9.0, -2.0])
REFERENCE = torch.tensor([-7.0, -4.0, -9.0, -2.0, -1.0, -5.0, -4.0, -6.0, -2.0])
MARGINS = [2.0, -3.0, -2.0, 0.0, 3.0]  # chosen minus rejected of the log-ratios 2 0 | 3 0 | 0 2 | -3 -3 0


def test_accuracy_by_hand_with_ties_and_margins_of_zero() -> None:
    dpo = methods.make("dpo", beta=0.5)
    found = held_out(HAND, dpo, POLICY, REFERENCE)
    assert set(found) == KEYS
    assert (found["comparisons"], found["prompts"]) == (5, 4)
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["logp_accuracy"] == pytest.approx((0 + 1 + 1 + 1) / 4)
    assert found["margin"] == pytest.approx(sum(MARGINS) / 5)
    assert (found["method"], found["beta"]) == ("dpo", 0.5)
    assert found["accuracy_interval"][0] <= found["accuracy"] <= found["accuracy_interval"][1]


def test_held_out_loss_is_weighted_as_a_training_step_is() -> None:
    found = method_metrics(HAND, methods.make("dpo", beta=0.5), POLICY, REFERENCE)
    loss = 0.0
    for margin, p, weight in zip(MARGINS, [1, 0.8, 0.5, 0.9, 1], [1, 1, 1, 3, 1], strict=True):
        sigmoid = 1 / (1 + math.exp(-0.5 * margin))
        loss -= weight * (p * math.log(sigmoid) + (1 - p) * math.log(1 - sigmoid)) / 7
    assert found["loss"] == pytest.approx(loss, abs=tolerances.FIGURE)
    assert found["accuracy"] == pytest.approx(2.5 / 4) and found["margin"] == pytest.approx(sum(MARGINS) / 5)


def test_without_a_reference_what_needs_one_is_null() -> None:
    found = held_out(HAND, methods.make("dpo", beta=0.5), POLICY, None)
    assert {k for k, v in found.items() if v is None} == {
        *("demonstrations", "accuracy", "accuracy_interval", "margin", "loss", "kl", "kl_samples", "kl_interval")
    }
    assert found["logp_accuracy"] == pytest.approx(3 / 4)


def test_only_ties_and_nothing_at_all_give_null() -> None:
    dpo = methods.make("dpo", beta=0.5)
    ties = held_out(batch_of((2, (Comparison(0, 1, 0.5),))), dpo, POLICY[:2], REFERENCE[:2])
    assert (ties["accuracy"], ties["accuracy_interval"], ties["comparisons"]) == (None, None, 1)
    empty = held_out(Batch((), ()), dpo, torch.zeros(0), torch.zeros(0))
    assert (empty["accuracy"], empty["loss"], empty["margin"], empty["comparisons"]) == (None, None, None, 0)


def test_evaluate_measures_the_model_it_is_given(model: Any, tokenizer: Any) -> None:
    groups, other = tiny.pairs(6), tiny.model(seed=1)
    batch = render(groups, tokenizer)
    with torch.no_grad():
        policy, reference = score(model, batch).logp, score(other, batch).logp
    alone = preftune.evaluate(model, tokenizer, groups)
    assert set(alone) == KEYS and alone["method"] == "dpo"
    assert all(alone[k] is None for k in ("accuracy", "accuracy_interval", "margin", "loss", "kl", "kl_samples", "kl_interval"))
    right = (policy[0::2] > policy[1::2]).double().mean()
    assert alone["logp_accuracy"] == pytest.approx(float(right)) and 0 < float(right) < 1
    both = preftune.evaluate(model, tokenizer, batch, reference=other, beta=0.3, kl_samples=4, max_new_tokens=5)
    ratio = policy - reference
    assert both["accuracy"] == pytest.approx(float((ratio[0::2] > ratio[1::2]).double().mean()))
    assert both["margin"] == pytest.approx(float((ratio[0::2] - ratio[1::2]).mean()), abs=tolerances.LOGP)
    assert (both["kl_samples"], both["beta"]) == (4, 0.3) and both["kl"] > 0.1
    assert both["kl_interval"][0] < both["kl"] < both["kl_interval"][1]
    same = preftune.evaluate(model, tokenizer, groups, reference=tiny.model(), kl_samples=4, max_new_tokens=5)
    assert (same["accuracy"], same["loss"]) == (0.5, pytest.approx(math.log(2), abs=tolerances.FIRST_LOSS))
    assert same["kl"] == pytest.approx(0, abs=tolerances.KL)


def test_evaluate_on_demonstrations_gives_their_perplexity(model: Any, tokenizer: Any) -> None:
    groups = [tiny.shown("Q: ", "yes"), tiny.shown("R: ", "the end of it", weight=2.0)]
    found = preftune.evaluate(model, tokenizer, groups)
    with torch.no_grad():
        scores = score(model, render(groups, tokenizer))
    loss = -float(scores.logp[0] + 2 * scores.logp[1]) / float(scores.length[0] + 2 * scores.length[1])
    assert found["loss"] == pytest.approx(loss, abs=tolerances.FIGURE)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["method"], found["demonstrations"], found["accuracy"], found["beta"]) == ("sft", 2, None, None)


def test_needed_rows_are_those_that_a_figure_reads() -> None:
    group = Group("p", tiny.answers("p", "a", "b", "c"), (Comparison(0, 2),))
    batch = batch_of((3, group.marks))
    assert needed_rows(batch, methods.make("dpo", beta=1.0)) == [0, 2]


# -- intervals ----------------------------------------------------------------------------------------------------------------


def test_intervals_of_a_constant_are_that_constant() -> None:
    assert mean_interval([0.25] * 7, range(7)) == (0.25, (0.25, 0.25))
    assert mean_interval([1.0, 0.0], ["one prompt"] * 2) == (0.5, (0.5, 0.5))
    assert mean_interval([math.nan, 1.0], [0, 1]) == (1.0, (1.0, 1.0))
    assert mean_interval([math.nan], [0]) is None and mean_interval([], []) is None


def test_the_interval_of_a_share_is_the_bootstrap_of_prompts() -> None:
    draw = np.random.default_rng(0)
    of = draw.integers(1, 6, 300)
    good = np.where(draw.random(300) < 0.6, of, 0)  # all of a prompt or none: prompts count, not rows
    values = [float(n < g) for g, o in zip(good, of, strict=True) for n in range(o)]
    prompts = [p for p, o in enumerate(of) for _ in range(o)]
    share, ends = share_interval(good, of) or (0, (0, 0))
    mean, wanted = mean_interval(values, prompts) or (0, (0, 0))
    assert share == pytest.approx(mean) and ends == pytest.approx(wanted, abs=0.006)
    assert share_interval([], []) is None and share_interval([0], [0]) is None


def test_intervals_have_the_width_that_theory_gives_and_follow_the_seed() -> None:
    x = np.random.default_rng(0).random(400)
    mean, (low, high) = mean_interval(list(x), range(400)) or (0, (0, 0))
    assert mean == pytest.approx(x.mean())
    half = 1.96 * x.std() / 20
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.1), pytest.approx(half, rel=0.1))
    assert mean_interval(list(x), range(400)) == (mean, (low, high))
    assert mean_interval(list(x), range(400), seed=1) != (mean, (low, high))


def test_examples_of_one_prompt_are_drawn_together() -> None:
    values = [float(n % 2) for n in range(40) for _ in range(10)]
    prompts = [n for n in range(40) for _ in range(10)]
    _, grouped = mean_interval(values, prompts) or (0, (0, 0))
    _, apart = mean_interval(values, range(400)) or (0, (0, 0))
    assert grouped[1] - grouped[0] > 2.5 * (apart[1] - apart[0])  # sqrt(10) in theory


def test_accuracy_intervals_are_drawn_over_prompts() -> None:
    marks = tuple(Comparison(n, n + 1) for n in range(0, 20, 2))
    batch = batch_of(*[(20, marks)] * 8)
    logp = torch.tensor([(-1.0 if (n % 2 == 0) == (g < 4) else -2.0) for g in range(8) for n in range(20)])
    found = held_out(batch, methods.make("dpo", beta=0.5), logp, torch.zeros(160))
    assert found["accuracy"] == 0.5
    assert found["accuracy_interval"][1] - found["accuracy_interval"][0] > 0.5


# -- win rates ----------------------------------------------------------------------------------------------------------------


def test_win_rate_by_hand() -> None:
    found = win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 3.5])
    assert {k: found[k] for k in ("prompts", "wins", "ties", "losses")} == {"prompts": 4, "wins": 2, "ties": 1, "losses": 1}
    assert found["win_rate"] == pytest.approx(2.5 / 4)
    assert found["win_rate_interval"][0] < 2.5 / 4 < found["win_rate_interval"][1]
    assert win_rate([], [])["win_rate"] is None


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_a_scorer_has_to_give_one_finite_number_per_response(values: list[float]) -> None:
    with pytest.raises(RunFailed, match="my:scorer gave"):
        judge(lambda prompts, responses: values, ["p", "p"], ["a", "b"], "my:scorer")


@pytest.mark.parametrize("name", ["math", "nowhere_at_all:f", "math:nothing", "math:pi"])
def test_a_scorer_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(Refusal) as refused:
        load_function(name, "scorer")
    assert (refused.value.code, refused.value.key) == ("bad_scorer", "scorer")


def test_compare_judges_one_sample_of_each_model(tokenizer: Any) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def scorer(prompts: list[str], responses: list[str]) -> list[float]:
        seen.append((prompts, responses))
        return [float(len(r)) for r in responses]

    groups = tiny.pairs(5)
    found = compare(tiny.model(), tiny.model(), tokenizer, groups, scorer, name="x:y", max_new_tokens=5)
    assert (found["ties"], found["win_rate"], found["prompts"]) == (5, 0.5, 5), "the same model, the same seed: ties"
    found = compare(tiny.model(), tiny.model(seed=3), tokenizer, groups, scorer, name="x:y", max_new_tokens=5)
    assert set(found) == {
        *("prompts", "win_rate", "win_rate_interval", "wins", "ties", "losses", "length", "length_against", "scorer")
    }
    assert seen[0][0] == [g.prompt for g in groups] and seen[2][1] != seen[3][1]
    assert 0 < found["length"] <= 5 and found["scorer"] == "x:y"


# -- KL -----------------------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A causal model whose next token depends on the last one alone: logits are a row of a table."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))

    def get_output_embeddings(self) -> Table:
        return self

    def forward(self, input_ids: Tensor, **keys: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.weight[input_ids])


def responses(count: int = 2) -> list[Sample]:
    """Every response of `count` tokens to the prompt (1, 0), and a longer one to another prompt, so that rows are padded."""
    all_of_them = [Sample(0, n, (1, 0), ids, "", "length") for n, ids in enumerate(product(range(3), repeat=count))]
    return [*all_of_them, Sample(1, 0, (2, 2, 1), (0, 1, 2, 0), "", "length")]


def test_kl_is_the_exact_sum_over_the_steps_of_each_response() -> None:
    policy, reference = Table(0), Table(1)
    p, q = (m.weight.detach().double().softmax(-1) for m in (policy, reference))
    step = [sum(float(p[last, t] * (p[last, t] / q[last, t]).log()) for t in range(3)) for last in range(3)]
    samples = responses()
    found = kl_per_response(policy, reference, samples)
    expected = [step[0] + step[s.ids[0]] for s in samples[:-1]] + [step[1] + step[0] + step[1] + step[2]]
    assert found == pytest.approx(expected, abs=tolerances.KL)
    # its mean under the policy is the KL of whole responses, enumerated
    weight = [float(p[0, s.ids[0]] * p[s.ids[0], s.ids[1]]) for s in samples[:-1]]
    other = [float(q[0, s.ids[0]] * q[s.ids[0], s.ids[1]]) for s in samples[:-1]]
    whole = sum(w * math.log(w / o) for w, o in zip(weight, other, strict=True))
    assert sum(w * v for w, v in zip(weight, found, strict=False)) == pytest.approx(whole, abs=tolerances.KL)


def test_kl_of_a_model_to_itself_is_zero_and_else_positive_both_ways() -> None:
    one, other = Table(0), Table(1)
    assert kl_per_response(one, Table(0), responses()) == [0.0] * 10
    forth, back = kl_per_response(one, other, responses()), kl_per_response(other, one, responses())
    assert min(forth + back) > 0 and forth != pytest.approx(back, abs=0.01)


# -- what is not finite -------------------------------------------------------------------------------------------------------


def spoiled() -> Any:
    """A model that gives no number once the token of "z" was read."""
    model = tiny.model(tie_word_embeddings=False, name="untied")
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.tokenizer()("z").input_ids[-1]] = math.nan
    return model


def test_a_score_that_is_no_number_is_an_error_that_names_its_row(model: Any, tokenizer: Any) -> None:
    groups = [*tiny.pairs(2), tiny.pair("Q: ", "zz top", "other", row=7)]
    for policy, reference in ((spoiled(), None), (model, spoiled())):
        with pytest.raises(RunFailed, match=r"no finite log-probability to 1 of \d+ responses \(pairs.jsonl row 7\)"):
            preftune.evaluate(policy, tokenizer, groups, reference=reference)


def test_a_kl_that_is_no_number_is_an_error(model: Any) -> None:
    z = tiny.tokenizer()("z").input_ids[-1]
    samples = [Sample(0, 0, (9, 30), (31, 32), "", "length"), Sample(1, 0, (9, 30), (z, 32), "", "length")]
    with pytest.raises(RunFailed, match="the KL of response 1 is nan"):
        kl_per_response(model, spoiled(), samples)


def test_a_vocabulary_padded_further_is_the_same_vocabulary(model: Any, tokenizer: Any) -> None:
    """Three more rows of zeros in the reference: nothing but a trace of probability on them."""
    padded = tiny.model()
    padded.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    with torch.no_grad():
        padded.get_input_embeddings().weight[tiny.VOCABULARY :] = -30 * padded.get_input_embeddings().weight.mean(0)
    found = preftune.evaluate(model, tokenizer, tiny.pairs(4), reference=padded, kl_samples=4, max_new_tokens=5)
    assert found["kl"] is not None and math.isfinite(found["margin"])
    other = tiny.model(vocab_size=tiny.VOCABULARY + 5000)
    with pytest.raises(Refusal) as refused:
        preftune.evaluate(model, tokenizer, tiny.pairs(4), reference=other)
    assert (refused.value.code, refused.value.key) == ("vocabulary_mismatch", "reference")


def test_rows_that_are_too_long_are_said_and_more_than_half_refused(
    model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = tiny.pairs(3), tiny.pair("Q: ", "word " * 30, "no", row=9)
    found = preftune.evaluate(model, tokenizer, [*short, long])
    assert found["comparisons"] == 3 and "1 more rows dropped: too_long 1 (row 9)" in caplog.text
    with pytest.raises(Refusal, match="2 of 3 rows were dropped"):
        preftune.evaluate(model, tokenizer, [short[0], long, tiny.pair("R: ", "word " * 30, "no", row=10)])


def test_a_token_that_both_models_rule_out_adds_nothing_to_the_kl() -> None:
    def ruled(seed: int) -> Any:
        model = tiny.model("phi", seed=seed)
        with torch.no_grad():
            model.lm_head.bias[5] = -math.inf
        return model

    (found,) = kl_per_response(ruled(0), ruled(1), [Sample(0, 0, (9, 30), (31, 32), "", "length")])
    assert math.isfinite(found) and found > 0


def test_no_room_for_a_sample_costs_the_kl_alone(model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    groups = [tiny.pair("a b c d " * 7, "x", "yes", row=n) for n in (1, 2)]
    full = tiny.model(positions=len(tokenizer(str(groups[0].prompt)).input_ids))
    keys = {"reference": full, "too_long": "truncate_prompt_start"}
    found = preftune.evaluate(full, tokenizer, groups, max_length=full.config.max_position_embeddings, **keys)
    assert found["accuracy"] == 0.5 and (found["kl"] is None) == ("no KL" in caplog.text)


def test_kl_of_a_model_whose_frequencies_follow_the_longest_row_is_that_of_each_row_alone() -> None:
    """longrope: a row over the limit does not change those within it."""
    factors = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 6.0], "factor": 4.0, "original_max_position_embeddings": 24}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    policy, base = (tiny.model(seed=seed, positions=96, rope_parameters=rope) for seed in (0, 1))
    samples = [Sample(n, 0, tuple(range(3, 3 + long)), (7, 8, 9), "", "length") for n, long in enumerate((6, 40, 9))]
    together = kl_per_response(policy, base, samples)
    assert together == pytest.approx([kl_per_response(policy, base, [s])[0] for s in samples], rel=1e-4)
