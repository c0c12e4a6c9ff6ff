"""Between sources and batches: what is counted with what, what is refused, and what the run's tokenizer carries."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import PAIRS, write_model, write_rows

from preftune.config import build
from preftune.data.options import ScoredOptions
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.records import Comparison, Group, Message, Origin, Response
from preftune.runs.prepare import RenderedData, from_groups, read_data, render_data

LONG = {"prompt": "and so on", "chosen": " on" * 60, "rejected": " no"}
TIE = {"prompt": "a tie", "chosen": " one", "rejected": " two", "preference": 0.5}
LIMIT = 100


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(name: str, *parts: Sequence[dict[str, Any]]) -> str:
    return str(write_rows(Path(name), [row for part in parts for row in part]))


def rendered(data: str, eval_data: str | None, *, method: str = "dpo", **options: Any) -> RenderedData:
    asked = ScoredOptions(sources=data, **options)  # type: ignore[arg-type]
    held = ScoredOptions(sources=eval_data).sources if eval_data else []  # type: ignore[arg-type]
    found = read_data(asked.sources, asked, held, method)
    return render_data(found, tiny.tokenizer(), max_length=LIMIT, too_long="drop", template=None)


# -- every part by its own rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "held", "options", "code", "says"),
    [
        ([PAIRS[:20]], [[LONG] * 3], {}, "nothing_kept", "none of 3 rows of the held-out data could be used"),
        ([PAIRS[:20]], [[LONG] * 3], {"allow_drops": True}, "nothing_kept", "of the held-out data"),
        ([PAIRS[:20]], [PAIRS[20:21], [LONG] * 2], {}, "too_many_dropped", "2 of 3 rows of the held-out data were dropped"),
        ([PAIRS[:1], [LONG] * 2], [PAIRS[20:40]], {}, "too_many_dropped", "2 of 3 rows of the training data were dropped"),
        ([PAIRS[:9], [LONG]], [PAIRS[20:40]], {"strict": True}, "faulty_row", "1 faulty of the training data in all"),
        ([PAIRS[:9]], [PAIRS[20:40], [LONG]], {"strict": True}, "faulty_row", "1 faulty of the held-out data in all"),
    ],
)
def test_training_and_held_out_rows_are_counted_apart(
    train: list[Any], held: list[Any], options: dict[str, Any], code: str, says: str
) -> None:
    """Together none of these would be over the half, or name the part that is gone."""
    with pytest.raises(Refusal, match=says) as refused:
        rendered(rows("train.jsonl", *train), rows("held.jsonl", *held), **options)
    assert refused.value.code == code
    assert refused.value.file == ("held.jsonl" if "held-out" in says else "train.jsonl")


def test_of_a_split_source_there_is_one_count() -> None:
    """Whichever side of the split the long rows fall on: 20 of 60 are gone, less than half."""
    long = [{**LONG, "prompt": f"and so on {n}"} for n in range(20)]
    summary = rendered(rows("all.jsonl", PAIRS[:40], long), None).summary
    assert (summary["rows"], summary["kept"], summary["dropped"]) == (60, 40, {"too_long": 20})
    with pytest.raises(Refusal, match="20 of 30 rows were dropped"):
        rendered(rows("all.jsonl", PAIRS[:10], long), None)


def test_named_held_out_data_without_an_example_is_refused() -> None:
    with pytest.raises(Refusal, match="no example is left in the held-out data") as refused:
        rendered(rows("train.jsonl", PAIRS[:9]), rows("ties.jsonl", [TIE]), method="sft")
    assert (refused.value.code, refused.value.key) == ("nothing_kept", "eval_data")


def test_what_fell_away_is_said_and_counted_by_part_and_source(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "preftune"):
        summary = rendered(rows("a.jsonl", PAIRS[:9], [LONG]), rows("b.jsonl", PAIRS[9:18], [LONG, {}])).summary
    said = [r.message for r in caplog.records if "more rows" in r.message]
    assert said == [
        "1 more rows of the training data dropped: too_long 1 (row 10)",
        "1 more rows of the held-out data dropped: too_long 1 (row 10)",
    ]
    assert [(s["path"], s["rows"], s["kept"], s["dropped"]) for s in summary["sources"]] == [
        ("a.jsonl", 10, 9, {"too_long": 1}),
        ("b.jsonl", 11, 9, {"missing_column": 1, "too_long": 1}),
    ]
    assert (summary["rows"], summary["kept"]) == (21, 18)
    assert summary["dropped"] == {"too_long": 2, "missing_column": 1}
    assert len(summary["findings"]) == 3


def test_rows_of_several_files_are_named_with_theirs(caplog: pytest.LogCaptureFixture) -> None:
    rows("a.jsonl", PAIRS[:9], [LONG])
    rows("b.jsonl", PAIRS[9:20], [LONG])
    with caplog.at_level(logging.WARNING, "preftune"):
        rendered(".", None)
    assert "2 more rows dropped: too_long 2 (rows a.jsonl:10, b.jsonl:12)" in [r.message for r in caplog.records]


@pytest.mark.parametrize("at_hand", [False, True])
def test_it_is_said_where_nothing_is_held_out(at_hand: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One argument that all others are compared with: they cannot be parted."""
    options = ScoredOptions()
    table = [{"prompt": "", "chosen": "the best", "rejected": f"worse {n}"} for n in range(200)]
    with caplog.at_level(logging.WARNING, "preftune"):
        data = read_data(table, options, [], "dpo")
        if at_hand:
            caplog.clear()
            data = from_groups(data.train, None, "dpo", options)
    assert (len(data.train[0].marks), data.held) == (200, [])
    assert [r.message.partition(":")[0] for r in caplog.records] == ["nothing is held out"]


def test_groups_at_hand_count_marks_and_the_responses_without_one() -> None:
    answers = tuple(Response(text, (Origin("mine", n + 1, "answer"),)) for n, text in enumerate([" a", " b", " x" * 99]))
    group = Group("Q:", answers, (Comparison(0, 1),))
    data = from_groups([group], [], "dpo", ScoredOptions())
    found = render_data(data, tiny.tokenizer(), max_length=LIMIT, too_long="drop", template=None)
    assert {k: found.summary[k] for k in ("rows", "kept", "dropped")} == {"rows": 2, "kept": 1, "dropped": {"too_long": 1}}
    assert [(f["file"], f["row"], f["column"]) for f in found.summary["findings"]] == [("mine", 3, "answer")]
    held = [Group("R:", answers[1:], (Comparison(0, 1),))]
    with pytest.raises(Refusal, match="none of 1 rows of the held-out data"):
        data = from_groups([group], held, "dpo", ScoredOptions())
        render_data(data, tiny.tokenizer(), max_length=LIMIT, too_long="drop", template=None)


# -- the template that a run speaks stays with its model --------------------------------------------------------------------

JINJA = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ '[assistant] ' if add_generation_prompt }}"
CHATS = [
    {key: [{"role": role, "content": pair[key]}] for key, role in zip(pair, ("user", "assistant", "assistant"), strict=True)}
    for pair in PAIRS[:12]
]
TALK = [Message("user", "hi"), Message("assistant", "hello"), Message("user", "and?")]


@pytest.mark.parametrize(
    ("own", "template", "data", "expected"),
    [
        (None, "own.jinja", CHATS, "[user] hi\n[assistant] hello\n[user] and?\n[assistant] "),
        (JINJA.replace("[", "<"), "own.jinja", CHATS, "[user] hi\n[assistant] hello\n[user] and?\n[assistant] "),
        (JINJA, "plain", CHATS, "<s>\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"),
        (None, None, CHATS, "<s>\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"),
        (JINJA, None, CHATS, "[user] hi\n[assistant] hello\n[user] and?\n[assistant] "),
        (None, None, PAIRS[:12], None),
    ],
    ids=["file", "file instead of its own", "plain", "plain by default", "its own", "text"],
)
def test_the_saved_tokenizer_has_the_template_that_the_run_was_trained_with(
    own: str | None,
    template: str | None,
    data: list[dict[str, Any]],
    expected: str | None,
    short_answers: None,
    no_report: None,
) -> None:
    from transformers import AutoTokenizer

    from preftune.runs.train import train

    write_model(Path("m"), template=own, positions=128)
    Path("own.jinja").write_text(JINJA)
    keys = {"model": "m", "data": {"sources": rows("chats.jsonl", data), "template": template}, "steps": 1, "out": "run"}
    train(build(TrainKeys, keys))
    saved: Any = AutoTokenizer.from_pretrained("run/model")
    if expected is None:
        assert saved.chat_template is None
    else:
        turns = [m.as_dict() for m in TALK]
        assert saved.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
