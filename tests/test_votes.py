"""Votes in a run: `data.votes` makes labels of them wherever data is read, and says so; every row stays accounted for."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
from command import PAIRS, call, write_model, write_rows
from crowd import Crowd

import preftune
from preftune import labels
from preftune.config import resolve
from preftune.data.options import ScoredOptions, VotesMethod
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.labels.summary import Summary
from preftune.records import By, Comparison, Group, Mark, Origin
from preftune.runs.prepare import from_groups, read_data, render_data

SIDES = {"a": "response_a", "b": "response_b"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def voted(*said: str, who: str = "klmnopq", long: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Rows of plain votes: one text for each item, a letter for each annotator; `long` items have an answer too long."""
    choices = {"a": "a", "b": "b", "=": "tie"}
    return [
        {"item": f"i{n}", "annotator": w, "choice": choices[letter], "prompt": f"Q {n}:",
         "response_a": " yes" * (50 if n in long else 1), "response_b": f" no {n}"}
        for n, letters in enumerate(said)
        for w, letter in zip(who, letters, strict=False)
    ]  # fmt: skip


def rendered(rows: list[dict[str, Any]], votes: str | None, held: list[dict[str, Any]] | None = None) -> Any:
    write_rows(Path("votes.jsonl"), rows)
    write_rows(Path("held.jsonl"), held or voted(*["ab"] * 3, who="xy"))
    options = ScoredOptions(sources="votes.jsonl", votes=votes)  # type: ignore[arg-type]
    apart = ScoredOptions(sources="held.jsonl").sources  # type: ignore[arg-type]
    data = read_data(options.sources, options, apart, "dpo")
    return render_data(data, tiny.tokenizer(), max_length=60, too_long="drop", template=None)


def comparisons(groups: Sequence[Group]) -> list[Comparison]:
    return [mark for group in groups for mark in group.marks if isinstance(mark, Comparison)]


def test_the_names_are_those_of_the_methods() -> None:
    assert get_args(VotesMethod) == tuple(labels.METHODS)


@pytest.mark.parametrize("written", ["dawid-skene", "Dawid_Skene"])
def test_the_key_is_read_as_methods_are(written: str) -> None:
    assert resolve(TrainKeys, ["model=m", "data=d", f"data.votes={written}"]).data.votes == "dawid_skene"


def test_another_name_is_refused() -> None:
    with pytest.raises(Refusal) as refused:
        resolve(TrainKeys, ["model=m", "data=d", "data.votes=mean"])
    assert (refused.value.code, refused.value.key) == ("bad_value", "data.votes")
    assert "'majority', 'dawid_skene' or 'bradley_terry'" in str(refused.value)


def test_votes_on_a_pair_become_one_example_with_their_share_and_number() -> None:
    batch = rendered(voted("aaab=", "bbb", "a"), "majority").train
    assert [(c.preference, c.weight) for c in comparisons(batch.groups)] == [(3.5 / 5, 5), (0, 3), (1, 1)]
    by = [c.by for c in comparisons(batch.groups)]
    assert [(b.who, b.kind, len(b.votes)) for b in by if b] == [("majority", "rule", 5), ("majority", "rule", 3), ("k", "", 0)]


def test_without_the_key_every_vote_is_an_example() -> None:
    assert len(comparisons(rendered(voted("aaab=", "bbb"), None).train.groups)) == 8


@pytest.mark.parametrize("method", labels.METHODS)
def test_held_out_data_of_its_own_gets_labels_of_its_own_votes(method: str) -> None:
    found = rendered(voted("aab", "bba"), method, voted("aaab", "bbba", who="wxyz"))
    for batch, people in ((found.train, "klm"), (found.held, "wxyz")):
        for mark in comparisons(batch.groups):
            assert mark.by is not None
            assert (mark.by.who, "".join(vote.by.who for vote in mark.by.votes)) == (method, people)


def test_all_rows_of_a_label_fall_away_with_it_and_are_named() -> None:
    summary = rendered(voted("aaa", "bbb", "ab", "ba", long=[1]), "majority").summary
    assert (summary["sources"][0]["rows"], summary["sources"][0]["kept"]) == (10, 7)
    assert summary["dropped"] == {"too_long": 3}
    assert [(f["row"], f["column"]) for f in summary["findings"]] == [(4, "response_a"), (5, "response_a"), (6, "response_a")]


def test_one_line_says_what_the_labels_were_made_of(caplog: pytest.LogCaptureFixture) -> None:
    crowd = Crowd([0.95] * 9 + [0.05], items=200, ties=0)
    rows = [
        {
            "item": v.item,
            "annotator": v.by.who,
            "choice": v.choice,
            "prompt": f"{v.item}:",
            **{s: f" {s}" for s in SIDES.values()},
        }
        for v in crowd.votes
    ]
    with caplog.at_level(logging.INFO, "preftune"):
        summary = rendered(rows, "bradley_terry").summary
    (line, _) = [r.message for r in caplog.records if r.message.startswith("votes: ")]
    assert line.startswith("votes: 1,000 votes of 10 annotators on 200 pairs, Krippendorff's alpha 0.")
    assert line.endswith(", 1 annotators to look at: w9 (disagrees); labels by bradley_terry")
    told = summary["votes"][0]
    assert {key: told[key] for key in ("method", "votes", "annotators", "items", "several")} == {
        "method": "bradley_terry", "votes": 1000, "annotators": 10, "items": 200, "several": 200,
    }  # fmt: skip
    assert told["alpha"] == pytest.approx(float(labels.krippendorff_alpha(crowd.table.counts())))
    assert [text.partition(":")[0] for text in told["to_look_at"]] == ["w9"]


def test_numbers_of_the_line_have_their_commas() -> None:
    line = str(Summary(votes=84445, annotators=3815, items=16927, several=16927, alpha=float("nan"), to_look_at=()))
    assert line == "84,445 votes of 3,815 annotators on 16,927 pairs"


def test_it_is_said_where_there_is_nothing_to_make_labels_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "preftune"):
        batch = rendered(voted("a", "b", "="), "dawid_skene").train
    assert "data.votes=dawid_skene changes nothing: no pair of answers has more than one vote" in caplog.text
    assert [c.preference for c in comparisons(batch.groups)] == [1, 0, 0.5]


def test_fit_makes_labels_of_groups_at_hand_and_counts_their_votes() -> None:
    marks: list[Mark] = [Comparison(0, 1, float(n > 0), by=By(f"w{n}")) for n in range(4)]
    group = Group("Q:", tiny.answers("Q:", " a", " b"), tuple(marks))
    options = ScoredOptions(votes="majority")
    data = from_groups([group], [group], "dpo", options)
    assert [(m.preference, m.weight) for m in comparisons([*data.train, *data.held])] == [(0.75, 4)] * 2
    assert [reading.rows for reading in data.readings] == [4, 4]
    run = preftune.fit(
        tiny.model(), tiny.tokenizer(), [group], eval_groups=[group], steps=1, dtype="float32", data={"votes": "majority"}
    )
    assert run.before is not None and run.before["comparisons"] == 1


@pytest.mark.parametrize("method", labels.METHODS)
def test_labels_are_not_voted_on_again(method: str) -> None:
    """Unanimous labels are 1 or 0, as votes are; a vote that comes later stands beside them."""
    answers = tiny.answers("Q", " a", " b")
    cast = [[Comparison(0, 1, float(n % 2), by=By(who)) for who in "xyz"] for n in range(4)]
    once = labels.merged([Group(f"Q{n}:", answers, tuple(own)) for n, own in enumerate(cast)], "majority")
    later = [replace(group, marks=(*group.marks, Comparison(0, 1, by=By("late")))) for group in once]
    assert labels.merged(later, method) == later


def test_votes_given_already_are_not_gathered_again() -> None:
    groups = preftune.read(voted("aab", "bb"))
    assert labels.merged(groups, "majority", labels.votes_of(groups)) == labels.merged(groups)


def test_score_names_every_row_of_an_answer_that_was_voted_on(capsys: pytest.CaptureFixture[str]) -> None:
    write_model(Path("m"), positions=128)
    write_rows(Path("votes.jsonl"), voted("aab", "b"))
    plain, voted_on = ("o.jsonl", "p.jsonl")
    for out, more in ((plain, []), (voted_on, ["data.votes=majority"])):
        assert call(capsys, "score", "model=m", "data=votes.jsonl", f"out={out}", *more).code == 0
    one, two = ([json.loads(line)["from"] for line in Path(name).read_text().splitlines()] for name in (plain, voted_on))
    assert one == two
    assert [[place["row"] for place in places] for places in one] == [[1, 2, 3], [1, 2, 3], [4], [4]]


def test_evaluate_measures_on_labels(capsys: pytest.CaptureFixture[str]) -> None:
    write_model(Path("m"), positions=128)
    write_rows(Path("votes.jsonl"), voted("aab", "abb", "ab"))
    words = ("evaluate", "model=m", "data=votes.jsonl", "kl_samples=0", "--json")
    counts = [call(capsys, *words, *more).json["comparisons"] for more in ((), ("data.votes=majority",))]
    assert counts == [8, 3]


def test_convert_writes_labels_and_reads_them_back(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("votes.jsonl"), voted("aab", "bbb"))
    answer = call(capsys, "convert", "votes.jsonl", "pairs.jsonl", "to=pairs", "data.votes=majority")
    assert answer.code == 0
    found = comparisons(preftune.read("pairs.jsonl"))
    assert [(m.ordered[2], m.weight) for m in found] == [(pytest.approx(2 / 3), 3), (1, 3)]
    assert "not held: votes that a label was made of 6" in answer.err


def test_a_run_trains_on_labels_and_keeps_what_they_were_made_of(
    capsys: pytest.CaptureFixture[str], short_answers: None, no_report: None
) -> None:
    write_model(Path("m"), positions=128)
    rows = [
        {
            "item": str(n),
            "annotator": w,
            "choice": c,
            "prompt": p["prompt"],
            "response_a": p["chosen"],
            "response_b": p["rejected"],
        }
        for n, p in enumerate(PAIRS[:12])
        for w, c in (("x", "a"), ("y", "b" if n % 3 == 0 else "a"), ("z", "a"))
    ]
    write_rows(Path("votes.jsonl"), rows)
    answer = call(
        capsys, "train", "model=m", "data=votes.jsonl", "data.votes=dawid-skene", "out=run", "batch_size=12", "steps=1",
        "eval_data=votes.jsonl", "method=ipo",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "votes: 36 votes of 3 annotators on 12 pairs, Krippendorff's alpha " in answer.err
    kept = json.loads(Path("run/data.json").read_text())
    assert [told["votes"] for told in kept["votes"]] == [36, 36]
    assert (kept["rows"], kept["train"]["examples"]) == (72, 12)
    assert "votes: dawid_skene" in Path("run/config.yaml").read_text()


# -- the records that it needs ------------------------------------------------------------------------------------------------


def test_a_label_was_read_where_its_votes_were() -> None:
    from preftune.records import Vote, origins

    places = [Origin("f", n, "choice") for n in (1, 2)]
    votes = tuple(Vote("i", "a", origin=place) for place in places)
    assert origins(Comparison(0, 1, by=By("majority", votes=votes), origin=places[0])) == tuple(places)
    assert origins(Comparison(0, 1, by=By("u"), origin=places[1])) == (places[1],)
    assert origins(Comparison(0, 1)) == (None,)
