"""Rankings from rows to a batch: what their places mean, what falls away of them, and which side of the split they stand on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny

import preftune
from preftune.data.options import ScoredOptions
from preftune.data.read import by_row, load
from preftune.data.render import render
from preftune.data.split import split
from preftune.records import By, Comparison, Group, Message, Ranking
from preftune.runs.prepare import from_groups, render_data


def row(*ranks: Any, prompt: Any = "Q: ", responses: Any = ("one", "two", "three"), **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "responses": list(responses), "ranks": list(ranks), **more}


# -- reading ------------------------------------------------------------------------------------------------------------------


def test_places_are_tiers_the_best_first_and_equal_places_tie() -> None:
    (group,) = preftune.read([row(2, 1, 2, weight=2.0, annotator="ann")])
    assert [r.content for r in group.responses] == ["one", "two", "three"]
    (mark,) = group.marks
    assert isinstance(mark, Ranking)
    assert (mark.tiers, mark.weight, mark.by) == (((1,), (0, 2)), 2.0, By(who="ann"))
    assert mark.origin is not None and mark.origin.row == 1
    assert [o.column for r in group.responses for o in r.origins] == ["responses 1", "responses 2", "responses 3"]
    (other,) = preftune.read([row(1.5, 3, 1.5, id=7)])
    assert other.marks[0].tiers == ((0, 2), (1,)) and other.user_id == "7"  # type: ignore[union-attr]


def test_rankings_and_pairs_of_one_prompt_are_one_group() -> None:
    """Whichever comes first: the ranking's places move with the answers."""
    pair = {"prompt": "Q: ", "chosen": "three", "rejected": "four"}
    (group,) = preftune.read([*preftune.read([pair]), row(3, 1, 2)])
    assert [r.content for r in group.responses] == ["three", "four", "one", "two"]
    first, second = group.marks
    assert isinstance(first, Comparison) and first.responses == (0, 1)
    assert isinstance(second, Ranking) and second.tiers == ((3,), (0,), (2,))
    again = preftune.read([group, row(1, 2, responses=("two", "five"))])
    assert [m.responses for m in again[0].marks] == [(0, 1), (3, 0, 2), (3, 4)]


def test_conversations_are_ranked_too() -> None:
    user = {"role": "user", "content": "hi"}
    said = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    for prompt, responses in (([user], said), ("hi", said), ([user], ["a", "b"]), ([user], [[user, *s] for s in said])):
        (group,) = preftune.read([row(2, 1, prompt=prompt, responses=responses)])
        assert group.prompt == (Message("user", "hi"),)
        assert [r.content for r in group.responses] == [(Message("assistant", "a"),), (Message("assistant", "b"),)]


@pytest.mark.parametrize(
    ("faulty", "code", "says"),
    [
        (row(1, 2), "wrong_type", "each of the 3 answers"),
        (row(1, responses=["one"]), "no_judgement", "two different answers"),
        (row(1, 2, True), "wrong_type", "true"),
        (row(1, 2, "x"), "wrong_type", "x"),
        (row(1, 2, 3, weight=-1), "bad_value", "0 or more"),
        (row(1, 2, responses=["one", "one"]), "identical_answers", "two different answers"),
        (row(1, 2, responses=["one", " "]), "empty_answer", "two different answers"),
        (row(1, 2, responses=["one", 5]), "wrong_type", "text or messages"),
        ({**row(1), "ranks": 1}, "wrong_type", "a list"),
        ({**row(1, 2, 3), "prompt": None}, "missing_value", "prompt"),
        ({**row(1, 2, 3), "image": "x.png"}, "unsupported_content", "images"),
    ],
)
def test_a_faulty_row_is_dropped_counted_and_named(faulty: dict[str, Any], code: str, says: str) -> None:
    reading = load([row(1, 2, 3), faulty, row(3, 2, 1, prompt="R: ")])
    assert (reading.rows, reading.kept, dict(reading.dropped)) == (3, 2, {code: 1})
    (finding,) = reading.findings
    assert finding.row == 2 and says in str(finding)


# -- rendering ----------------------------------------------------------------------------------------------------------------

LONG = "x" * 60


def test_a_ranking_goes_on_without_a_faulty_answer(caplog: pytest.LogCaptureFixture) -> None:
    groups = preftune.read([row(2, 1, 2, 3, responses=("one", LONG, "three", "four")), row(1, 2, prompt="R: ", responses="ab")])
    batch = render(groups, tiny.tokenizer(), max_length=40)
    assert [r.content for r in batch.groups[0].responses] == ["one", "three", "four"]
    assert batch.groups[0].marks[0].tiers == ((0, 1), (2,)), "the tier of the best is gone, the others move"  # type: ignore[union-attr]
    (finding,) = batch.findings
    assert (finding.code, finding.severity, finding.row, finding.column) == ("shorter_ranking", "warning", 1, "responses 2")
    assert "over max_length 40" in finding.message and not by_row(batch.findings)
    assert "1 rankings go on without an answer that cannot be used" in caplog.text


def test_a_ranking_of_which_one_answer_is_left_is_dropped() -> None:
    groups = preftune.read([row(2, 1, 2, responses=("one", LONG, LONG + "y"))])
    batch = render(groups, tiny.tokenizer(), max_length=40)
    assert batch.groups == () and [(f.code, f.severity) for f in batch.findings] == [("too_long", "error")]


def test_a_ranking_that_orders_equal_tokens_is_dropped() -> None:
    """Cut to its limit, the second answer is the first."""
    groups = preftune.read([row(1, 2, 3, responses=(LONG, LONG + "y", "three"))])
    batch = render(groups, tiny.tokenizer(), max_length=40, too_long="truncate_response")
    assert batch.groups == () and [f.code for f in batch.findings] == ["identical_tokens"]


def test_a_shorter_ranking_is_no_dropped_row(caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(1, 2, 3, prompt=f"{n}: ", responses=("one", "two", LONG if n < 4 else "three")) for n in range(5)]
    data = from_groups(preftune.read(rows), [], "dpo", ScoredOptions())
    with caplog.at_level(logging.WARNING, "preftune"):
        found = render_data(data, tiny.tokenizer(), max_length=40, too_long="drop", template=None)
    summary = found.summary
    assert (summary["rows"], summary["kept"], summary["dropped"], len(summary["findings"])) == (5, 5, {}, 4)
    assert summary["train"] == {"groups": 5, "examples": 4 * 1 + 3} and summary["unused"] == {}
    assert "more rows dropped" not in caplog.text


# -- splitting ----------------------------------------------------------------------------------------------------------------


def test_rankings_without_a_prompt_stay_with_what_shares_their_answers() -> None:
    marks = tuple(Ranking(((2 * n + 1,), (2 * n,)) if n % 2 else ((2 * n,), (2 * n + 1, (2 * n + 2)))) for n in range(60))
    group = Group("", tiny.answers("", *(f"answer {n}" for n in range(121))), marks)
    train, held = split([group], share=0.3)
    assert train and held
    apart = [{r.content for mark in g.marks for r in (g.responses[i] for i in mark.responses)} for g in (*train, *held)]
    assert not apart[0] & apart[1] and len(train[0].marks) + len(held[0].marks) == 60
    for g in (*train, *held):
        for mark in g.marks:  # places moved with the answers
            best, worst = (int(str(g.responses[i].content).split()[1]) for i in (mark.responses[0], mark.responses[1]))
            assert best // 2 == (worst // 2) and (best % 2) == ((best // 2) % 2)
