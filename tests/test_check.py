"""`preftune check`: every planted fault is named at its row and no other row is, on made-up files and on real ones."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import PAIRS, call, write_model, write_rows

from preftune.checks.check import check, quick
from preftune.checks.templates import Problems, last_turn
from preftune.checks.texts import Frequent, alike, refuses
from preftune.checks.tokens import Tokens
from preftune.data.options import DataOptions
from preftune.data.read import read, tally
from preftune.data.render import Speaker
from preftune.errors import Refusal
from preftune.records import Comparison, Finding, Group, Message, Response


def pair(n: int, **changes: Any) -> dict[str, Any]:
    """A row of its own, with nothing wrong."""
    draw = random.Random(n)
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(24)]
    return {
        "prompt": " ".join(words[:8]),
        "chosen": " " + " ".join(words[8:16]),
        "rejected": " " + " ".join(words[16:]),
    } | changes


def findings(report: dict[str, Any], code: str) -> list[dict[str, Any]]:
    return [found for found in report["findings"] if found["code"] == code]


def rows_of(report: dict[str, Any], code: str) -> list[int]:
    return [found["row"] for found in findings(report, code)]


CYCLE = {"prompt": "which animal", "x": " a cat of the house", "y": " a dog of the yard", "z": " a hen of the barn"}


def edge(better: str, worse: str) -> dict[str, Any]:
    return {"prompt": CYCLE["prompt"], "chosen": CYCLE[better], "rejected": CYCLE[worse]}


# row (from 1) -> what stands there, and the code that names it; None: needed by another row, and not at fault itself
PLANTED: dict[int, tuple[Any, str | None]] = {
    3: ("{torn", "bad_json"),
    5: ([1, 2], "not_an_object"),
    7: (pair(7, chosen="  "), "empty_answer"),
    9: (pair(9, rejected=pair(9)["chosen"]), "identical_answers"),
    11: (pair(11, chosen=True), "wrong_type"),
    13: ({"prompt": "a", "chosen": " b"}, "missing_column"),
    15: (pair(15, rejected=None), "missing_value"),
    17: (pair(17, preference=3), "bad_value"),
    19: (pair(19, images=["a.png"]), "unsupported_content"),
    21: ({"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}],
          "rejected": [{"role": "user", "content": "other"}, {"role": "assistant", "content": "b"}]}, "prompts_differ"),
    23: (pair(2), "duplicate_row"),
    25: (pair(4, chosen=pair(4)["rejected"], rejected=pair(4)["chosen"]), "contradiction"),
    27: (edge("x", "y"), None),
    28: (edge("y", "z"), None),
    30: (edge("z", "x"), "preference_cycle"),
    32: (pair(32, rejected=pair(32)["chosen"].upper()), "answers_alike"),
    34: (pair(6, prompt=pair(6)["prompt"] + " again"), "near_duplicate"),
}  # fmt: skip
HELD = {4: (pair(8), "shared_prompt")}


def planted(path: Path, faults: dict[int, tuple[Any, str | None]], rows: int, first: int) -> Path:
    lines = [faults[n][0] if n in faults else pair(first + n) for n in range(1, rows + 1)]
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def test_every_fault_is_named_at_its_row_and_no_other_row_is(tmp_path: Path) -> None:
    data, held = planted(tmp_path / "data.jsonl", PLANTED, 40, 0), planted(tmp_path / "held.jsonl", HELD, 6, 500)
    report = check(str(data), eval_sources=str(held), near_duplicates=True).report
    named = {(f["file"], f["row"], f["code"]) for f in report["findings"] if f["row"] is not None}
    wanted = {(str(data), row, code) for row, (_, code) in PLANTED.items() if code}
    assert named == wanted | {(str(held), row, code) for row, (_, code) in HELD.items()}
    dropped = [code for row, (_, code) in PLANTED.items() if code and row <= 21]
    assert report["rows"] == 40 and report["kept"] == 40 - len(dropped)
    assert report["dropped"] == dict.fromkeys(dropped, 1)
    assert report["groups"] == len(read(str(data))), "as many groups as training would have"


def test_the_command_says_it_and_exits_by_the_worst(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = planted(tmp_path / "bad.jsonl", PLANTED, 40, 0)
    answer = call(capsys, "check", str(bad), "--json")
    assert answer.code == 2 and answer.json["rows"] == 40 and "error" not in answer.json
    assert "10 of 40 rows cannot be used" in answer.err
    words = call(capsys, "check", str(bad))
    assert words.code == 2 and "empty_answer" in words.out and "(row 7)" in words.out
    good = write_rows(tmp_path / "good.jsonl", [pair(n) for n in range(20)])
    answer = call(capsys, "check", str(good), "--json")
    assert answer.code == 0 and answer.json["dropped"] == {} and answer.json["kept"] == 20
    twice = write_rows(tmp_path / "twice.jsonl", [pair(1), pair(2), pair(1)])
    answer = call(capsys, "check", str(twice), "--json")
    assert answer.code == 0 and rows_of(answer.json, "duplicate_row") == [3], "a warning is no refusal"
    assert "duplicate_row" in call(capsys, "check", str(twice), "--quiet").out
    assert "not used: data.votes" in call(capsys, "check", str(twice), "data.votes=majority").err


def test_too_many_dropped_is_an_error_of_the_whole(tmp_path: Path) -> None:
    rows = [pair(1), *(pair(n, chosen="") for n in range(2, 6))]
    assert rows_of(check(rows).report, "too_many_dropped") == [None]
    none = check([pair(n, chosen="") for n in range(3)]).report
    assert rows_of(none, "nothing_kept") == [None] and none["kept"] == 0


def test_findings_of_dropped_rows_stand_file_by_file(tmp_path: Path) -> None:
    """A file of which no row is kept is no exception."""
    bad = [pair(n, chosen="") for n in range(2)]
    places = [
        str(write_rows(tmp_path / name, rows)) for name, rows in (("b.jsonl", bad), ("a.jsonl", bad), ("c.jsonl", [pair(5)]))
    ]
    found = findings(check(places).report, "empty_answer")
    assert [(f["file"], f["row"]) for f in found] == [(places[0], 1), (places[0], 2), (places[1], 1), (places[1], 2)]


def test_a_source_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = write_rows(tmp_path / "a.jsonl", [pair(1), pair(2)])
    answer = call(capsys, "check", str(place), f"{place.parent}/./{place.name}", "--json")
    assert answer.code == 2 and answer.error["code"] == "named_twice"
    parts = [{"path": str(place), "limit": 1}, {"path": str(place), "limit": 2}]
    assert check(parts).report["rows"] == 3, "what differs in its settings is another source"


def test_hh_harmless(shared: Any) -> None:
    report = check(str(shared("data/hh_harmless/harmless-base-test.jsonl.gz"))).report
    assert report["rows"] == 2312 and report["dropped"] == {"empty_answer": 4, "prompts_differ": 5}
    assert rows_of(report, "empty_answer") == [87, 517, 926, 1104]
    assert rows_of(report, "prompts_differ") == [1255, 1689, 1951, 1953, 2037]
    length = report["length_bias"]
    assert length["comparisons"] == 2312 and length["equal"] == 11
    assert (round(length["longer_preferred"], 3), round(length["without_equal"], 4)) == (0.442, 0.4446)
    low, high = length["without_equal_interval"]
    assert 0.42 < low < 0.4446 < high < 0.47
    assert report["groups"] == len(read(str(shared("data/hh_harmless/harmless-base-test.jsonl.gz"))))


def test_pandalm_answers_that_are_true(shared: Any) -> None:
    report = check(str(shared("data/pandalm/testset-v1.json"))).report
    found = findings(report, "wrong_type")
    assert [f["row"] for f in found] == [158, 159, 160, 162, 163, 165]
    assert {f["column"] for f in found} <= {"response1", "response2"}
    assert not {58, 141} & {f["row"] for f in findings(report, "contradiction")}
    assert report["repeats"]["pairs_in_dispute"] > 50, "its annotators differ, and that is no contradiction"


# -- rows against each other ----------------------------------------------------------------------------------------------


def test_a_pair_with_its_columns_exchanged_is_the_same_judgement() -> None:
    arena = {"item": "1", "annotator": "w", "prompt": "p", "response_a": " x", "response_b": " y"}
    swapped = arena | {"response_a": " y", "response_b": " x", "choice": "b"}
    assert rows_of(check([arena | {"choice": "a"}, swapped]).report, "duplicate_row") == [2]
    assert rows_of(check([arena | {"choice": "a"}, swapped | {"choice": "a"}]).report, "contradiction") == [2]


def test_another_annotator_is_a_dispute_and_no_fault() -> None:
    rows = [
        pair(1, annotator="ann"),
        pair(1, annotator="bob"),
        pair(1, annotator="cy", chosen=pair(1)["rejected"], rejected=pair(1)["chosen"]),
    ]
    report = check(rows).report
    assert not [f for f in report["findings"] if f["row"]]
    assert report["repeats"]["pairs_in_dispute"] == 1 and findings(report, "disagreement")


@pytest.mark.parametrize(
    ("edges", "closing"),
    [
        (["xy", "yz", "zx"], [3]),
        (["xy", "yz", "xz"], []),
        (["xy", "yz", "zx", "xz", "xz"], []),  # the majority of z and x goes with the others
    ],
)
def test_cycles(edges: Sequence[str], closing: list[int]) -> None:
    rows = [edge(*ends) | {"annotator": f"w{n}"} for n, ends in enumerate(edges)]
    assert rows_of(check(rows).report, "preference_cycle") == closing


def test_ids_votes_and_scores_are_counted_as_reading_counts_them() -> None:
    first: dict[str, Any] = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 0)
    first |= {"prompt": "p", "response": " x", "helpfulness": 1}
    scored = [first, first | {"response": " y", "helpfulness": 2}, first | {"prompt": "alone"}]
    report = check(scored).report
    assert report["dropped"] == {"no_judgement": 1} and rows_of(report, "no_judgement") == [3]
    assert report["groups"] == 1 and report["judgements"]["comparisons"] == 1
    named = [{"id": "q", "prompt": prompt, "responses": [" x", " y"], "ranking": [[0], [1]]} for prompt in ("one", "two")]
    assert check(named).report["dropped"] == {"bad_value": 1}


def test_votes_find_their_items(tmp_path: Path) -> None:
    items = write_rows(tmp_path / "items.jsonl", [{"id": "q", "prompt": "p", "responses": [" x", " y"]}])
    votes = [("q", "ann", "a"), ("q", "ann", "b"), ("q", "bob", "a"), ("lost", "ann", "a")]
    said = [{"item": item, "annotator": who, "choice": choice} for item, who, choice in votes]
    file = write_rows(tmp_path / "votes.jsonl", said)
    report = check([str(items), str(file)]).report
    assert report["dropped"] == {"unknown_item": 1} and report["groups"] == 1
    (turned,) = findings(report, "contradiction")
    assert (turned["file"], turned["row"]) == (str(file), 2), "the same annotator, the other way round"


def test_rows_without_a_prompt_share_none() -> None:
    alone = {"text": "one of a kind"}
    assert not findings(check([alone], eval_sources=[{"text": "another"}]).report, "shared_prompt")
    asked = check([pair(1)], eval_sources=[pair(1, chosen=" other")]).report
    assert rows_of(asked, "shared_prompt") == [1] and asked["repeats"]["shared_prompts"] == 1


# -- what the labels favour -----------------------------------------------------------------------------------------------


def test_length_bias_by_hand() -> None:
    rows = [pair(n, chosen=" long long long", rejected=" short") for n in range(30)]
    rows += [pair(100 + n, chosen=" short", rejected=" long long long") for n in range(10)]
    rows += [pair(200 + n, chosen=" same", rejected=" emas") for n in range(10)]
    length = check(rows).report["length_bias"]
    assert (length["comparisons"], length["equal"]) == (50, 10)
    assert (length["longer_preferred"], length["without_equal"], length["chance"]) == (0.6, 0.75, 0.4)
    low, high = length["without_equal_interval"]
    assert low == pytest.approx(0.75 - 1.96 * (0.75 * 0.25 / 40) ** 0.5, abs=0.03)
    assert high == pytest.approx(0.75 + 1.96 * (0.75 * 0.25 / 40) ** 0.5, abs=0.03)


def test_what_helps_against_a_length_bias_is_by_its_side() -> None:
    """r_dpo counts a longer answer as better than it is: its model writes shorter."""
    lengths = {"longer": (" long long long", " short"), "shorter": (" short", " long long long")}
    for side, (chosen, rejected) in lengths.items():
        (found,) = findings(check([pair(n, chosen=chosen, rejected=rejected) for n in range(60)]).report, "length_bias")
        assert f"learn to write {side}" in found["message"]
        assert ("r_dpo" in found["message"]) == (side == "longer")


def test_labels_of_dropped_rows_count() -> None:
    """By the last answer: what stands before it differs here, which is why the row is dropped."""
    asked = "\n\nHuman: {}\n\nAssistant: {}"
    good = {"chosen": asked.format("who", "me"), "rejected": asked.format("who", "them")}
    differs = {"chosen": asked.format("a", "a long answer"), "rejected": asked.format("something quite other", "short")}
    report = check([good, differs]).report
    assert report["dropped"] == {"prompts_differ": 1}
    length = report["length_bias"]
    assert (length["comparisons"], length["dropped"], length["longer_preferred"]) == (2, 1, 0.5)


def test_position_bias_is_of_columns_that_name_no_winner() -> None:
    battle = {"annotator": "w", "response_a": " x y", "response_b": " u v", "prompt": "p"}
    rows = [battle | {"item": str(n), "prompt": f"p {n}", "choice": "a" if n % 5 else "b"} for n in range(50)]
    position = check(rows).report["position_bias"]
    assert (position["comparisons"], position["first_preferred"], position["by"]) == (50, 0.8, "first column")
    assert check([pair(n) for n in range(20)]).report["position_bias"] is None
    shown = check([pair(n, side="b") for n in range(20)]).report["position_bias"]
    assert (shown["first_preferred"], shown["by"]) == (0.0, "shown first")


@pytest.mark.parametrize(
    ("said", "is_one"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot assist.", True),
        ("As an AI language model, I do not have opinions.", True),
        ("I won't do that.", True),
        ("I'm sorry to hear that! Here is what helps.", False),
        ("You can't go wrong with soup.", False),
        ("Certainly.", False),
    ],
)
def test_refusals(said: str, is_one: bool) -> None:
    assert refuses(said.lower()) == is_one


def test_a_phrase_in_a_few_answers_says_nothing() -> None:
    def phrases(times: int, rows: int) -> list[dict[str, Any]]:
        said = [pair(n, chosen=f" Great question, {n}") if n < times else pair(n) for n in range(rows)]
        return findings(check(said).report, "boilerplate")

    assert not phrases(1, 20) and len(phrases(8, 20)) == 1
    assert "40.0 % of the better answers and 0.0 % of the worse ones" in phrases(8, 20)[0]["message"]


def test_refusals_of_both_sides_are_shares() -> None:
    no = " I'm sorry, but I can't help with that."
    rows = [pair(n, chosen=no if n < 5 else pair(n)["chosen"]) for n in range(20)]
    report = check(rows).report
    assert report["texts"]["refusals"] == {"better": 0.25, "worse": 0.0}
    assert "refuse more" in findings(report, "refusals")[0]["message"]


def test_alike() -> None:
    assert alike(" The Tana.", "the  tana. ") and not alike("x > y", "x < y") and not alike("a", "b")


def test_frequent_things_survive_in_little_room() -> None:
    few = Frequent(10)
    for n in range(1000):
        few.add(["often", str(n)])
    (thing, count), *_ = few.most(1)
    assert thing == "often" and 1000 - few.lost <= count <= 1000 and len(few.counts) <= 10


def test_balance_of_columns() -> None:
    rows = [pair(n, category="a" if n else "b") for n in range(20)]
    report = check(rows).report
    assert report["balance"] == {"category": {"rows": 20, "values": 2, "shares": {"a": 0.95, "b": 0.05}}}
    assert findings(report, "unbalanced")
    assert check([pair(n, lang="de") for n in range(3)], columns=("lang",)).report["balance"]["lang"]["rows"] == 3


def test_what_a_filter_leaves_out_is_no_row() -> None:
    rows = [pair(n, lang="de" if n % 2 else "en") for n in range(10)]
    report = check(rows, options=DataOptions(filter="lang == de")).report
    assert report["rows"] == 5 and report["sources"][0]["filtered"] == 5
    with pytest.raises(Refusal, match="leaves none of 10 rows"):
        check(rows, options=DataOptions(filter="lang == fr"))


# -- with a model ---------------------------------------------------------------------------------------------------------


def tokens_of(rows: Any, limit: int | None = None, template: str | None = None, **changes: Any) -> dict[str, Any]:
    tokens = Tokens(tiny.tokenizer(template=template), limit=limit, template=None, **{"too_long": "drop", **changes})
    return check(rows, tokens=tokens).report


def test_tokens_are_those_that_training_has() -> None:
    rows = [*PAIRS[:6], {**PAIRS[0], "rejected": " It slept."}]
    report = tokens_of(rows)
    from preftune.data.render import render

    batch = render(read(rows), tiny.tokenizer())
    held = report["tokens"]
    assert held["one_by_one"] == sum(len(s.ids) for s in batch.sequences)
    starts = {s.group: s.start for s in batch.sequences}
    assert held["shared"] == sum(starts.values()) + sum(len(s.ids) - s.start for s in batch.sequences)
    assert held["row"]["max"] == max(len(s.ids) for s in batch.sequences)


def test_what_max_length_cuts() -> None:
    alike_at_first = " one two three four five six seven eight" * 2
    rows = [{"prompt": "A cat", "chosen": alike_at_first + " nine", "rejected": alike_at_first + " ten"}, PAIRS[0]]
    whole = tokens_of(rows)["tokens"]["row"]["max"]
    report = tokens_of(rows, limit=whole - 6)
    assert report["dropped"] == {"too_long": 1} and rows_of(report, "too_long") == [1]
    cut = report["tokens"]["cut"]
    assert report["tokens"]["over"] == 1 and cut["truncate_response"]["only_difference"] == 1
    assert cut["truncate_prompt_start"].get("dropped", 0) == 1 or cut["truncate_prompt_start"]["tokens"] > 0
    report = tokens_of(rows, limit=whole - 6, too_long="truncate_response")
    assert rows_of(report, "identical_tokens") == [1] and report["kept"] == 1


def test_a_row_with_several_judgements_is_named_once() -> None:
    judged = {"instruction": "Name a river.", "response1": "The Tana.", "response2": "It is the Rhine, or so they say."}
    rows = [{**judged, "annotator1": 1, "annotator2": 2, "annotator3": 1}, {**judged, "response2": "No.", "annotator1": 1}]
    report = tokens_of(rows, limit=60)
    assert rows_of(report, "too_long") == [1] and report["dropped"] == {"too_long": 1}
    lost = [Finding("too_long", "error", "over it", "a.jsonl", row) for row in (1, 1, 1, 4)]
    assert tally({"too_long": 2}, lost) == "too_long 2 (rows 1, 4)"


CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"prompt": [{"role": "user", "content": f"say {word}"}], "chosen": [{"role": "assistant", "content": f"{word} it is"}],
     "rejected": [{"role": "assistant", "content": "no"}]}
    for word in ("cat", "dog")
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (CHAT, None),
        (CHAT.replace("[{{ m['role'] }}]", "[{{ m['role'] }}{{ messages | length }}]"), "not_prefix_stable"),
        (CHAT.replace("{{ m['content'] }}", "{{ m['content'] if not loop.first else '' }}"), "lost_turn"),
        (CHAT.replace("{{ eos_token if m['role'] == 'assistant' else '' }}", ""), "no_end_token"),
    ],
)
def test_template_problems(template: str, code: str | None) -> None:
    named = {(f["code"], f["row"]) for f in tokens_of(TALK, template=template)["findings"] if f["severity"] != "info"}
    assert named == ({(code, 1)} if code else set())


def test_tokens_that_stand_twice() -> None:
    tokenizer = tiny.tokenizer()
    start, end = tokenizer.bos_token, tokenizer.eos_token
    rows = [pair(1), pair(2, chosen=f" yes{end} no"), pair(3, prompt=f"{start}{pair(3)['prompt']}")]
    report = tokens_of(rows)
    assert rows_of(report, "double_end_token") == [2] and rows_of(report, "double_start_token") == [3]


def test_the_last_question_is_not_cut_in_silence() -> None:
    talk = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    assert (
        last_turn(talk) == talk[:2] and last_turn("\n\nHuman: a\n\nAssistant: b\n\nHuman: c") == "\n\nHuman: a\n\nAssistant: b"
    )
    asked = "and " * 60
    rows = [*TALK, {**TALK[0], "prompt": [{"role": "user", "content": asked}]}]
    report = tokens_of(rows, template=CHAT, limit=100, too_long="truncate_prompt_start")
    assert rows_of(report, "last_turn_cut") == [3]


def test_a_run_is_estimated_and_rows_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, page = write_model(tmp_path / "m"), tmp_path / "page.html"
    data = write_rows(tmp_path / "data.jsonl", PAIRS[:40])
    answer = call(capsys, "check", str(data), f"model={model}", "batch_size=8", f"out={page}", "--json")
    assert answer.code == 0, answer.err
    run, tokens = answer.json["run"], answer.json["tokens"]
    assert (run["steps"], run["batch_size"], run["method"]) == (5, 8, "dpo") and run["memory_gb"] > 0 and run["seconds"] > 0
    drawn = tokens["drawn"]
    assert [row["row"] for row in drawn] == [1, 2, 3] and len(drawn[0]["responses"]) == 2
    trained = [text for text, is_trained in drawn[0]["responses"][0]["tokens"] if is_trained]
    assert trained[-1] == tiny.tokenizer().eos_token and "".join(trained[:-1]).replace("Ġ", " ") == PAIRS[0]["chosen"]
    source = page.read_text(encoding="utf-8")
    assert 'class="trained"' in source and "://" not in source and "<script" not in source
    assert "⟦" in call(capsys, "check", str(data), f"model={model}").out


def test_the_page_shows_hostile_text_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>"
    data = write_rows(tmp_path / "data.jsonl", [pair(n, category=evil, chosen=f" {evil} {n}") for n in range(4)])
    page = tmp_path / "page.html"
    assert call(capsys, "check", str(data), f"out={page}").code == 0
    source = page.read_text(encoding="utf-8")
    assert "<script" not in source and "&lt;script&gt;" in source
    assert call(capsys, "check", str(data), f"out={page}").code == 2, "a page that is there is not replaced"


# -- in training ----------------------------------------------------------------------------------------------------------


def test_the_quick_part_says_the_same_as_the_check() -> None:
    rows = [
        pair(1),
        pair(2),
        pair(1),
        pair(2, chosen=pair(2)["rejected"], rejected=pair(2)["chosen"]),
        edge("x", "y"),
        edge("y", "z"),
        edge("z", "x"),
    ]
    line, found = quick(read(rows))
    assert {(f.code, f.row) for f in found if f.row} == {
        ("duplicate_row", 3), ("contradiction", 4), ("preference_cycle", 7),
    }  # fmt: skip
    assert line == "check: duplicate rows: 1; contradictions: 1; preference cycles: 1"
    many, _ = quick(read([pair(n, chosen=" long enough") for n in range(40)]))
    assert "shorter" not in many and "the longer answer wins 0.0 % of comparisons" in many


def test_groups_made_in_python_are_checked_too() -> None:
    group = Group("p", (Response(" x"), Response(" y")), (Comparison(0, 1), Comparison(1, 0)))
    report = check([group, group]).report
    assert report["rows"] == 2 and rows_of(report, "duplicate_row") == [2]


def test_problems_are_few_however_many_rows_have_them() -> None:
    problems = Problems(Speaker(tiny.tokenizer(), None))
    for row in range(1, 101):
        problems.note("lost_turn", "gone", "f", row)
    (found,) = problems.findings()
    assert found.row == 1 and "100 rows" in found.message


def test_refused_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "d.jsonl", [pair(1)])
    for words, key in (
        ([], None),
        ([str(data), f"data={data}"], "data.sources"),
        ([str(data), "max_length=5"], "max_length"),
        ([str(tmp_path / "none.jsonl")], None),
    ):
        answer = call(capsys, "check", *words, "--json")
        assert answer.code == 2 and answer.error["key"] == key
    with pytest.raises(Refusal, match="no data"):
        check([])
