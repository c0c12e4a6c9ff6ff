"""Agreement and annotators to look at: published examples, counts by hand, and crowds with planted habits."""

from __future__ import annotations

import json
import math
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import tolerances
from crowd import Crowd, table, vote
from scipy.stats import binom

from preftune.labels.agreement import (
    agreement,
    bootstrap,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    pair_tables,
    raw_agreement,
    wilson,
)
from preftune.labels.annotators import BREAK, _benjamini_hochberg, _tails, contested, seconds, to_look_at
from preftune.labels.votes import Votes

# -- published examples -------------------------------------------------------------------------------------------------------

# Krippendorff 2011, section C: four observers, twelve units, five values, seven values missing
OBSERVERS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
# ten subjects, fourteen raters, five categories: the worked example of the encyclopedias
FLEISS = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1  7 7 0 0 0  3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""


def counted(observers: tuple[str, ...], kinds: int) -> np.ndarray[Any, Any]:
    found = np.zeros((len(observers[0]), kinds), dtype=int)
    for row in observers:
        for unit, value in enumerate(row):
            if value != ".":
                found[unit, int(value) - 1] += 1
    return found


def test_krippendorffs_own_example_with_missing_values() -> None:
    counts = counted(OBSERVERS, 5)
    assert krippendorff_alpha(counts).round(3) == 0.743
    assert krippendorff_alpha(counts, "ordinal").round(3) == 0.815


def test_krippendorff_of_two_observers_without_missing_values() -> None:
    """Krippendorff 2011, section A: ten units, two values."""
    assert krippendorff_alpha(counted(("1211111121", "2221121111"), 2)).round(3) == 0.095


def test_fleiss_worked_example() -> None:
    counts = np.array(FLEISS.split(), dtype=int).reshape(10, 5)
    assert raw_agreement(counts).round(3) == 0.378
    assert fleiss_kappa(counts).round(3) == 0.210


@pytest.mark.parametrize(
    ("rows", "kappa"), [([[20, 5], [10, 15]], 0.4), ([[45, 15], [25, 15]], 0.1304), ([[25, 35], [5, 35]], 0.2593)]
)
def test_cohens_kappa(rows: list[list[int]], kappa: float) -> None:
    assert cohen_kappa(rows).round(4) == kappa


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_in_newcombe_1998(hits: int, n: int, low: float, high: float) -> None:
    """Statistics in Medicine 17, table I, method 3."""
    assert [x.round(4) for x in wilson(hits, n)] == [low, high]


def test_wilson_of_nothing_is_everything() -> None:
    assert [float(x) for x in wilson(0, 0)] == [0, 1]


# -- agreement of votes -------------------------------------------------------------------------------------------------------


def test_alpha_by_hand() -> None:
    """x: a a tie, y: a b; the lone vote of z does not count. Coincidences: aa 1, a-tie 1 + 1, a-b 1 + 1: n = 5, n_a = 3."""
    counts = Votes.of(table({"x": "aa=", "y": "ab", "z": "b"})).numbers()
    nominal = 1 - 4 * 4 / (2 * (3 * 1 + 3 * 1 + 1 * 1))
    assert krippendorff_alpha(counts) == pytest.approx(nominal, abs=tolerances.EXACT)
    # from a to tie: 3 + 1 less 2; tie to b: 1 + 1 less 1; a to b: 3 + 1 + 1 less 2
    apart = {"a=": 4.0, "=b": 1.0, "ab": 9.0}
    ordinal = 1 - 4 * (2 * apart["a="] + 2 * apart["ab"]) / (2 * (3 * apart["a="] + 3 * apart["ab"] + apart["=b"]))
    assert krippendorff_alpha(counts, "ordinal") == pytest.approx(ordinal, abs=tolerances.EXACT)


def test_agreement_of_all_and_of_none() -> None:
    same = agreement(Votes.of(table({"x": "aaa", "y": "bbb", "z": "=="})))
    assert (same.items, same.votes) == (3, 8)
    assert {same.raw.value, same.alpha_nominal.value, same.alpha_ordinal.value, same.fleiss.value} == {1.0}
    opposed = agreement(Votes.of(table({"x": "ab", "y": "ba", "z": "ab"})))
    assert (opposed.raw.value, opposed.fleiss.value) == (0, -1)


@pytest.mark.parametrize("rows", [{}, {"x": "a", "y": "b"}, {"x": "aa", "y": "aaa"}])
def test_where_nothing_can_disagree_the_figures_are_not_defined(rows: dict[str, str]) -> None:
    found = agreement(Votes.of(table(rows)))
    for estimate in (found.alpha_nominal, found.alpha_ordinal, found.fleiss):
        assert all(math.isnan(x) for x in estimate)
    assert found.strength is None


def test_a_changed_mind_counts_once() -> None:
    votes = Votes.of([vote("x", "u", "b"), vote("x", "v", "a"), vote("x", "u", "a"), vote("y", "u", "b"), vote("y", "v", "b")])
    found = agreement(votes)
    assert (found.votes, found.repeated, found.raw.value) == (4, 1, 1.0)


def test_strengths_have_an_alpha_of_their_own() -> None:
    """Both say a throughout, the one strongly where the other hardly does: the sides agree, the strengths do not."""
    said = [("u", "a", 3.0), ("v", "a", 1.0)]
    records = [vote(f"i{n}", w, c, strength=s if n % 2 else 4 - s) for n in range(8) for w, c, s in said]
    found = agreement(Votes.of(records))
    assert found.strength is not None
    assert found.strength.value < 0
    assert found.raw.value == 1
    signed = [vote("x", "u", "a", strength=2.0), vote("x", "v", "b", strength=2.0)]
    signed += [vote("y", "u", "b", strength=1.0), vote("y", "v", "b", strength=1.0)]
    both = agreement(Votes.of(signed)).strength
    assert both is not None
    # coincidences of -2, -1, 2: one pair apart, one equal
    assert both.value == pytest.approx(float(krippendorff_alpha([[1, 0, 1], [0, 2, 0]], "ordinal")), abs=tolerances.EXACT)


def test_intervals_hold_the_figure_and_narrow_with_the_items() -> None:
    few, many = (agreement(Crowd([0.8] * 6, items=n, each=3).table) for n in (50, 800))
    for name in ("raw", "alpha_nominal", "alpha_ordinal", "fleiss"):
        a, b = getattr(few, name), getattr(many, name)
        assert a.low < a.value < a.high
        assert b.low < b.value < b.high
        assert b.high - b.low < 0.5 * (a.high - a.low)
    # the spread of a mean of many independent items: 1.96 standard errors each way
    counts = Crowd([0.8] * 6, items=800, each=3).table.numbers()
    each = (counts * (counts - 1)).sum(1) / 6
    assert many.raw.high - many.raw.low == pytest.approx(2 * 1.96 * each.std() / 800**0.5, rel=0.1)


def test_the_bootstrap_draws_units_not_patterns() -> None:
    counts = np.array([[2, 0, 0]] * 90 + [[1, 0, 1]] * 10)
    found = bootstrap(raw_agreement, counts)
    assert found.value == 0.9
    assert (found.low, found.high) == pytest.approx((0.84, 0.95), abs=0.011)
    assert bootstrap(raw_agreement, counts[::-1]) == found


def test_pairs_of_annotators_against_counting() -> None:
    crowd = Crowd([0.9, 0.8, 0.7, 0.6, 0.5], items=40, each=3, ties=0.3)
    votes = Votes.of([*crowd.votes, vote("i0", "", "a"), vote("i0", "", "b")])
    pairs, tables = pair_tables(votes)
    said = {(v.item, v.by.who): ("a", "tie", "b").index(v.choice) for v in crowd.votes}
    expected: dict[tuple[int, int], Any] = {}
    for (i, u), (w, v) in combinations(enumerate(crowd.table.annotators), 2):
        cells = np.zeros((3, 3), dtype=int)
        for item in crowd.table.items:
            if (item, u) in said and (item, v) in said:
                cells[said[item, u], said[item, v]] += 1
        expected[i, w] = cells.tolist()
    assert {(int(i), int(j)): t.tolist() for (i, j), t in zip(pairs, tables, strict=True)} == expected


def test_pandalm_as_published(shared: Any) -> None:
    rows = json.loads(shared("data/pandalm/testset-v1.json").read_text())
    choices = {0: "tie", 1: "a", 2: "b"}
    names = ("annotator1", "annotator2", "annotator3")
    votes = Votes.of([vote(str(row["idx"]), name, choices[row[name]]) for row in rows for name in names])
    pairs, tables = pair_tables(votes)
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert cohen_kappa(tables).round(3).tolist() == [0.852, 0.879, 0.862]
    most = votes.numbers().argmax(1)
    assert np.bincount(most).tolist() == [422, 105, 472]
    assert votes.numbers().max(1).min() == 2


# -- annotators to look at ----------------------------------------------------------------------------------------------------


def named(votes: Votes) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for suspect in to_look_at(votes):
        found.setdefault(suspect.reason, set()).add(suspect.annotator)
    return found


def test_the_distribution_of_a_sum_of_unequal_chances() -> None:
    likely = np.array([0.1, 0.5, 0.7, 0.2, 0.9])
    mass = np.zeros(6)
    for hits in product((0, 1), repeat=5):
        mass[sum(hits)] += np.prod(np.where(hits, likely, 1 - likely))
    for k in range(6):
        assert _tails(k, likely) == pytest.approx((mass[: k + 1].sum(), mass[k:].sum()), abs=tolerances.EXACT)
    assert _tails(70, np.full(100, 0.5)) == pytest.approx(
        (binom.cdf(70, 100, 0.5), binom.sf(69, 100, 0.5)), abs=tolerances.EXACT
    )


def test_the_sum_of_many_is_as_good_as_normal() -> None:
    exact = binom.cdf(1730, 6000, 0.3), binom.sf(1729, 6000, 0.3)
    assert 0.01 < exact[0] < 0.05
    assert _tails(1730, np.full(6000, 0.3)) == pytest.approx(exact, abs=1e-3)


def test_votes_without_a_name_are_nobodys_habit() -> None:
    records = [vote(f"i{n}", "", "a") for n in range(60)] + [vote(f"j{n}", "u", "ab"[n % 2]) for n in range(60)]
    assert named(Votes.of(records)) == {"first_side": {"u"}}, "60 of 60 without a name, 30 of 60 with one: both are off"


def test_benjamini_and_hochberg() -> None:
    """Their procedure at .05: of four, .01 and .02 are named, since .02 <= .05 * 2 / 4 and .04 > .05 * 3 / 4."""
    p = np.array([0.04, 0.01, 0.9, 0.02])
    assert _benjamini_hochberg(p).tolist() == pytest.approx([0.16 / 3, 0.04, 0.9, 0.04], abs=tolerances.EXACT)


def test_nobody_is_named_in_a_crowd_of_equals() -> None:
    records = Crowd([0.8] * 30, items=400, each=5, ties=0.2).votes
    assert named(Votes.of(records)) == {}


def test_habits_are_found_and_named() -> None:
    crowd = Crowd([0.9] * 8, items=300, each=5, ties=0.2)
    draw = np.random.default_rng(4)
    sides = draw.choice(["a", "b"], 300)
    records = [vote(v.item, v.by.who, v.choice, side=sides[int(v.item[1:])]) for v in crowd.votes]
    records += [vote(f"i{n}", "first", sides[n], side=sides[n]) for n in range(100)]
    records += [vote(f"i{n}", "never", "b" if sides[n] == "a" else "a", side=sides[n]) for n in range(100, 200)]
    records += [vote(f"i{n}", "wrong", "b" if crowd.truth[n] == "a" else "a", side=sides[n]) for n in range(200, 300)]
    records += [vote(f"i{n}", "both", "tie", side=sides[n]) for n in range(60)]
    found = named(Votes.of(records))
    assert found["first_side"] == {"first", "never"}
    assert {"wrong"} <= found["disagrees"] <= {"wrong", "first", "never", "both"}
    assert "both" in found["ties"]


def test_few_votes_are_never_conspicuous() -> None:
    crowd = Crowd([0.95] * 8, items=100, each=5, ties=0)
    wrong = {n: "b" if crowd.truth[n] == "a" else "a" for n in range(60)}
    odd = [vote(f"i{n}", f"odd {count}", wrong[n]) for count in (3, 40) for n in range(count)]
    assert named(Votes.of([*crowd.votes, *odd])) == {"disagrees": {"odd 40"}}


def test_two_who_differ_are_judged_by_how_often_people_do() -> None:
    """With two votes an item never says who is off; the one who differs from everybody is found all the same."""
    records = [vote(f"i{n}", f"w{n % 7}", "a") for n in range(140)]
    records += [vote(f"i{n}", f"w{(n + 1 + n // 20) % 7}" if n >= 20 else "odd", "a" if n >= 20 else "b") for n in range(140)]
    records = [r for n, r in enumerate(records) if r.by.who not in {x.by.who for x in records[:n] if x.item == r.item}]
    assert "odd" in named(Votes.of(records))["disagrees"]


def test_one_annotator_who_always_takes_the_first_is_named_beside_others() -> None:
    """Every item has one vote: the chance is everybody's share."""
    draw = np.random.default_rng(5)
    records = [vote(f"i{n}", f"w{n % 10}", str(draw.choice(["a", "b"])), side="a") for n in range(400)]
    records += [vote(f"j{n}", "first", "a", side="a") for n in range(40)]
    assert named(Votes.of(records)) == {"first_side": {"first"}}


def test_the_quick_are_found() -> None:
    crowd = Crowd([0.9] * 6, items=200, each=3)
    clock: dict[str, float] = {}
    draw = np.random.default_rng(6)
    records = []
    for v in crowd.votes:
        took = 5.0 if v.by.who == "w2" else float(draw.uniform(20, 60))
        clock[v.by.who] = clock.get(v.by.who, 0.0) + took
        records.append(vote(v.item, v.by.who, v.choice, time=str(clock[v.by.who])))
    suspects = [s for s in to_look_at(Votes.of(records)) if s.reason == "quick"]
    assert [s.annotator for s in suspects] == ["w2"]
    assert suspects[0].observed == suspects[0].votes
    assert str(suspects[0]).startswith(f"w2: {suspects[0].votes} of {suspects[0].votes} votes took less than a third")


def test_seconds_of_votes() -> None:
    """A page of two votes shares its time; first votes, breaks and what cannot be read have none."""
    stamps = {
        "u": ["2016-01-31 16:59:00.0 UTC", "2016-01-31T17:00:00+00:00", "2016-01-31T18:00:00+01:00", "2016-01-31T17:00:30Z"],
        "v": ["100", "soon", f"{100 + BREAK + 1}", "2016-01-31", ""],
    }
    records = [vote(f"i{n}", w, "a", time=t) for w, times in stamps.items() for n, t in enumerate(times)]
    found = [None if math.isnan(x) else x for x in seconds(Votes.of(records)).tolist()]
    assert found == [None, 30, 30, 30, None, None, None, None, None]
    assert seconds(Votes.of([])).shape == (0,)


def test_items_on_which_people_disagree_come_by_the_votes_that_show_it() -> None:
    rows = {"one": "a", "split": "ab", "many": "aaaabbbb", "same": "aaaa", "most": "aaaaaaab", "three": "aabb=="}
    found = contested(Votes.of(table(rows)))
    assert [c.item for c in found] == ["three", "many", "split", "most"]
    assert (found[0].a, found[0].tie, found[0].b) == (2, 2, 2)
    assert found[2].against == pytest.approx(float(wilson(1, 2)[0]), abs=tolerances.EXACT)
    assert [c.item for c in contested(Votes.of(table(rows)), at_most=2)] == ["three", "many"]


def test_no_votes_nobody_to_look_at() -> None:
    empty = Votes.of([])
    assert to_look_at(empty) == []
    assert contested(empty) == []
    pairs, tables = pair_tables(empty)
    assert (pairs.shape, tables.shape) == ((0, 2), (0, 3, 3))
