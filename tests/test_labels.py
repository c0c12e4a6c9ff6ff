"""Votes to labels: against counts by hand, published fits and annotators made up with known habits."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import tiny
import tolerances
import torch
from crowd import Crowd, table, vote

from preftune import losses
from preftune.errors import Refusal
from preftune.labels.bradley_terry import Prior, bradley_terry, davidson, objective
from preftune.labels.comparisons import METHODS, labelled, merged, votes_of
from preftune.labels.dawid_skene import dawid_skene, em
from preftune.labels.labels import majority
from preftune.labels.votes import Votes
from preftune.records import By, Comparison, Group, Origin, Rating, Vote

MODELS = ("dawid_skene", "bradley_terry")


# -- the table of votes -------------------------------------------------------------------------------------------------------


def test_votes_become_indices_in_order_of_first_appearance() -> None:
    records = [vote("x", "u", "a", side="a"), vote("y", "v", "tie", weight=2.0), vote("x", "v", "b", side="b")]
    votes = Votes.of(records, {"x": ("r1", "r2"), "y": ("r2", "r3")})
    assert (votes.items, votes.annotators) == (("x", "y"), ("u", "v"))
    assert votes.item.tolist() == [0, 1, 0]
    assert votes.annotator.tolist() == [0, 1, 1]
    assert votes.choice.tolist() == [0, 1, 2]
    assert votes.side.tolist() == [1, 0, -1]
    assert votes.answers.tolist() == [[0, 1], [1, 2]]
    assert votes.counts().tolist() == [[1, 0, 1], [0, 2, 0]]
    assert votes.numbers().tolist() == [[1, 0, 1], [0, 1, 0]]


def test_items_without_answers_have_two_of_their_own() -> None:
    votes = Votes.of(table({"x": "a", "y": "b"}), {"x": ("r", "s")})
    assert votes.answers.tolist() == [[0, 1], [2, 3]]


def test_votes_left_out_leave_the_indices_as_they_are() -> None:
    votes = Votes.of(table({"x": "a", "y": "ba"}))
    left = votes.where(votes.choice == 2)
    assert (left.items, left.annotators, left.item.tolist()) == (votes.items, votes.annotators, [1])
    assert left.records == (votes.records[1],)


def test_the_last_vote_of_an_annotator_on_an_item_is_kept_and_all_without_a_name() -> None:
    records = [vote("x", "u", "a"), vote("x", "", "a"), vote("y", "u", "a"), vote("x", "u", "b"), vote("x", "", "b")]
    assert Votes.of(records).latest().records == tuple(records[1:])


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (
            Vote("x", "A", By("u"), origin=Origin("v.csv", 3, "choice")),
            "v.csv, row 3, column choice: item 'x', annotator 'u': ",
        ),  # type: ignore[arg-type]
        (Vote("x", "left"), "item 'x': the choice is 'left': write a, b or tie"),  # type: ignore[arg-type]
        (Vote("x", "a", By(side="left")), "write a or b, or leave it out"),  # type: ignore[arg-type]
        (Vote("x", "a", weight=0.0), "the weight is 0.0: give a number greater than 0"),
        (Vote("x", "a", weight=float("nan")), "the weight is nan"),
        (Vote("x", "a", weight=float("inf")), "the weight is inf"),
    ],
)
def test_what_is_no_vote_is_refused(record: Vote, says: str) -> None:
    with pytest.raises(Refusal) as refused:
        Votes.of([record])
    assert says in str(refused.value)


def test_an_item_with_one_answer_twice_is_refused() -> None:
    with pytest.raises(Refusal, match="both its answers are 'r'"):
        Votes.of([vote("x", "u", "a")], {"x": ("r", "r")})


# -- majority -----------------------------------------------------------------------------------------------------------------


def test_majority_is_the_share_with_ties_one_half() -> None:
    rows = {"five": "aaaaa", "split": "aabb", "tied": "==", "most": "aab=", "b": "bbb"}
    labels = majority(Votes.of(table(rows)))
    assert labels.preference.tolist() == [1, 0.5, 0.5, 0.625, 0]
    assert labels.weight.tolist() == [5, 4, 2, 4, 3]
    # mass of Beta(1 + n_a, 1 + n_b) on its side of one half: 1 - 2^-6, 1/2, 1/2, ..., 1 - 2^-4
    assert labels.certainty[[0, 1, 2, 4]].tolist() == pytest.approx([63 / 64, 0.5, 0.5, 15 / 16], abs=tolerances.EXACT)
    assert 0.5 < labels.certainty[3] < 0.7


def test_weights_of_votes_count() -> None:
    labels = majority(Votes.of([vote("x", "u", "a", weight=3.0), vote("x", "v", "b"), vote("x", "w", "tie", weight=2.0)]))
    assert (labels.preference[0], labels.weight[0]) == (4 / 6, 6)


def test_a_majority_label_is_worth_its_votes_one_by_one() -> None:
    votes = Votes.of(table({"x": "aab="}))
    policy = torch.tensor([-3.0, -5.0], dtype=torch.float64)
    reference = torch.tensor([-4.0, -4.5], dtype=torch.float64)

    def loss(preference: float, weight: float) -> float:
        given = [torch.tensor([x], dtype=torch.float64) for x in (preference, weight)]
        a, b = torch.tensor([0]), torch.tensor([1])
        return losses.dpo(policy, reference, a, b, preference=given[0], weight=given[1]).item()

    (label,) = labelled(votes)
    assert loss(label.preference, label.weight) == pytest.approx(
        sum(loss(1 - c / 2, 1.0) for c in votes.choice.tolist()), abs=tolerances.EXACT
    )


# -- Dawid and Skene ----------------------------------------------------------------------------------------------------------

# Dawid and Skene 1979, table 1: 45 patients, fit for anaesthesia 1 to 4 as seen by observer 1 three times, then 2 to 5
ANAESTHESIA = """1111111 3334334 1122122 2223121 2223222 2223322 1222111 3333433 2222223 2322223 4444444 2223343 1111111 2223212
1211111 1112111 1111111 1111111 2222221 2221322 2222222 2222221 2223222 2212222 1111111 1111111 2322222 1111111 1111111 1121121
1111111 3333233 1111111 2222222 2223232 4334343 2212232 2323233 3333432 1111111 1111111 1212111 2322222 1211111 2222222"""


def test_the_published_example() -> None:
    """Their shares of the classes, .40 .42 .11 .07. Of class 4 are patients 2, 11 and 36, whom observer 1 gave 333 444 433."""
    said = np.array([[int(c) - 1 for c in patient] for patient in ANAESTHESIA.split()])
    item, place = np.divmod(np.arange(said.size), 7)
    observer = np.maximum(place - 2, 0)
    fit = em(item, observer, said.ravel(), np.ones(said.size), (45, 5, 4), tolerance=1e-8)
    assert fit.converged
    assert fit.classes.round(2).tolist() == [0.4, 0.42, 0.11, 0.07]
    assert np.flatnonzero(fit.posterior[:, 3] > 0.99).tolist() == [1, 10, 35]
    assert fit.confusion[0, 3].tolist() == pytest.approx([0, 0, 5 / 9, 4 / 9], abs=tolerances.FIT)
    assert fit.confusion[0, 0].round(2).tolist() == [0.89, 0.11, 0, 0]


def test_where_it_stands_still_both_steps_hold_vote_by_vote() -> None:
    """Equations 2.3 to 2.5, with the smoothing and the order of the answers, one vote after the other."""
    draw = np.random.default_rng(7)
    crowd = Crowd([0.9, 0.8, 0.7, 0.4], items=25, each=3, ties=0.3)
    sides = draw.choice(["a", "b", ""], len(crowd.votes)).tolist()
    votes = Votes.of(
        replace(v, by=replace(v.by, side=s), weight=w) for v, s, w in zip(crowd.votes, sides, cycle((1, 2)), strict=False)
    )
    fit = dawid_skene(votes, smoothing=3, tolerance=1e-12, max_rounds=10_000)
    assert fit.converged
    score = np.tile(np.log(fit.classes), (25, 1))
    expected = np.zeros((4, 3, 3))
    given = zip(votes.item, votes.annotator, votes.choice, votes.side, votes.weight, strict=True)
    for item, who, choice, side, weight in given:
        for turned, share in {1: [(False, 1.0)], -1: [(True, 1.0)], 0: [(False, 0.5), (True, 0.5)]}[int(side)]:
            for truth in range(3):
                row, column = (2 - truth, 2 - choice) if turned else (truth, choice)
                score[item, truth] += weight * share * np.log(fit.confusion[who, row, column])
                expected[who, row, column] += weight * share * fit.posterior[item, truth]
    posterior = np.exp(score) / np.exp(score).sum(1, keepdims=True)
    assert fit.posterior.ravel().tolist() == pytest.approx(posterior.ravel().tolist(), abs=tolerances.FIT)
    pooled = expected.sum(0) / expected.sum((0, 2))[:, None]
    smoothed = (expected + 3 * pooled) / (expected + 3 * pooled).sum(2, keepdims=True)
    assert fit.confusion.ravel().tolist() == pytest.approx(smoothed.ravel().tolist(), abs=tolerances.FIT)
    either = posterior.mean(0)
    assert fit.classes.tolist() == pytest.approx(((either + either[::-1]) / 2).tolist(), abs=tolerances.FIT)


def test_confusion_is_recovered_and_the_majority_beaten() -> None:
    right = [0.95, 0.9, 0.9, 0.55, 0.55, 0.5, 0.5]
    crowd = Crowd(right, items=1000)
    fit = dawid_skene(crowd.table)
    assert fit.converged
    names = [int(name[1:]) for name in crowd.table.annotators]
    found = fit.confusion[:, 0, 0] / (fit.confusion[:, 0, 0] + fit.confusion[:, 0, 2])
    assert found.tolist() == pytest.approx([right[n] for n in names], abs=0.06)
    plain, model = crowd.accuracy(majority(crowd.table).preference), crowd.accuracy(fit.labels.preference)
    assert model > plain + 0.04
    reliability = {n: r for n, r in zip(names, fit.labels.reliability.tolist(), strict=True)}
    assert reliability[0] > 1.5
    assert reliability[5] < 0.2


def test_smoothing_takes_annotators_of_few_votes_for_the_average() -> None:
    crowd = Crowd([0.9, 0.9, 0.9, 0.9, 0.9], items=200)
    once = Votes.of([*crowd.votes, vote("i0", "new", "a" if crowd.truth[0] == "b" else "b")])
    hard, soft = dawid_skene(once, smoothing=0), dawid_skene(once)
    new = once.annotators.index("new")
    assert hard.confusion[new, 0, 2] + hard.confusion[new, 2, 0] > 0.9  # one vote, and it is wrong
    assert soft.confusion[new].tolist() == pytest.approx(soft.confusion[:new].mean(0), abs=0.1)


def test_a_liking_for_the_first_place_is_found_where_the_places_are_known() -> None:
    draw = np.random.default_rng(1)
    sides = draw.choice(["a", "b"], 400)
    crowd = Crowd([0.9, 0.9, 0.9, 0.9], items=400, each=4)
    biased = [vote(f"i{n}", "first", side, side=side) for n, side in enumerate(sides)]
    votes = Votes.of([*crowd.votes, *biased])
    fit = dawid_skene(votes)
    (row,) = fit.confusion[[votes.annotators.index("first")]]
    assert min(row[0, 0], row[2, 0]) > 0.9
    assert fit.labels.reliability[-1] < 0.1
    told = replace(votes, side=-votes.side)
    assert fit.expected(votes)[-1].tolist() == pytest.approx(fit.expected(told)[-1, ::-1], abs=0.1)


# -- Bradley and Terry --------------------------------------------------------------------------------------------------------


def test_gradient_against_finite_differences() -> None:
    draw = np.random.default_rng(0)
    answers = {"i0": ("p", "q"), "i1": ("q", "r"), "i2": ("r", "p")}
    records = [
        vote(f"i{draw.integers(3)}", f"w{draw.integers(4)}", draw.choice(["a", "tie", "b"]), side=side, weight=1.0 + n % 3)
        for n, side in enumerate(draw.choice(["a", "b", ""], 30))
    ]
    votes = Votes.of(records, answers)
    at = draw.normal(size=votes.num_answers + 3 * len(votes.annotators) + 1)
    _, gradient = objective(at, votes, Prior())
    steps = 1e-5 * np.eye(len(at))
    differences = [(objective(at + s, votes, Prior())[0] - objective(at - s, votes, Prior())[0]) / 2e-5 for s in steps]
    assert gradient.tolist() == pytest.approx(differences, abs=tolerances.DIFFERENCES)


def test_davidson_by_hand() -> None:
    """Strengths 4 to 1 with nu = 1/2: 4, 1/2 * sqrt(4), 1 over their sum 6."""
    p = np.exp(davidson(np.array([np.log(4)]), np.array([np.log(0.5)])))
    assert p.ravel().tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6], abs=tolerances.EXACT)
    assert np.isfinite(davidson(np.array([5000.0, -5000.0]), np.array(0.0))).all()


ALIKE = Prior(strength=100, discrimination=1e-4, tie=1e-4, side=1e-4, common_tie=100)


def test_one_pair_and_equal_annotators_give_the_shares() -> None:
    votes = Votes.of(table({"x": "aaaaaa==bb"}))
    fit = bradley_terry(votes, prior=ALIKE)
    assert fit.converged
    assert fit.margin[0] == pytest.approx(np.log(3), abs=tolerances.FIT)  # six to two
    assert fit.tie[0] == pytest.approx(np.log(2 / np.sqrt(12)), abs=tolerances.FIT)
    # information of one vote: the variance of +1/2, 0, -1/2 with shares .6 .2 .2
    assert fit.deviation[0] ** -2 == pytest.approx(10 * (0.8 - 0.16) / 4, abs=1e-3)


def test_strengths_are_shared_over_the_pairs_of_an_answer() -> None:
    """Nobody compared p with r; 3 : 1 twice make 9 : 1. A chain's variances add up."""
    answers = {"pq": ("p", "q"), "rq": ("r", "q"), "pr": ("p", "r")}
    votes = Votes.of([*table({"pq": "aaab", "rq": "bbba"}), vote("pr", "k", "a")], answers)
    fit = bradley_terry(votes.where(votes.item < 2), prior=ALIKE)
    assert fit.margin.tolist() == pytest.approx(np.log([3, 1 / 3, 9]), abs=tolerances.FIT)
    assert fit.deviation[2] ** 2 == pytest.approx(fit.deviation[0] ** 2 + fit.deviation[1] ** 2, rel=1e-3)
    assert not fit.labels.alone[2]


def test_the_deviation_is_never_too_small_where_a_part_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"pq": ("p", "q"), "qr": ("q", "r"), "rp": ("r", "p"), "st": ("s", "t")}
    votes = Votes.of(table({"pq": "aaab", "qr": "abaa", "rp": "bbba", "st": "aabb"}), answers)
    exact = bradley_terry(votes).deviation
    monkeypatch.setitem(bradley_terry.__globals__, "LARGEST", 2)
    rough = bradley_terry(votes).deviation
    assert (rough[:3] > exact[:3] + 0.05).all()
    assert rough[3] == exact[3]


def test_probabilities_are_means_over_the_margin() -> None:
    """A pair with one vote is less sure than its strengths alone say, and a pair of equals stays at one half."""
    votes = Votes.of(table({"x": "a", "y": ".ab"}))
    fit = bradley_terry(votes)
    sure = np.exp(davidson(fit.margin, fit.tie.mean()))
    assert 0.5 < fit.labels.preference[0] < sure[0, 0] + sure[1, 0] / 2
    assert fit.labels.preference[1] == pytest.approx(0.5, abs=tolerances.FIT)
    assert fit.labels.certainty[0] > 0.7
    assert fit.average.sum(1).tolist() == pytest.approx([1, 1], abs=tolerances.EXACT)


def test_those_who_guess_and_those_who_turn_it_round_are_found() -> None:
    crowd = Crowd([0.95, 0.9, 0.9, 0.9, 0.5, 0.5, 0.1], items=600)
    fit = bradley_terry(crowd.table)
    slope = {name: x for name, x in zip(crowd.table.annotators, fit.discrimination.tolist(), strict=True)}
    assert min(slope[f"w{n}"] for n in range(4)) > 0.7
    assert max(abs(slope["w4"]), abs(slope["w5"])) < 0.3
    assert slope["w6"] < -0.5
    assert crowd.accuracy(fit.labels.preference) > crowd.accuracy(majority(crowd.table).preference) + 0.04


def test_side_and_ties_are_habits_of_their_own() -> None:
    draw = np.random.default_rng(2)
    crowd = Crowd([0.9, 0.9, 0.9, 0.9], items=300, each=4)
    sides = draw.choice(["a", "b"], 300)
    habits = [vote(f"i{n}", "first", side, side=side) for n, side in enumerate(sides)]
    habits += [vote(f"i{n}", "both", "tie") for n in range(300)]
    votes = Votes.of([*crowd.votes, *habits])
    fit = bradley_terry(votes)
    first, both = votes.annotators.index("first"), votes.annotators.index("both")
    assert fit.side[first] > 1
    assert np.abs(np.delete(fit.side, first)).max() < 0.3
    assert fit.tie[both] > np.delete(fit.tie, both).max() + 1
    guess = fit.expected(votes)
    assert guess[votes.annotator == both][:, 1].min() > 0.5
    stood = np.where(votes.side > 0, 0, 2)[votes.annotator == first]
    assert (guess[votes.annotator == first].argmax(1) == stood).mean() > 0.9


# -- what every method holds --------------------------------------------------------------------------------------------------


def mirrored(record: Vote, turn: set[str]) -> Vote:
    """The same vote where a and b are exchanged."""
    other: dict[str, Any] = {"a": "b", "b": "a", "tie": "tie", "": ""}
    if record.item not in turn:
        return record
    return replace(record, choice=other[record.choice], by=replace(record.by, side=other[record.by.side]))


@pytest.mark.parametrize("method", METHODS)
def test_names_and_order_mean_nothing_and_sides_turn_the_label(method: str) -> None:
    draw = np.random.default_rng(3)
    crowd = Crowd([0.95, 0.8, 0.7, 0.6, 0.5], items=60, each=3)
    sides = draw.choice(["a", "b", ""], len(crowd.votes))
    records = [replace(v, by=replace(v.by, side=s)) for v, s in zip(crowd.votes, sides.tolist(), strict=True)]
    answers = {f"i{n}": (f"r{n}", f"r{(n + 7) % 60}") for n in range(60)}
    turn = {f"i{n}" for n in np.flatnonzero(draw.random(60) < 0.5)}
    other = [mirrored(replace(v, by=replace(v.by, who="x" + v.by.who[::-1])), turn) for v in records]
    turned = {item: pair[::-1] if item in turn else pair for item, pair in answers.items()}
    here = {x.item: x for x in labelled(Votes.of(records, answers), method)}
    shuffled = [other[n] for n in draw.permutation(len(other))]
    there = {x.item: x for x in labelled(Votes.of(shuffled, turned), method)}
    assert here.keys() == there.keys()
    for item, label in here.items():
        preference = 1 - there[item].preference if item in turn else there[item].preference
        assert preference == pytest.approx(label.preference, abs=tolerances.FIT)
        assert there[item].weight == pytest.approx(label.weight, abs=tolerances.FIT)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_votes_give_the_same_labels(method: str) -> None:
    crowd = Crowd([0.95, 0.8, 0.7, 0.6, 0.5], items=40, each=3)
    assert labelled(crowd.table, method) == labelled(Votes.of(crowd.votes), method)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_votes_given_as_often(method: str) -> None:
    crowd = Crowd([0.9, 0.8, 0.6, 0.6], items=40, each=3)
    heavy = [replace(v, weight=2.0) for v in crowd.votes]
    twice = METHODS[method](Votes.of([v for v in crowd.votes for _ in range(2)]))
    once = METHODS[method](Votes.of(heavy))
    for name in ("preference", "certainty", "weight", "reliability"):
        assert getattr(once, name).tolist() == pytest.approx(getattr(twice, name), abs=tolerances.FIT)


@pytest.mark.parametrize("method", METHODS)
def test_no_votes_no_labels(method: str) -> None:
    assert labelled(Votes.of([]), method) == []
    assert METHODS[method](Votes.of([])).preference.shape == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_all_ties_are_one_half(method: str) -> None:
    labels = labelled(Votes.of(table({"x": "===", "y": "==="})), method)
    assert [label.preference for label in labels] == pytest.approx([0.5, 0.5], abs=tolerances.FIT)
    assert [label.weight for label in labels] == pytest.approx([3, 3], abs=tolerances.FIT)


@pytest.mark.parametrize("method", METHODS)
def test_an_item_whose_votes_were_left_out_is_one_half_and_has_no_label(method: str) -> None:
    votes = Votes.of(table({"x": "aab", "y": "bb."}))
    left = votes.where(votes.item == 1)
    assert METHODS[method](left).preference[0] == pytest.approx(0.5, abs=tolerances.EXACT)
    assert [label.item for label in labelled(left, method)] == ["y"]


@pytest.mark.parametrize("method", METHODS)
def test_those_who_guess_do_not_decide(method: str) -> None:
    """Two who are right against three who guess: under the models the label is with the two."""
    crowd = Crowd([0.97, 0.97, 0.5, 0.5, 0.5], items=400, each=5, ties=0)
    accuracy = crowd.accuracy([label.preference for label in labelled(crowd.table, method)])
    assert accuracy > 0.94 if method in MODELS else accuracy < 0.9


# -- Comparisons --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_annotators_votes_pass_unchanged(method: str) -> None:
    records = [vote("x", "u", "a", side="b", weight=2.0), vote("y", "u", "tie"), vote("z", "u", "b")]
    labels = labelled(Votes.of(records, {"x": ("r", "s"), "y": ("s", "t")}), method)
    assert [(x.preference, x.weight) for x in labels] == [(1, 2), (0.5, 1), (0, 1)]
    assert [x.by for x in labels] == [record.by for record in records]


@pytest.mark.parametrize("method", METHODS)
def test_each_by_an_annotator_of_its_own_passes_unchanged(method: str) -> None:
    records = [vote(f"i{n}", f"w{n}", "ab"[n % 2]) for n in range(6)]
    labels = labelled(Votes.of(records), method)
    assert [(x.preference, x.weight, x.by) for x in labels] == [(1 - n % 2, 1, records[n].by) for n in range(6)]


def test_a_single_vote_is_weighed_where_others_judged_its_answers() -> None:
    """Under Bradley-Terry a chain of pairs, each judged by someone else, tells about its members."""
    answers = {"pq": ("p", "q"), "qr": ("q", "r")}
    votes = Votes.of([vote("pq", "u", "a"), vote("qr", "v", "a")], answers)
    assert [label.by.votes for label in labelled(votes, "bradley_terry")] == [(votes.records[0],), (votes.records[1],)]
    assert [label.by.votes for label in labelled(votes, "dawid_skene")] == [(), ()]


def test_a_label_holds_the_votes_it_was_made_of() -> None:
    records = table({"x": "aab", "y": ".b"})
    x, y = labelled(Votes.of(records), "dawid-skene")
    assert (x.by.who, x.by.kind, x.by.votes) == ("dawid_skene", "rule", tuple(records[:3]))
    assert y.by == records[3].by
    again = labelled(Votes.of([vote("x", "u", "a"), vote("x", "u", "b")]), "dawid_skene")
    assert (again[0].by.who, again[0].preference) == ("majority", 0.5)  # nobody else: no telling how good u is


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(Refusal, match=r"known: majority, dawid_skene, bradley_terry\. Did you mean majority"):
        labelled(Votes.of([]), "majorty")


def group(*marks: Any) -> Group:
    return Group("why?", tiny.answers("why?", "one", "two", "three"), marks)


def test_comparisons_of_several_annotators_become_one() -> None:
    soft = Comparison(1, 2, 0.8, by=By("u"))
    given = group(
        Comparison(1, 0, by=By("u", side="a", reason="longer"), origin=Origin("f", 1, "chosen")),
        Rating(2, True),
        Comparison(0, 1, by=By("v", side="a"), origin=Origin("f", 2, "chosen")),
        soft,
        Comparison(1, 0, 0.5, by=By("w"), origin=Origin("f", 3, "chosen")),
        Comparison(2, 0, by=By("v")),
        Comparison(1, 0, by=By("x"), origin=Origin("f", 4, "chosen")),
    )
    (found,) = merged([given])
    joined, *rest = found.marks
    assert rest == [given.marks[1], soft, given.marks[5]]
    assert isinstance(joined, Comparison)
    assert (joined.a, joined.b, joined.preference, joined.weight, joined.origin) == (1, 0, 2.5 / 4, 4, Origin("f", 1, "chosen"))
    assert joined.by is not None
    assert [(v.choice, v.by.who, v.by.side, v.by.reason) for v in joined.by.votes] == [
        ("b", "u", "b", "longer"),
        ("a", "v", "a", ""),
        ("tie", "w", "", ""),
        ("b", "x", "", ""),
    ]
    assert [v.origin.row for v in joined.by.votes if v.origin] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_groups_with_one_vote_each_stay_as_they_are(method: str) -> None:
    groups = [group(Comparison(0, 1, by=By("u"))), Group("when?", tiny.answers("when?", "now", "then"), (Comparison(1, 0),))]
    assert merged(groups, method) == groups


def test_answers_of_a_group_are_shared_by_its_pairs() -> None:
    votes = votes_of([group(Comparison(0, 1), Comparison(2, 1)), Group("x", tiny.answers("x", "y", "z"), (Comparison(0, 1),))])
    assert votes.answers.tolist() == [[0, 1], [1, 2], [3, 4]]
    assert votes.choice.tolist() == [0, 2, 0]
