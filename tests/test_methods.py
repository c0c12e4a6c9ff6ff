"""Every method through the loop: what a step computes against the pure function by hand, by any cut, and what is refused."""

from __future__ import annotations

import inspect
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import tiny
import tolerances
import torch
from torch import Tensor

import preftune
from preftune import losses, methods
from preftune.config import build
from preftune.data.render import Batch, render
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.methods.table import ELSEWHERE
from preftune.methods.unpaired import mismatched, partners
from preftune.models.adapters import adapter_dropout_on, add_adapter
from preftune.models.options import AdapterOptions
from preftune.records import By, Comparison, Demonstration, Group, Mark, Ranking, Rating
from preftune.scoring.score import score
from preftune.scoring.scorer import Scorer
from preftune.training.gradient import Step, backward

# the contract's list, less the reward model
NAMES = [
    *("sft", "dpo", "cdpo", "robust", "ipo", "ipo_mean", "hinge", "simpo", "orpo", "cpo", "apo_zero", "apo_down", "exo", "nca"),
    *("bco", "sppo", "aot", "aot_unpaired", "discopop", "r_dpo", "ld_dpo", "ln_dpo", "rpo", "dpop", "mm_dpo", "plackett_luce"),
    *("kto", "bco_unpaired", "apo_zero_unpaired"),
]
OF_PAIRS = [name for name in NAMES if methods.NEEDS[name].kind in ("pairs", "cut_pairs")]
OF_RATINGS = [name for name in NAMES if methods.NEEDS[name].kind == "ratings"]
BETA = 0.3
ALL = 10**6  # tokens: everything in one micro-batch

Asked = str | Mapping[str, Any]


@pytest.fixture(autouse=True)
def _no_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine is takes longer to measure than three steps do."""
    monkeypatch.setattr("preftune.training.estimate.matrix_rate", lambda dtype, device: 1e9)


def comparisons(*, soft: bool = True, heavy: bool = True) -> list[Group]:
    """Five comparisons and a prompt with three, of unlike lengths, weights, labels and strengths."""
    groups = [
        tiny.pairs(
            n + 1,
            weight=0.5 + n if heavy else 1.0,
            preference=1 - 0.1 * n if soft else 1.0,
            by=By(strength=0.7 * n - 0.5),
        )[-1]
        for n in range(5)
    ]
    marks = (
        Comparison(0, 1, weight=3.0 if heavy else 1.0),
        Comparison(2, 0, 0.2 if soft else 0.0, by=By(strength=1.5)),
        Comparison(1, 2, 0.5 if soft else 1.0, weight=0.25 if heavy else 1.0),
    )
    return [*groups, Group("Many: ", tiny.answers("Many: ", "the one", "two", "three, four"), marks)]


def rankings() -> list[Group]:
    """Rankings of two, three and four answers, some tied."""
    answers = ("the one", "two", "three, four", "five of them")
    tiers = [((1,), (0,)), ((2,), (0, 1)), ((3,), (1,), (0,), (2,)), ((0, 1), (2, 3)), ((0, 1),)]
    return [
        Group(f"R{n}: ", tiny.answers("", *answers[: 1 + max(map(max, own))]), (Ranking(own, weight=1 + 0.5 * n),))
        for n, own in enumerate(tiers)
    ]


def ratings(count: int = 5, kinds: Sequence[bool] = (True, False)) -> list[Group]:
    """A desirable and an undesirable answer to each prompt, one prompt with three ratings, one of them twice."""
    groups = [replace(g, marks=tuple(Rating(r, kind, weight=1 + r) for r, kind in enumerate(kinds))) for g in tiny.pairs(count)]
    marks = (Rating(0, kinds[0]), Rating(1, kinds[-1], weight=0.5), Rating(1, kinds[0]))
    return [*groups, Group("Many: ", tiny.answers("Many: ", "the one", "two"), marks)]


def judged(name: str) -> list[Group]:
    match methods.NEEDS[name].kind:
        case "ratings":
            return ratings()
        case "rankings":
            return [*rankings(), *comparisons()]
        case _:
            return comparisons()


def options(asked: Asked) -> dict[str, Any]:
    return {"name": asked} if isinstance(asked, str) else dict(asked)


class Taken:
    """One step of a method over all its examples, from a policy that is not the reference."""

    def __init__(
        self, asked: Asked, groups: Sequence[Group], *, budget: int = ALL, order: int | None = None, model: Any = None
    ) -> None:
        self.method = methods.make(options(asked), beta=BETA)
        self.batch: Batch = self.method.rows(render(groups, tiny.tokenizer()), lambda more: render(more, tiny.tokenizer()))
        self.examples = self.method.examples(self.batch.groups)
        if order is not None:
            random.Random(order).shuffle(self.examples)
        self.reference = score(tiny.model(seed=1), self.batch).logp.detach()
        self.model = model or tiny.model()
        self.policy = score(self.model, self.batch).logp
        self.length = torch.tensor([float(s.length) for s in self.batch.sequences])
        scorer = Scorer(self.model)
        self.step = Step.of(scorer, self.batch, self.method, self.examples, self.reference, budget)
        self.line, self.tokens = backward(scorer, self.step)
        self.gradients = {key: p.grad.clone() for key, p in self.model.named_parameters() if p.grad is not None}

    @property
    def loss(self) -> float:
        return self.line["loss"]

    def rows(self, *which: int) -> list[Tensor]:
        """For each of the asked responses of an example, its rows: [examples]."""
        return [torch.tensor([self.batch.index(e.group, e.responses[n]) for e in self.examples]) for n in which]

    def label(self, name: str) -> Tensor:
        return torch.tensor([float(getattr(e, name)) for e in self.examples])

    def pairs(self) -> dict[str, Any]:
        """What a loss of pairs may take."""
        chosen, rejected = self.rows(0, 1)
        found = {"policy_logp": self.policy, "reference_logp": self.reference, "length": self.length}
        found |= {"chosen": chosen, "rejected": rejected, "beta": BETA, "margin": self.label("strength")}
        return found | {"preference": self.label("preference"), "weight": self.label("weight")}

    def gradient_of(self, loss: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad()
        loss.backward()
        return {key: p.grad for key, p in self.model.named_parameters() if p.grad is not None}


def called(function: Any, found: dict[str, Any]) -> Tensor:
    takes = inspect.signature(function).parameters
    return function(**{key: value for key, value in found.items() if key in takes})


def same_gradient(a: dict[str, Tensor], b: dict[str, Tensor], bound: float) -> None:
    assert a.keys() == b.keys() and a
    size = max(float(g.abs().max()) for g in b.values())
    assert size > 0
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=bound * size, rtol=0)


def fit(groups: Sequence[Group], **keys: Any) -> Any:
    given = {"dtype": "float32", "eval_groups": [], "learning_rate": 1e-3, "reference_store": "off"}
    return preftune.fit(tiny.model(), tiny.tokenizer(), groups, **(given | keys))


# -- three steps of each --------------------------------------------------------------------------------------------------

LINE = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_s", "memory_gb"}


def sides(*names: str) -> set[str]:
    return {f"{name}/{side}" for name in names for side in ("chosen", "rejected")}


def of_line(name: str) -> set[str]:
    """The metrics that the contract gives a method: what it has not is left out."""
    kind, reference = methods.NEEDS[name].kind, methods.NEEDS[name].reference
    if kind == "answers":
        return LINE | {"logp/chosen", "length/chosen"}
    if not reference:
        return LINE | {"pairs_per_s", "logp_accuracy"} | sides("logp", "length")
    if kind == "ratings":
        return LINE | ({"baseline"} if name == "kto" else set()) | sides("reward", "logp", "log_ratio", "length")
    speed = set() if kind == "rankings" else {"pairs_per_s"}
    return LINE | speed | {"margin", "accuracy"} | sides("reward", "logp", "log_ratio", "length")


def test_the_table_is_the_contracts_list() -> None:
    assert [name for name in methods.NEEDS if name != "reward"] == NAMES  # which takes another model: test_reward.py
    assert all(name in losses.__all__ for name in NAMES)


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("name", NAMES)
def test_three_steps_of_each(name: str) -> None:
    # of dpop a small penalty: its slope is 0 at the start and steep below, and the first step of dpo's own part pays for it
    asked = {"name": name, **({"penalty": 1.0} if name == "dpop" else {})}
    run = fit(judged(name), method=asked, steps=3, batch_size=4, eval_groups=judged(name)[-3:], learning_rate=3e-5)
    assert [set(line) for line in run.metrics] == [of_line(name)] * 3
    assert all(math.isfinite(value) for line in run.metrics for value in line.values())
    if name != "dpop":  # whose penalty is steeper than three steps can follow
        assert run.after["loss"] < run.before["loss"], "it is measured on what it was trained on"
    row = methods.NEEDS[name]
    assert (run.method, run.after["beta"]) == (name, row.beta)
    told = {"ratings": "ratings", "rankings": "rankings", "answers": "demonstrations"}.get(row.kind, "comparisons")
    assert run.after[told] > 0
    if row.reference and row.kind != "ratings":
        assert abs(run.metrics[0]["margin"]) < tolerances.LOGP, "the reference is the start"


@pytest.mark.parametrize("name", NAMES)
def test_held_out_loss_is_that_of_a_step_of_all(name: str) -> None:
    taken = Taken(name, judged(name))
    beta = None if methods.NEEDS[name].beta is None else BETA
    found = preftune.evaluate(
        tiny.model(), tiny.tokenizer(), judged(name), reference=tiny.model(seed=1), method=name, beta=beta, kl_samples=0
    )
    assert found["loss"] == pytest.approx(taken.loss, rel=1e-5)
    assert found["method"] == name


# -- a step against the pure function ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OF_PAIRS if name != "ld_dpo"])
def test_a_step_of_pairs_is_the_pure_function(name: str) -> None:
    taken = Taken(name, comparisons())
    found = taken.pairs()
    by_hand = called(getattr(losses, name), found).sum() / found["weight"].sum()
    assert taken.loss == pytest.approx(float(by_hand.detach()), rel=tolerances.STEP)
    same_gradient(taken.gradients, taken.gradient_of(by_hand), tolerances.GRADIENT)


@pytest.mark.parametrize("name", OF_RATINGS)
def test_a_step_of_ratings_is_the_pure_function(name: str) -> None:
    asked = {"name": name, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    taken = Taken(asked, ratings())
    (response,) = taken.rows(0)
    found = {"policy_logp": taken.policy, "reference_logp": taken.reference, "response": response, "beta": BETA}
    found |= {"desirable": taken.label("preference") > 0.5, "weight": taken.label("weight")}
    found |= {"desirable_weight": 1.5, "undesirable_weight": 0.5, "baseline": taken.line.get("baseline")}
    by_hand = called(getattr(losses, name), found).sum() / found["weight"].sum()
    assert taken.loss == pytest.approx(float(by_hand.detach()), rel=tolerances.STEP)
    same_gradient(taken.gradients, taken.gradient_of(by_hand), tolerances.GRADIENT)


def per_token(model: Any, batch: Batch) -> list[Tensor]:
    found = score(model, batch, want=("token_logp",)).token_logp
    assert found is not None
    return list(found)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_ld_dpo_by_hand_per_token(alpha: float) -> None:
    """The pure function on every token of every answer; here each answer is two numbers."""
    taken = Taken({"name": "ld_dpo", "alpha": alpha}, comparisons())
    policy, reference = (
        torch.nn.utils.rnn.pad_sequence(per_token(model, taken.batch), batch_first=True)
        for model in (taken.model, tiny.model(seed=1))
    )
    chosen, rejected = taken.rows(0, 1)
    label = {"preference": taken.label("preference"), "weight": taken.label("weight")}
    loss = losses.ld_dpo(policy, reference.detach(), taken.length, chosen, rejected, beta=BETA, alpha=alpha, **label)
    by_hand = loss.sum() / label["weight"].sum()
    assert taken.loss == pytest.approx(float(by_hand.detach()), rel=tolerances.STEP)
    same_gradient(taken.gradients, taken.gradient_of(by_hand), tolerances.GRADIENT)
    if alpha == 1:
        assert taken.loss == pytest.approx(Taken("dpo", comparisons()).loss, rel=tolerances.STEP)
    else:
        assert abs(taken.loss - Taken("dpo", comparisons()).loss) > 1e-3


def test_cut_answers_are_the_beginnings_of_whole_ones() -> None:
    taken = Taken("ld_dpo", comparisons())
    lengths = taken.length
    whole, other, beginning, other_beginning = taken.rows(0, 1, 2, 3)
    assert torch.equal(lengths[beginning], torch.minimum(lengths[whole], lengths[other]))
    assert torch.equal(lengths[beginning], lengths[other_beginning])
    for long, short in zip([*whole, *other], [*beginning, *other_beginning], strict=True):
        a, b = taken.batch.sequences[int(long)], taken.batch.sequences[int(short)]
        assert (a.group, a.start) == (b.group, b.start) and a.ids[: len(b.ids)] == b.ids


def test_a_masked_answer_is_cut_after_the_tokens_that_are_scored() -> None:
    from preftune.data.render import Rendered
    from preftune.methods.cut import cut

    row = Rendered(0, 0, tuple(range(9)), 3, (False, True, False, True, True, False), ((4, b"x"), (8, b"y")))
    assert cut(row, 2) == replace(row, ids=tuple(range(7)), mask=(False, True, False, True), attachments=((4, b"x"),))
    assert cut(row, 3) is row


# -- labels and weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OF_PAIRS, "plackett_luce"])
def test_soft_labels_and_weights_count(name: str) -> None:
    plain = Taken(name, comparisons(soft=False, heavy=False)).loss
    assert abs(Taken(name, comparisons(soft=True, heavy=False)).loss - plain) > 1e-4
    assert abs(Taken(name, comparisons(soft=False, heavy=True)).loss - plain) > 1e-4


@pytest.mark.parametrize("name", OF_RATINGS)
def test_weights_of_ratings_count(name: str) -> None:
    light = [replace(g, marks=tuple(replace(m, weight=1.0) for m in g.marks)) for g in ratings()]
    assert abs(Taken(name, ratings()).loss - Taken(name, light).loss) > 1e-4


def swapped(mark: Mark) -> Mark:
    assert isinstance(mark, Comparison)
    return replace(mark, a=mark.b, b=mark.a, preference=1 - mark.preference)


@pytest.mark.parametrize("name", [*OF_PAIRS, "plackett_luce"])
def test_a_comparison_written_the_other_way_round_is_the_same(name: str) -> None:
    groups = comparisons()
    if name == "mm_dpo":  # of a tie, the strength is that of the answer that stands first
        groups = [replace(g, marks=tuple(m for m in g.marks if getattr(m, "preference", 1) != 0.5)) for g in groups]
    there, back = Taken(name, groups), Taken(name, [replace(g, marks=tuple(map(swapped, g.marks))) for g in groups])
    assert there.loss == pytest.approx(back.loss, rel=tolerances.STEP)
    same_gradient(there.gradients, back.gradients, tolerances.GRADIENT)


def test_ties_hold_two_answers_together() -> None:
    """At p = 1/2 dpo's loss is at its lowest where the margin is 0: either way from there its gradient is turned back."""
    taken = Taken("dpo", [tiny.pairs(1, preference=0.5)[0]])
    chosen, rejected = taken.rows(0, 1)
    margin = float(((taken.policy - taken.reference)[chosen] - (taken.policy - taken.reference)[rejected]).detach())
    assert taken.loss == pytest.approx((math.log1p(math.exp(-BETA * margin)) + math.log1p(math.exp(BETA * margin))) / 2)
    assert taken.loss > math.log(2) and "accuracy" not in taken.line, "a tie has no right side"


# -- mixes, divergences, weights of the policy ------------------------------------------------------------------------------


def test_a_mix_is_the_weighted_sum_of_its_parts() -> None:
    mixed = Taken({"mix": {"dpo": 0.8, "simpo": 0.5, "sft": 0.2}, "gamma": 0.4}, comparisons())
    dpo, simpo = Taken("dpo", comparisons()), Taken({"name": "simpo", "gamma": 0.4}, comparisons())
    found = mixed.pairs()
    nll = -(mixed.policy / mixed.length)
    p, weight = found["preference"], found["weight"]
    sft = (weight * (p * nll[found["chosen"]] + (1 - p) * nll[found["rejected"]])).sum() / weight.sum()
    assert mixed.loss == pytest.approx(0.8 * dpo.loss + 0.5 * simpo.loss + 0.2 * float(sft.detach()), rel=tolerances.STEP)
    last = mixed.gradient_of(sft)
    by_hand = {key: 0.8 * dpo.gradients[key] + 0.5 * simpo.gradients[key] + 0.2 * last[key] for key in last}
    same_gradient(mixed.gradients, by_hand, tolerances.GRADIENT)
    assert set(mixed.line) == set(dpo.line), "the metrics are those of the part that has a reference"
    assert mixed.line["reward/chosen"] == pytest.approx(dpo.line["reward/chosen"])


def test_a_mix_with_a_loss_over_the_whole_step_is_exact_by_any_cut() -> None:
    mix = {"mix": {"dpo": 0.8, "bco": 0.2, "sft": 1.0}}  # MPO
    whole, cut = Taken(mix, comparisons()), Taken(mix, comparisons(), budget=1)
    assert len(cut.step.cut) > 1 and cut.loss == pytest.approx(whole.loss, rel=tolerances.STEP)
    same_gradient(cut.gradients, whole.gradients, tolerances.GRADIENT)


@pytest.mark.usefixtures("short_answers")
def test_a_mix_trains_and_is_called_by_its_parts() -> None:
    run = fit(comparisons(), method={"mix": {"dpo": 0.8, "sft": 0.2}}, steps=2, batch_size=4)
    assert run.method == "dpo+sft" and set(run.metrics[0]) == of_line("dpo")


@pytest.mark.parametrize("name", [name for name in OF_PAIRS if methods.NEEDS[name].diverges])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_another_divergence_changes_what_the_loss_sees(name: str, divergence: Any) -> None:
    asked = {"name": name, "divergence": divergence} | ({"divergence_alpha": 0.3} if divergence == "alpha" else {})
    taken = Taken(asked, comparisons())
    found = taken.pairs()
    seen = losses.diverge(taken.policy, taken.reference, divergence, alpha=0.3)
    by_hand = called(getattr(losses, name), found | {"policy_logp": seen}).sum() / found["weight"].sum()
    assert taken.loss == pytest.approx(float(by_hand.detach()), rel=tolerances.STEP)
    plain = Taken(name, comparisons())
    assert taken.loss != pytest.approx(plain.loss, rel=1e-4)
    assert taken.line["margin"] == plain.line["margin"], "what is measured stays what it is"


@pytest.mark.parametrize("name", ["dpo", "simpo", "bco", "aot"])
def test_wpo_weighs_pairs_by_the_policy_and_divides_by_their_own_weights(name: str) -> None:
    taken = Taken({"name": name, "weighting": "wpo"}, comparisons())
    found = taken.pairs()
    own = losses.wpo_weight(taken.policy, taken.length, found["chosen"], found["rejected"])
    by_hand = called(getattr(losses, name), found | {"weight": found["weight"] * own}).sum() / found["weight"].sum()
    assert taken.loss == pytest.approx(float(by_hand.detach()), rel=tolerances.STEP)
    same_gradient(taken.gradients, taken.gradient_of(by_hand), tolerances.GRADIENT)


def test_wpo_weighs_by_what_the_policy_says_under_another_divergence_too() -> None:
    taken = Taken({"name": "dpo", "weighting": "wpo", "divergence": "forward_kl"}, comparisons())
    found = taken.pairs()
    own = losses.wpo_weight(taken.policy, taken.length, found["chosen"], found["rejected"])
    seen = losses.diverge(taken.policy, taken.reference, "forward_kl")
    by_hand = called(losses.dpo, found | {"policy_logp": seen, "weight": found["weight"] * own}).sum() / found["weight"].sum()
    assert taken.loss == pytest.approx(float(by_hand.detach()), rel=tolerances.STEP)


# -- losses over the whole step, by any cut -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_step_depends_on_its_cut(name: str) -> None:
    whole = Taken(name, judged(name))
    for budget in (1, 60):
        cut = Taken(name, judged(name), budget=budget)
        assert len(cut.step.cut) > 1
        assert cut.loss == pytest.approx(whole.loss, rel=tolerances.STEP)
        assert cut.line == pytest.approx(whole.line, abs=tolerances.FIGURE)
        same_gradient(cut.gradients, whole.gradients, tolerances.GRADIENT)


def test_coupled_losses_are_those_over_the_whole_step() -> None:
    assert {name for name in NAMES if not methods.make(name).separable} == losses.COUPLED
    assert not methods.make({"mix": {"dpo": 1.0, "aot": 0.5}}).separable


# -- kto ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, 1, 2])
@pytest.mark.parametrize("budget", [1, 60, ALL])
def test_ktos_step_depends_neither_on_cut_nor_on_order(budget: int, order: int | None) -> None:
    whole, taken = Taken("kto", ratings()), Taken("kto", ratings(), budget=budget, order=order)
    assert taken.line["baseline"] == pytest.approx(whole.line["baseline"], rel=tolerances.STEP) and whole.line["baseline"] > 0.1
    assert taken.loss == pytest.approx(whole.loss, rel=tolerances.STEP)
    same_gradient(taken.gradients, whole.gradients, tolerances.STEP)


def test_ktos_baseline_is_that_of_every_answer_under_another_prompt() -> None:
    taken = Taken("kto", ratings())
    sequences = taken.batch.sequences
    ratio = (taken.policy - taken.reference).detach()
    beside = [taken.batch.index(e.group, *e.beside) for e in taken.examples]
    assert taken.line["baseline"] == pytest.approx(max(0.0, float(ratio[beside].mean())), rel=tolerances.STEP)
    written = [taken.batch.index(g, r) for g, group in enumerate(taken.batch.groups) for r in range(len(group.responses))]
    answers = {(sequences[n].group, sequences[n].ids[sequences[n].start :]) for n in written}
    for example, row in zip(taken.examples, beside, strict=True):
        own, moved = sequences[taken.batch.index(example.group, *example.responses)], sequences[row]
        assert moved.ids[: moved.start] == own.ids[: own.start], "the prompt of the rated answer"
        assert any(ids == moved.ids[moved.start :] for group, ids in answers if group != own.group), "another prompt's answer"


def test_ktos_baseline_is_of_the_policy_without_dropout() -> None:
    model = add_adapter(tiny.model(), AdapterOptions(type="lora", r=3, dropout=0.5), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    taken = Taken("kto", ratings(), model=adapter_dropout_on(model))
    beside = [taken.batch.index(e.group, *e.beside) for e in taken.examples]
    expected = float((taken.policy - taken.reference)[beside].mean().detach())
    assert taken.line["baseline"] == pytest.approx(expected, rel=tolerances.STEP) and expected > 0.1
    logp = taken.line["logp/chosen"]
    assert logp != pytest.approx(Taken("kto", ratings(), model=model.eval()).line["logp/chosen"]), "it was on in the step"


def test_ktos_baseline_takes_one_forward_pass_of_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    plain = Scorer.forward

    def spy(self: Scorer, sequences: Any, want: Any = ()) -> Any:
        seen.append((torch.is_grad_enabled(), len(sequences)))
        return plain(self, sequences, want)

    before = Taken("kto", ratings())  # its reference and policy are scored, too
    monkeypatch.setattr(Scorer, "forward", spy)
    backward(Scorer(before.model), before.step)
    assert seen == [(False, len(before.examples)), (True, len({r for rows in before.step.needs for r in rows}))]


def test_who_stands_under_whose_prompt_follows_from_contents_alone() -> None:
    groups = ratings()

    def named(order: list[Group]) -> set[tuple[str, ...]]:
        return {
            (order[g].id, order[g].responses[r].id, order[h].id, order[h].responses[s].id)
            for (g, r), (h, s) in partners(order).items()
        }

    there = named(groups)
    assert len(there) == 12 and all(own != other for own, _, other, _ in there)
    assert named(groups[::-1]) == there
    one_sided = [Group(f"P{n}", tiny.answers("", "x", "y", "z")[: 3 if n == 0 else 1]) for n in range(2)]
    rated = [replace(g, marks=tuple(Rating(r, True) for r in range(len(g.responses)))) for g in one_sided]
    assert all(own[0] != other[0] for own, other in partners(rated).items()) and len(partners(rated)) == 4


def test_kto_with_one_prompt_has_a_baseline_of_zero_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    taken = Taken("kto", ratings()[:1])
    assert taken.line["baseline"] == 0 and "2 ratings of one prompt" in caplog.text


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("name", OF_RATINGS)
@pytest.mark.parametrize("kind", [True, False])
def test_ratings_of_one_kind_alone_train(name: str, kind: bool) -> None:
    run = fit(ratings(kinds=(kind, kind)), method=name, steps=2, batch_size=4)
    there, gone = ("chosen", "rejected") if kind else ("rejected", "chosen")
    for line in run.metrics:
        assert math.isfinite(line["loss"]) and f"logp/{there}" in line and f"logp/{gone}" not in line


def test_a_mismatched_answer_goes_no_further_than_the_data() -> None:
    from preftune.data.render import Rendered

    own = Rendered(0, 0, tuple(range(10)), 8, None, ((3, b"p"),))
    other = Rendered(1, 0, tuple(range(20, 32)), 2, (False, False, *[True] * 8), ((3, b"q"), (11, b"r")))
    moved = mismatched(own, other, 12)
    assert moved.ids == (*range(8), *range(22, 26)) and moved.start == 8
    assert moved.mask == (False, False, True, True) and moved.attachments == ((3, b"p"), (9, b"q"))
    assert mismatched(own, other, 10).mask is None, "nothing that it scores is left: the rest will do"


@pytest.mark.parametrize(
    ("yes", "no", "keys", "says"),
    [
        (4, 4, {}, "1 to 1, within"),
        (3, 2, {}, "1.5 to 1, within"),
        (1, 10, {}, "0.1 to 1, outside KTO's rule of 1 to 1.5; method.desirable_weight=10 makes them even"),
        (1, 10, {"desirable_weight": 13.33}, "1.33 to 1, within"),
        (10, 1, {}, "10 to 1, outside KTO's rule of 1 to 1.5; method.undesirable_weight=10 makes them even"),
        (3, 0, {}, "one kind alone counts"),
    ],
)
def test_the_balance_of_ratings_is_said(yes: int, no: int, keys: dict[str, float], says: str) -> None:
    marks = [Rating(0, n < yes) for n in range(yes + no)]
    groups = [Group(f"P{n}", tiny.answers("", "x"), (mark,)) for n, mark in enumerate(marks)]
    assert says in methods.balance(methods.options_of({"name": "kto", **keys}), groups)
    assert methods.balance(methods.options_of("dpo"), comparisons()) == ""


@pytest.mark.usefixtures("short_answers")
def test_the_balance_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "preftune"):
        fit(ratings(), method="kto", steps=2, batch_size=4, eval_groups=ratings(2))
    assert sum("KTO's rule" in message for message in caplog.messages) == 1


# -- rankings -----------------------------------------------------------------------------------------------------------------


def as_rankings(groups: Sequence[Group]) -> list[Group]:
    found: list[Group] = []
    for group in groups:
        pairs = [mark for mark in group.marks if isinstance(mark, Comparison)]
        marks = tuple(Ranking(((m.ordered[0],), (m.ordered[1],)), m.weight) for m in pairs)
        found.append(replace(group, marks=marks))
    return found


def test_plackett_luce_of_two_is_dpo() -> None:
    """Soft labels too; and the same figures are measured."""
    for groups, same in ((comparisons(), comparisons()), (comparisons(soft=False), as_rankings(comparisons(soft=False)))):
        dpo, listed = Taken("dpo", groups), Taken("plackett_luce", same)
        assert listed.loss == pytest.approx(dpo.loss, rel=tolerances.STEP)
        same_gradient(listed.gradients, dpo.gradients, tolerances.GRADIENT)
        assert listed.line == pytest.approx(dpo.line)


def test_a_ranking_with_ties_is_the_mean_over_the_orders_that_it_leaves_open() -> None:
    group = Group("R: ", tiny.answers("", "the one", "two", "three, four", "five"), (Ranking(((3,), (0, 2), (1,)), 2.0),))
    taken = Taken("plackett_luce", [group])
    orders = torch.tensor([[3, 0, 2, 1], [3, 2, 0, 1]])
    by_hand = losses.plackett_luce(taken.policy, taken.reference, orders, beta=BETA).mean()
    assert taken.loss == pytest.approx(float(by_hand.detach()), rel=tolerances.STEP)
    same_gradient(taken.gradients, taken.gradient_of(by_hand), tolerances.GRADIENT)
    ratio = (taken.policy - taken.reference).detach()
    assert taken.line["margin"] == pytest.approx(float(ratio[3] - ratio[1])), "of the first and the last"
    every = replace(group, marks=(Ranking(((0, 1, 2, 3),)),))
    tied = Taken("plackett_luce", [every])
    all_orders = torch.tensor(list(permutations(range(4))))
    mean = losses.plackett_luce(tied.policy, tied.reference, all_orders, beta=BETA).mean()
    assert tied.loss == pytest.approx(float(mean.detach()), rel=tolerances.STEP) and "accuracy" not in tied.line


def test_a_ranking_is_one_example_of_a_batch() -> None:
    method = methods.make("plackett_luce")
    assert len(method.examples(rankings())) == len(rankings())
    many = Group("R: ", tiny.answers("", *"abcdefg"), (Ranking((tuple(range(6)), (6,))),))
    with pytest.raises(Refusal, match="720 orders open; method=dpo takes its pairs"):
        method.examples([many])


@pytest.mark.parametrize(("which", "expected"), [("all", 3), ("best_vs_rest", 2)])
def test_methods_of_pairs_take_the_pairs_of_a_ranking(which: str, expected: int) -> None:
    """They share the weight of the ranking; ties are one half."""
    group = Group("R: ", tiny.answers("", "the one", "two", "three, four"), (Ranking(((2,), (0, 1)), weight=3.0),))
    found = methods.make({"name": "dpo", "pairs": which}).examples([group])
    assert len(found) == expected and sum(e.weight for e in found) == pytest.approx(3.0)
    assert {(e.responses, e.preference) for e in found} <= {((2, 0), 1.0), ((2, 1), 1.0), ((0, 1), 0.5)}


def test_sft_imitates_the_best_of_a_ranking() -> None:
    method = methods.make("sft")
    found = method.examples(rankings())
    best = [((0), (1,)), (1, (2,)), (2, (3,)), (3, (0,)), (3, (1,))]
    assert [(e.group, e.responses) for e in found] == best, "where all are tied there is no best"


# -- beta and hyperparameters ---------------------------------------------------------------------------------------------


def keys(**given: Any) -> TrainKeys:
    return build(TrainKeys, {"model": "m", "data": "d", **given})


@pytest.mark.parametrize(("name", "beta"), [("dpo", 0.1), ("simpo", 2.0), ("ln_dpo", 5.0), ("orpo", 0.1), ("sft", None)])
def test_beta_is_the_methods_own_unless_it_is_given(name: str, beta: float | None) -> None:
    assert methods.make(name).beta == beta == methods.NEEDS[name].beta
    asked = methods.options_of(name)
    assert methods.beta_of(asked) == beta and methods.beta_of(asked, 0.7) == (None if beta is None else 0.7)


def test_defaults_of_hyperparameters_are_those_of_the_losses() -> None:
    """The table says again what the pure functions say, so that no torch is needed to read it."""
    for name in NAMES:
        row, takes = methods.NEEDS[name], inspect.signature(getattr(losses, name)).parameters
        own = {key: p.default for key, p in takes.items() if isinstance(p.default, float)}
        assert own.pop("beta", None) == row.beta and own == row.reads, name
        assert ("reference_logp" in takes) == row.reference, name


@pytest.mark.parametrize("name", [name for name in NAMES if methods.NEEDS[name].reads])
def test_every_hyperparameter_reaches_the_loss(name: str) -> None:
    plain = Taken(name, judged(name)).loss
    for key, default in methods.NEEDS[name].reads.items():
        changed = Taken({"name": name, key: 0.5 * default + (0.02 if default < 0.5 else 0)}, judged(name)).loss
        assert abs(changed - plain) > 1e-6, key


def test_what_is_resolved_is_written_and_read_again() -> None:
    asked = methods.resolved(methods.options_of({"name": "simpo"}))
    assert asked.model_dump() == {"name": "simpo", "gamma": 1.0}
    mixed = methods.resolved(methods.options_of({"mix": {"rpo": 1.0, "r_dpo": 0.5, "exo": 1.0}}))
    assert mixed.model_dump() == {"name": None, "mix": {"rpo": 1.0, "r_dpo": 0.5, "exo": 1.0}, "epsilon": 1e-3}
    assert keys(method=mixed.model_dump()).method == mixed


# -- refusals, before anything is loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "key", "says"),
    [
        ({"method": "dpop_"}, "method", "Did you mean dpop?"),
        ({"method": "kto-pair"}, "method", "Here that is method=kto."),
        ({"method": {"mix": {"dpo": 0.5, "sftt": 0.5}}}, "method", "Did you mean sft?"),
        ({"method": {"name": "dpo", "gamma": 1.0}}, "method.gamma", "dpo does not read it; it reads method.divergence"),
        ({"method": {"name": "kto", "pairs": "all"}}, "method.pairs", "kto does not read it"),
        ({"method": {"name": "sft", "noise": 0.1}}, "method.noise", "none of these keys"),
        ({"method": {"name": "rpo", "divergence": "js"}}, "method.divergence", "rpo does not read it"),
        ({"method": {"name": "dpo", "divergence_alpha": 0.5}}, "method.divergence_alpha", "divergence=alpha alone"),
        ({"method": {"name": "dpo", "divergence": "kl"}}, "method.divergence", "'reverse_kl', 'forward_kl', 'js' or 'alpha'"),
        ({"method": {"name": "robust", "noise": 0.5}}, "method.noise", "less than 0.5"),
        ({"method": {"name": "cdpo", "noise": -0.1}}, "method.noise", "greater than or equal to 0"),
        ({"method": {"name": "ld_dpo", "alpha": 1.5}}, "method.alpha", "at most 1"),
        ({"method": {"mix": {"dpo": 1.0, "kto": 1.0}}}, "method.mix", "kto takes other examples"),
        ({"method": {"mix": {"dpo": 1.0, "plackett_luce": 1.0}}}, "method.mix", "plackett_luce takes other examples"),
        ({"method": {"mix": {"sft": 1.0}}}, "method.mix", "sft alone is method=sft"),
        ({"method": {"mix": {"dpo": -1.0}}}, "method.mix.dpo", "greater than 0"),
        ({"method": {"mix": {}}}, "method.mix", "at least one"),
        ({"method": {"name": "dpo", "mix": {"dpo": 1.0}}}, "method.name", "leave one of the two away"),
        ({"method": {"mix": {"dpo": 1.0, "simpo": 1.0}}}, "beta", "different defaults (0.1, 2): name one for all"),
        ({"method": {"mix": {"rpo": 1.0, "r_dpo": 1.0}, "alpha": 0.5}}, "method.alpha", "something else to rpo and to r_dpo"),
        ({"method": {"mix": {"dpo": 1.0, "rpo": 1.0}, "divergence": "js"}}, "method.divergence", "does not read it"),
        ({"method": "sft", "beta": 0.1}, "beta", "sft does not read it"),
        ({"method": "simpo", "reference": {"sync_steps": 5}}, "reference.sync_steps", "simpo has no reference"),
        ({"reference": {"sync_alpha": 0.5}}, "reference.sync_alpha", "sync_steps alone"),
        ({"reference": {"sync_steps": 5, "model": "r"}}, "reference.model", "starts as the policy"),
        ({"reference": {"sync_steps": 5, "store": "s"}}, "reference.store", "nothing of it is kept"),
        ({"reference": {"sync_steps": 0}}, "reference.sync_steps", "greater than or equal to 1"),
        ({"reference": {"sync_steps": 5, "sync_alpha": 1.5}}, "reference.sync_alpha", "less than or equal to 1"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(given: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(Refusal) as refused:
        keys(**given)
    assert says in str(refused.value) and refused.value.key == key
    if "method" in given and key.startswith("method"):  # in Python the same
        with pytest.raises(Refusal):
            methods.options_of(given["method"])


@pytest.mark.parametrize(("theirs", "ours"), ELSEWHERE.items())
def test_other_tools_names_are_answered(theirs: str, ours: str) -> None:
    with pytest.raises(Refusal, match=f"method={ours.split()[0]}"):
        methods.check_name(theirs)
    assert ours.split()[0] in NAMES


def test_names_may_have_hyphens_and_capitals() -> None:
    assert methods.check_name("APO-zero") == "apo_zero"
    assert methods.options_of({"mix": {"Apo-Zero": 1.0}}).mix == {"apo_zero": 1.0}


@pytest.mark.parametrize("asked", [{"name": "dpo", "nois": 0.1}, {"name": 5}, {"mix": "dpo"}, 5])
def test_options_in_python_are_refused_in_one_line(asked: Any) -> None:
    with pytest.raises(Refusal) as refused:
        methods.options_of(asked)
    assert "\n" not in str(refused.value) and (refused.value.key or "").startswith("method")


def test_the_method_is_chosen_by_the_marks() -> None:
    shown = [tiny.shown("Q: ", "yes")]
    for groups, name in ((comparisons(), "dpo"), (rankings(), "dpo"), (ratings(), "kto"), (shown, "sft")):
        assert methods.choose(None, groups).name == name
    assert methods.choose(None, [*rankings(), *comparisons()]).name == "dpo"
    with pytest.raises(Refusal) as refused:
        methods.choose(None, [*ratings(), *comparisons()])
    assert refused.value.code == "mixed_marks"
    with pytest.raises(Refusal, match=r"dpo does not read it") as refused:
        methods.choose({"gamma": 1.0}, comparisons())
    assert refused.value.key == "method.gamma"


@pytest.mark.parametrize(
    ("name", "groups", "says"),
    [
        ("dpo", ratings(), ["needs comparisons or rankings; the data holds ratings", "method=kto", "chosen and rejected"]),
        ("kto", comparisons(), ["needs ratings; the data holds comparisons", "method=dpo", "label true"]),
        ("kto", rankings(), ["the data holds rankings", "label true"]),
        ("simpo", [tiny.shown("Q: ", "yes")], ["demonstrations", "method=sft"]),
        ("sft", ratings(), ["ratings", "method=kto"]),
        ("mm_dpo", tiny.pairs(2), ["a column strength", "by.strength"]),
    ],
)
def test_a_method_without_its_marks_is_refused_and_says_what_to_do(name: str, groups: Any, says: list[str]) -> None:
    with pytest.raises(Refusal) as refused:
        methods.choose(name, groups)
    assert refused.value.code == "method_without_marks"
    for text in says:
        assert text in str(refused.value)


BAD: list[tuple[Mark, str]] = [
    (Comparison(0, 1, preference=1.2), "from 0 to 1, not 1.2"),
    (Comparison(0, 1, preference=-0.1), "from 0 to 1"),
    (Comparison(0, 1, preference=math.nan), "from 0 to 1, not nan"),
    (Comparison(0, 1, weight=-1.0), "0 or more, not -1"),
    (Comparison(0, 1, weight=math.inf), "finite"),
    (Comparison(0, 1, by=By(strength=math.nan)), "strength"),
    (Comparison(0, 2), "answers 0, 2 of a prompt that has 2"),
    (Comparison(-1, 0), "answers -1, 0"),
    (Comparison(0, 0), "with itself"),
    (Ranking(((0,), (0, 1))), "with itself"),
    (Ranking(((0,),)), "or with none"),
    (Ranking(()), "or with none"),
    (Rating(3, True), "answers 3 of"),
    (Demonstration(0, weight=-0.5), "0 or more"),
]


@pytest.mark.parametrize(("mark", "says"), BAD, ids=str)
def test_a_mark_that_says_nothing_is_refused_before_the_model_is_touched(mark: Mark, says: str) -> None:
    group = replace(tiny.pair("Q: ", "yes", "no", row=7), marks=(replace(mark, origin=tiny.Origin("mine.jsonl", 7, "x")),))
    model = tiny.model()
    before = tiny.state(model)
    for call in (preftune.fit, preftune.evaluate):
        with pytest.raises(Refusal, match=says) as refused:
            call(model, tiny.tokenizer(), [*tiny.pairs(2), group], method="dpo")
        assert (refused.value.file, refused.value.row, refused.value.code) == ("mine.jsonl", 7, "bad_mark")
    assert tiny.same(before, tiny.state(model))
    with pytest.raises(Refusal, match=r"group 2 \(from 0\): "):
        render([*tiny.pairs(2), replace(group, marks=(mark,))], tiny.tokenizer())


def test_marks_that_all_weigh_nothing_are_refused() -> None:
    for name in ("dpo", "plackett_luce", "kto", "sft"):
        weightless = [replace(g, marks=tuple(replace(m, weight=0.0) for m in g.marks)) for g in judged(name)]
        with pytest.raises(Refusal, match="weight 0") as refused:
            fit(weightless, method=name)
        assert refused.value.code == "nothing_kept"


def test_evaluate_refuses_a_beta_that_is_not_read(model: Any, tokenizer: Any) -> None:
    with pytest.raises(Refusal, match="sft does not read it"):
        preftune.evaluate(model, tokenizer, comparisons(), method="sft", beta=0.1)


@pytest.mark.usefixtures("short_answers")
def test_what_a_method_makes_no_example_of_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    groups = [*comparisons(), *ratings(2), *rankings(), tiny.shown("S: ", "yes"), tiny.pairs(9, weight=0.0)[-1]]
    fit(groups, method="dpo", steps=1)
    assert "dpo makes no example of 7 ratings, 1 demonstrations, 1 ties, weights of 0 or answers shown before" in caplog.text
