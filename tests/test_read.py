"""From sources to Groups: merging, accounting, options, refusals."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from preftune.data.options import DataOptions, Source
from preftune.data.read import Reading, enforce, load, read
from preftune.errors import Refusal
from preftune.records import By, Comparison, Finding, Group, Origin, Ranking, Response

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shared(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip(f"needs the shared data file {name}")
    return str(SHARED / name)


def adds_up(reading: Reading) -> bool:
    errors = Counter(f.code for f in reading.findings if f.severity == "error")
    return errors == reading.dropped and reading.rows == reading.kept + sum(reading.dropped.values())


def test_rows_with_one_prompt_merge() -> None:
    rows = [PAIR, {"prompt": "p", "chosen": "x", "rejected": "y"}, {**PAIR, "chosen": "b", "rejected": "c"}]
    first, second = read(rows)
    assert (first.prompt, second.prompt) == ("q", "p")
    assert [r.content for r in first.responses] == ["a", "b", "c"]
    assert first.responses[1].origins == (Origin("rows", 1, "rejected"), Origin("rows", 3, "chosen"))
    assert first.marks == (
        Comparison(0, 1, origin=Origin("rows", 1, "chosen")),
        Comparison(1, 2, origin=Origin("rows", 3, "chosen")),
    )


def test_tools_and_ids_keep_prompts_apart() -> None:
    tools = [{**PAIR, "tools": [{"name": name}]} for name in "fgf"]
    assert [len(group.marks) for group in read(tools)] == [2, 1]
    rows = [{**PAIR, "key": key} for key in (1, 2, 1)] + [{**PAIR, "prompt": "p", "key": 2}]
    reading = load(rows, options=DataOptions(columns={"id": "key"}))
    assert [(group.id, len(group.marks)) for group in reading.groups] == [("1", 2), ("2", 1)]
    assert [(f.code, f.row, f.column) for f in reading.findings] == [("bad_value", 4, "key")]


def test_every_dropped_row_has_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": \n' + "".join(json.dumps(r) + "\n" for r in [PAIR, {**PAIR, "chosen": ""}, [], PAIR]))
    reading = load(path)
    assert adds_up(reading)
    assert (reading.rows, reading.kept) == (5, 2)
    assert [(f.code, f.row) for f in reading.findings] == [("bad_json", 1), ("empty_answer", 3), ("not_an_object", 4)]
    read_as = {"format": "pairs", "read_as": "preference pairs with explicit prompt"}
    assert reading.sources == [{"path": str(path), **read_as, "rows": 5, "kept": 2, "dropped": dict(reading.dropped)}]
    assert reading.summary()[0].endswith("3 dropped: bad_json 1 (row 1), empty_answer 1 (row 3), not_an_object 1 (row 4)")


def test_columns_rename_and_findings_name_the_files_own(tmp_path: Path) -> None:
    rows = [{"ask": "q", "chosen": "bad", "rejected": "good"}, {"ask": "q", "chosen": "", "rejected": "x"}]
    columns = {"prompt": "ask", "chosen": "rejected", "rejected": "chosen"}
    reading = load({"path": written(tmp_path / "a.jsonl", rows), "columns": columns})
    assert [r.content for r in reading.groups[0].responses] == ["good", "bad"]
    assert reading.findings[0].column == "chosen"
    as_completion = load(rows, options=DataOptions(columns={"prompt": "ask", "completion": "rejected"}))
    assert as_completion.sources[0]["format"] == "demonstrations"


def test_options_of_a_source_win_over_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{**PAIR, "completion": str(n)} for n in range(5)])
    defaults = DataOptions(limit=3, format="demonstrations")
    assert [s["rows"] for s in load([path, Source(path=path, limit=2)], options=defaults).sources] == [3, 2]
    formats = [s["format"] for s in load([path, {"path": path, "format": "pairs"}], options=defaults).sources]
    assert formats == ["demonstrations", "pairs"]
    assert DataOptions.model_validate({"sources": path}).sources == [Source(path=path)]


def test_a_folder_is_all_its_data_files(tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl", [PAIR])
    written(tmp_path / "a.jsonl", [PAIR, {**PAIR, "chosen": "c"}])
    (tmp_path / "SOURCE.txt").write_text("not data")
    reading = load(tmp_path)
    assert [Path(s["path"]).name for s in reading.sources] == ["a.jsonl", "b.jsonl"]
    assert [r.content for r in reading.groups[0].responses] == ["a", "b", "c"]
    assert [s["rows"] for s in load({"path": str(tmp_path), "limit": 2}).sources] == [2]


def test_sources_may_be_mixed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [PAIR])
    groups = read([{**PAIR, "chosen": "d"}])
    assert load(groups).groups == groups
    mixed = read([{**PAIR, "chosen": "c"}, path, *groups])
    assert [[r.content for r in group.responses] for group in mixed] == [["c", "b", "a", "d"]]
    assert [(m.responses, m.origin.file if m.origin else "") for m in mixed[0].marks] == [
        ((0, 1), "rows"), ((2, 1), path), ((3, 1), "rows"),
    ]  # fmt: skip


def test_an_answer_that_was_cut_stays_so_when_groups_merge() -> None:
    cut = Group("q", (Response("a", (Origin("samples", 1, "response"),), finished=False), Response("c")), (Comparison(0, 1),))
    (group,) = load([PAIR, cut]).groups
    assert [(r.content, r.finished) for r in group.responses] == [("a", True), ("b", True), ("a", False), ("c", True)]
    assert [m.responses for m in group.marks] == [(0, 1), (2, 3)], "the same words, cut off, are another answer"
    assert load([cut, PAIR]).groups[0].responses[0] == cut.responses[0]


def test_origins_name_the_files_own_columns() -> None:
    (group,) = load([{"prompt": "q", "better": "a", "rejected": "b"}], options=DataOptions(columns={"chosen": "better"})).groups
    assert [o.column for r in group.responses for o in r.origins] == ["better", "rejected"]
    assert group.marks[0].origin == Origin("rows", 1, "better")


def test_scores_of_a_prompt_become_its_ranking() -> None:
    """Rows of one answer each: the ranking stands at the first of them, and a score without another is named."""

    def row(prompt: str, completion: str, score: float, **more: Any) -> dict[str, Any]:
        return {"prompt": prompt, "completion": completion, "score": score, **more}

    rows = [row("q", "a", 1), row("p", "x", 2), row("q", "b", 3), row("q", "c", 3), row("o", "z", 1), row("p", "y", 5)]
    reading = load(rows, options=DataOptions(format="scores"))
    origins = Origin("rows", 1, "completion"), Origin("rows", 2, "completion")
    assert [group.marks for group in reading.groups] == [
        (Ranking(((1, 2), (0,)), origin=origins[0]),),
        (Comparison(0, 1, 0.0, by=By(strength=3.0), origin=origins[1]),),
    ]
    assert adds_up(reading)
    assert [(f.code, f.row) for f in reading.findings] == [("no_judgement", 5)]
    assert "read as answers with a score each, 1 to 3 answers a prompt" in reading.summary()[0]
    by_two = [row("q", "a", 1, annotator="v"), row("q", "b", 2, annotator="v"), row("q", "a", 3, annotator="w"),
              row("q", "b", 1, annotator="w"), row("q", "a", 9, annotator="u")]  # fmt: skip
    reading = load(by_two, options=DataOptions(format="scores"))
    assert [(mark.ordered, mark.by) for mark in reading.groups[0].marks if isinstance(mark, Comparison)] == [
        ((1, 0, 1.0), By("v", strength=1.0)), ((0, 1, 1.0), By("w", strength=2.0)),
    ]  # fmt: skip
    assert [(f.code, f.row) for f in reading.findings] == [("no_judgement", 5)]


def test_votes_find_the_answers_by_their_item(tmp_path: Path) -> None:
    pairs = written(tmp_path / "pairs.jsonl", [{"id": n, "prompt": f"q{n}", "responses": ["x", "y"]} for n in (1, 2)])
    said = [("1", "v", "a"), ("2", "v", "tie"), ("1", "w", "b"), ("3", "w", "a"), ("1", "w", "c")]
    votes = tmp_path / "votes.csv"
    votes.write_text("item,annotator,choice\n" + "".join(",".join(vote) + "\n" for vote in said))
    reading = load([pairs, str(votes)])
    first, second = (group.marks for group in reading.groups)
    assert first == (
        Comparison(0, 1, 1.0, by=By("v"), origin=Origin(str(votes), 1, "choice")),
        Comparison(0, 1, 0.0, by=By("w"), origin=Origin(str(votes), 3, "choice")),
    )
    assert [mark.preference for mark in second if isinstance(mark, Comparison)] == [0.5]
    assert [(f.code, f.row, f.column) for f in reading.findings] == [("unknown_item", 4, "item"), ("bad_value", 5, "choice")]
    assert adds_up(reading)
    with pytest.raises(Refusal, match="none of 5 rows"):
        read(votes)


def test_several_judgements_of_a_row_share_its_place() -> None:
    row = {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 2, "annotator3": 0}
    reading = load([row])
    assert [(m.preference, m.by and m.by.who, m.origin) for m in reading.groups[0].marks if isinstance(m, Comparison)] == [
        (p, f"annotator{n}", Origin("rows", 1, "response1")) for n, p in enumerate((1.0, 0.0, 0.5), start=1)
    ]
    assert reading.summary() == ["rows: 1 rows read as PandaLM, 3 judgements a row"]


def test_what_is_left_out_of_a_row_is_a_warning_and_drops_nothing() -> None:
    rows = [{"ask": "q", "answers": ["a", "", "b", "c"], "scores": [1, 2, 3, 4]}]
    columns = {"prompt": "ask", "responses": "answers"}
    reading = load(rows, options=DataOptions(columns=columns))
    assert [(f.code, f.severity, f.column) for f in reading.findings] == [("empty_answer", "warning", "answers 2")]
    assert (reading.kept, reading.dropped) == (1, Counter())
    assert [o.column for r in reading.groups[0].responses for o in r.origins] == ["answers 1", "answers 3", "answers 4"]
    (line,) = reading.summary()
    assert line == "rows: 1 rows read as rankings, 3 answers a prompt; answers left out: empty_answer 1 (row 1)"


def test_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([PAIR, {**PAIR, "chosen": None}])
    reading = load(dataset)
    assert reading.groups[0].responses[0].origins == (Origin("dataset", 1, "chosen"),)
    assert [(f.code, f.file, f.row) for f in reading.findings] == [("missing_value", "dataset", 2)]
    dataset.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])})
    splits.save_to_disk(str(tmp_path / "two"))
    for source in (tmp_path / "one", tmp_path / "two", splits, splits["train"].to_iterable_dataset()):
        assert load(source).rows == 2
    assert load({"path": str(tmp_path / "two"), "split": "test"}).rows == 1
    with pytest.raises(Refusal, match="train, test"):
        load(splits, options=DataOptions(split="trian"))
    for source in (dataset, str(tmp_path / "one"), [PAIR]):
        with pytest.raises(Refusal, match="has no splits") as refused:
            load(source, options=DataOptions(split="test"))
        assert refused.value.code == "no_splits"
    chats = datasets.Dataset.from_list([{**PAIR, "prompt": [{"role": "user", "content": "q"}]}]).with_format("numpy")
    for source in (chats, datasets.DatasetDict({"train": chats})):
        assert load(source).kept == 1, "whatever tensors its owner asked for"


def test_an_unknown_hub_name_is_one_line(tmp_path: Path) -> None:
    code = "from preftune.data.read import load\n"
    code += "try: load('nobody/nothing')\nexcept Exception as e: print(repr(str(e)), e.code)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )  # fmt: skip
    assert run.stdout.startswith(("'nobody/nothing: ", '"nobody/nothing: ')), run.stderr
    assert "\\n" not in run.stdout
    assert run.stdout.split()[-1] == "not_on_hub"


@pytest.mark.parametrize(
    ("name", "content", "source", "code", "words"),
    [
        ("pairs.jsonl", "{}", "pair.jsonl", "not_found", "Did you mean pairs.jsonl?"),
        ("pairs.jsonl", "{}", "no/such/pairs.jsonl", "not_found", "no folder"),
        ("a.jsonl", "", "a.jsonl", "empty", "no rows"),
        ("a.csv", "prompt,chosen\n", "a.csv", "empty", "no rows"),
        ("a.jsonl", '{"prompt": "q", "choosen": "a", "rejected": "b"}', "a.jsonl", "no_known_columns", "choosen"),
        ("a.jsonl", json.dumps({**PAIR, "conversations": []}), "a.jsonl", "ambiguous_format", ") or llamafactory_pairs"),
        ("a.md", "# hi", "", "not_found", "no data files"),
        ("a.jsonl", json.dumps(PAIR), {"path": "a.jsonl", "format": "pair"}, "unknown_format", "Did you mean pairs?"),
        ("a.jsonl", json.dumps(PAIR), {"path": "a.jsonl", "split": "test"}, "no_splits", "no splits"),
        ("a.jsonl", json.dumps(PAIR), {"path": "a.jsonl", "limit": 0}, "bad_option", "1"),
        ("a.jsonl", json.dumps(PAIR), {"path": "a.jsonl", "colums": {}}, "bad_option", "Did you mean columns?"),
        ("a.jsonl", json.dumps(PAIR), {"path": "a.jsonl", "columns": {"choosen": "a"}}, "unknown_column", "chosen?"),
        ("a.jsonl", json.dumps(PAIR), {"path": "a.jsonl", "columns": {"weight": "chosn"}}, "unknown_column", "chosen?"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, name: str, content: str, source: Any, code: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    here = {**source, "path": str(tmp_path / source["path"])} if isinstance(source, dict) else str(tmp_path / source)
    with pytest.raises(Refusal) as caught:
        load(here)
    assert caught.value.code == code
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["a.jsonl", "."])
def test_a_split_of_what_has_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """A default for every source, too: what was asked for is not passed over."""
    monkeypatch.chdir(tmp_path)
    written(Path("a.jsonl"), [PAIR])
    with pytest.raises(Refusal, match="has no splits: leave split out") as refused:
        load(source, options=DataOptions(split="test"))
    assert (refused.value.code, refused.value.file) == ("no_splits", source)
    with pytest.raises(Refusal, match="has no splits"):
        load({"path": source, "split": "test"})


@pytest.mark.parametrize(("source", "code"), [([], "no_data"), ([3], "unknown_source"), (None, "unknown_source")])
def test_what_is_no_source(source: Any, code: str) -> None:
    with pytest.raises(Refusal) as caught:
        load(source)
    assert caught.value.code == code


FOUND = [Finding("empty_answer", "error", "blank", "a.jsonl", 7, "chosen"), Finding("bad_json", "error", "no", "a", 9)]


@pytest.mark.parametrize(
    ("rows", "dropped", "keys", "code"),
    [
        (4, 2, {}, None),
        (3, 2, {}, "too_many_dropped"),
        (3, 2, {"allow_drops": True}, None),
        (2, 2, {"allow_drops": True}, "nothing_kept"),
        (0, 0, {}, "nothing_kept"),
        (9, 2, {"strict": True, "allow_drops": True}, "faulty_row"),
        (9, 0, {"strict": True}, None),
    ],
)
def test_enforce(rows: int, dropped: int, keys: dict[str, bool], code: str | None) -> None:
    asked = {"strict": False, "allow_drops": False, **keys}
    counts = Counter(f.code for f in FOUND[:dropped])
    if code is None:
        enforce(rows, counts, FOUND[:dropped], **asked)
        return
    with pytest.raises(Refusal) as caught:
        enforce(rows, counts, FOUND[:dropped], **asked)
    assert caught.value.code == code
    if dropped:  # too many: the rows stand in the message, and no single one is to blame
        row, column = (None, None) if code == "too_many_dropped" else (7, "chosen")
        assert (caught.value.file, caught.value.row, caught.value.column) == ("a.jsonl", row, column)


def test_read_logs_drops_once_and_refuses_what_is_mostly_bad(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="preftune"):
        read([PAIR, PAIR])
        assert not caplog.records
        read([PAIR, {**PAIR, "chosen": ""}])
    assert [r.message for r in caplog.records] == [
        "rows: 2 rows read as preference pairs with explicit prompt, 1 dropped: empty_answer 1 (row 2)"
    ]
    with pytest.raises(Refusal, match="2 of 3 rows"):
        read([PAIR, {}, {"prompt": "q"}])


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_put_back_as_it_was(on: bool) -> None:
    try:
        gc.enable() if on else gc.disable()
        read([PAIR])
        assert gc.isenabled() == on
        with pytest.raises(Refusal):
            read([{"a": 1}])
        assert gc.isenabled() == on
    finally:
        gc.enable()


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, preftune.data.read; print({'torch', 'datasets', 'pyarrow', 'transformers'} & set(sys.modules))"
    path = {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, timeout=60)
    assert run.stdout.strip() == "set()", run.stderr


def test_hh_as_published() -> None:
    reading = load(shared("hh_harmless/harmless-base-test.jsonl.gz"))
    rows: dict[str, list[int | None]] = {}
    for finding in reading.findings:
        rows.setdefault(finding.code, []).append(finding.row)
    assert (reading.rows, reading.kept) == (2312, 2303)
    assert rows == {"empty_answer": [87, 517, 926, 1104], "prompts_differ": [1255, 1689, 1951, 1953, 2037]}
    assert all(isinstance(g.prompt, str) and g.prompt.endswith("\n\nAssistant:") for g in reading.groups)
    chat = load(shared("hh_harmless/harmless-base-test.jsonl.gz"), options=DataOptions(format="hh_messages"))
    assert chat.kept <= reading.kept
    assert all(isinstance(g, Group) and g.prompt[-1].role == "user" for g in chat.groups if not isinstance(g.prompt, str))


def test_pandalm_as_published() -> None:
    """Six answers are JSON `true`: rows and columns are named. Blank answers are, too."""
    reading = load(shared("pandalm/testset-v1.json"))
    assert reading.summary()[0].split(": ")[1].startswith("999 rows read as PandaLM, 3 judgements a row, 60 dropped")
    wrong = [(f.row, f.column) for f in reading.findings if f.code == "wrong_type"]
    assert [row for row, _ in wrong] == [158, 159, 160, 162, 163, 165]
    rows = json.loads(Path(shared("pandalm/testset-v1.json")).read_text())
    assert all(rows[row - 1][column] is True for row, column in wrong)
    blank = [f.row for f in reading.findings if f.code == "empty_answer"]
    assert blank == [n for n, row in enumerate(rows, start=1) if "" in (row["response1"], row["response2"])]
    votes = Counter(m.preference for g in reading.groups for m in g.marks if isinstance(m, Comparison))
    kept = [row for n, row in enumerate(rows, start=1) if n not in {f.row for f in reading.findings}]
    assert votes == Counter({0: 0.5, 1: 1.0, 2: 0.0}[row[f"annotator{n}"]] for row in kept for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("name", "rows"), [("LLMBar_Natural", 100), ("LLMBar_Adversarial_Neighbor", 134), ("Processed_MT-Bench", 200)]
)
def test_llmbar_as_published(name: str, rows: int) -> None:
    reading = load(shared(f"llmbar/{name}.json"))
    held = json.loads(Path(shared(f"llmbar/{name}.json")).read_text())
    assert (reading.sources[0]["format"], reading.rows, reading.kept) == ("llmbar", rows, rows)
    chosen = {(g.prompt[0].content, g.responses[m.ordered[0]].content[0].content) for g in reading.groups for m in g.marks}
    assert chosen == {(row["input"], row[f"output_{row['label']}"]) for row in held}


@pytest.mark.parametrize(
    ("name", "format", "rows"),
    [
        ("dpo_en_demo.json", "llamafactory_pairs", 300),
        ("v1_dpo_demo.jsonl", "message_pairs", 10),
        ("kto_en_demo.json", "conversation_ratings", 300),
        ("alpaca_en_demo.json", "alpaca", 999),
    ],
)
def test_llamafactory_as_published(name: str, format: str, rows: int) -> None:
    reading = load(shared(f"llamafactory_demo/{name}"))
    assert (reading.sources[0]["format"], reading.rows, reading.kept) == (format, rows, rows)
    assert sum(len(group.marks) for group in reading.groups) == rows
