"""Which tokens of a response are scored: one rule for text and chat."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import answers, pair, turns

from preftune.data import render as rendering
from preftune.data.render import Batch, render, render_prompts
from preftune.data.template import apply_template
from preftune.errors import Refusal
from preftune.records import Comparison, Group, Message, Origin, Response

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BARE = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant> {% endif %}"
TWO_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|></s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFUSES = "{% if messages[0].role != 'user' %}{{ raise_exception('starts with the user') }}{% endif %}" + CHATML


def scored(batch: Batch, tok: Any, n: int = 0) -> str:
    """The scored tokens as text, special ones included."""
    s = batch.sequences[n]
    ids = [i for k, i in enumerate(s.ids[s.start :]) if s.mask is None or s.mask[k]]
    assert len(ids) == s.length
    return tok.decode(ids)


def before(batch: Batch, tok: Any, n: int = 0) -> str:
    return tok.decode(list(batch.sequences[n].ids[: batch.sequences[n].start]))


# -- plain text -----------------------------------------------------------------------------------------------------------


def test_text_has_the_start_token_the_joined_text_and_one_end_token(tokenizer: Any) -> None:
    batch = render([pair("Q: ", "yes", "no")], tokenizer)
    yes, no = batch.sequences
    assert list(yes.ids) == [*tokenizer("Q: yes").input_ids, tokenizer.eos_token_id]
    assert yes.ids[0] == tokenizer.bos_token_id and yes.ids.count(tokenizer.bos_token_id) == 1
    assert (yes.start, yes.length, no.start, no.length) == (4, 4, 4, 3)
    assert (scored(batch, tokenizer), before(batch, tokenizer)) == ("yes</s>", "<s>Q: ")


@pytest.mark.parametrize("answer", ["yes", "yes</s>"])
def test_the_end_token_stands_once(tokenizer: Any, answer: str) -> None:
    batch = render([Group("Q: ", answers("Q: ", answer))], tokenizer)
    assert scored(batch, tokenizer) == "yes</s>"


def test_without_an_end_token_none_is_scored() -> None:
    tok = tiny.tokenizer(end=False)
    assert scored(render([pair("Q: ", "yes", "no")], tok), tok) == "yes"


def test_a_straddling_token_belongs_to_every_response_of_its_group(tokenizer: Any) -> None:
    """ "xa" + "bc" is x, abc: the prompt's last token is gone in one of two answers, so both spans start before it."""
    batch = render([pair("xa", "bc", "zz")], tokenizer)
    straddling, plain = batch.sequences
    assert (straddling.start, plain.start) == (2, 2)
    assert (straddling.length, plain.length) == (2, 4)
    assert (scored(batch, tokenizer, 0), scored(batch, tokenizer, 1)) == ("abc</s>", "azz</s>")
    alone = render([pair("xa", "zy", "zz")], tokenizer)
    assert [s.start for s in alone.sequences] == [3, 3]


@pytest.mark.parametrize(
    ("start", "first", "said"), [(True, "<s>", 0), ("unused", "<s>", 0), (False, "</s>", 1)], ids=["written", "unused", "none"]
)
def test_an_empty_prompt_starts_with_the_start_token_else_the_end_token(
    start: bool | str, first: str, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    tok = tiny.tokenizer(start=start)
    with caplog.at_level(logging.WARNING, "preftune"):
        batch = render([pair("", "yes", "no"), pair("", "one", "two")], tok)
    for n, text in enumerate(["yes", "no", "one", "two"]):
        assert (before(batch, tok, n), scored(batch, tok, n)) == (first, text + "</s>")
    assert len([r for r in caplog.records if "the end token stands first" in r.message]) == said


def test_a_prompt_that_melts_into_the_answer_leaves_the_whole_text_scored() -> None:
    tok = tiny.tokenizer(start=False)
    batch = render([pair("a", "bc", "zz")], tok)
    assert [(before(batch, tok, n), scored(batch, tok, n)) for n in (0, 1)] == [("</s>", "abc</s>"), ("</s>", "azz</s>")]


# -- chat -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        (CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "the cat<|im_end|>"),
        (
            LLAMA3,
            "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "the cat<|eot_id|>",
        ),
        (BARE, "user> hi\nassistant> ", "the cat</s>"),
        (TWO_ENDS, "<|im_start|>user\nhi<|im_end|></s><|im_start|>assistant\n", "the cat<|im_end|>"),
    ],
    ids=["chatml", "llama3", "no end marker", "two end tokens"],
)
def test_the_turn_ends_with_one_end_token_and_nothing_after_it_is_scored(template: str, prompt: str, response: str) -> None:
    tok = tiny.tokenizer(template=template)
    batch = render([pair(turns("hi"), turns("the cat", first="assistant"), turns("no", first="assistant"))], tok)
    assert (before(batch, tok), scored(batch, tok)) == (prompt, response)
    assert batch.sequences[0].start == batch.sequences[1].start


def test_blank_lines_at_the_end_of_an_answer_are_scored_before_its_end_token() -> None:
    tok = tiny.tokenizer(template=CHATML)
    batch = render([pair(turns("hi"), turns("so\n\n", first="assistant"), turns("no", first="assistant"))], tok)
    assert scored(batch, tok) == "so\n\n<|im_end|>"


def test_messages_without_a_template_read_as_hh_dialogue(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    said = "the tokenizer has no chat template: messages are rendered with data.template=plain"
    chat = pair(turns("hi", "hello", "and?"), turns("yes", first="assistant"), turns("no", first="assistant"))
    text = pair("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:", " yes", " no")
    with caplog.at_level(logging.WARNING, "preftune"):
        plain = render([chat, chat], tokenizer)
    assert [r.message for r in caplog.records] == [said]
    as_text = render([text], tokenizer)
    for n in (0, 1):
        assert (plain.sequences[n].ids, plain.sequences[n].start) == (as_text.sequences[n].ids, as_text.sequences[n].start)
    assert scored(plain, tokenizer) == " yes</s>"
    caplog.clear()
    asked = render([chat], tiny.tokenizer(template=CHATML), template="plain")
    assert asked.sequences[0].ids == as_text.sequences[0].ids and not caplog.records


TALKS = [
    pair(turns("hi"), turns("yes", first="assistant"), turns("no", first="assistant")),
    pair(turns("hi", "hello", "and?\n"), turns("so\n\n", first="assistant"), turns(" the  cat ", first="assistant")),
    pair((Message("system", "Be brief."), *turns("abc")), turns("{{ x }}", first="assistant"), turns("é", first="assistant")),
    pair(
        turns("hi"),
        (Message("assistant", "call"), Message("tool", "42"), Message("assistant", "done")),
        turns("no", first="assistant"),
    ),
]


@pytest.mark.parametrize("start", [True, False, "unused"])
@pytest.mark.parametrize("end", [True, False])
def test_the_plain_form_is_the_template_that_a_run_leaves_behind(start: bool | str, end: bool) -> None:
    """What transformers writes with it, and what is trained and sampled here, are the same tokens."""
    tok = tiny.tokenizer(start=start, end=end)
    asked, unasked = render(TALKS, tok, template="plain"), render(TALKS, tok)
    prompts = render_prompts(TALKS, tok, template="plain")
    apply_template(tok, "plain")
    assert render(TALKS, tok) == unasked == asked and render_prompts(TALKS, tok) == prompts
    for s in asked.sequences:
        group = asked.groups[s.group]
        assert not isinstance(group.prompt, str)
        turns_, answer = [m.as_dict() for m in group.prompt], group.responses[s.response].content
        ready = tok.apply_chat_template(turns_, add_generation_prompt=True)["input_ids"]
        whole = tok.apply_chat_template([*turns_, *(m.as_dict() for m in answer if isinstance(m, Message))])["input_ids"]
        assert tuple(ready) == prompts[s.group] == s.ids[: s.start]
        assert tuple(whole) == s.ids or (not end and tok.decode(whole).rstrip() == tok.decode(list(s.ids)))


def test_apply_template_leaves_a_tokenizer_of_its_own_mind_alone(caplog: pytest.LogCaptureFixture) -> None:
    own, none = tiny.tokenizer(template=CHATML), tiny.tokenizer()
    with caplog.at_level(logging.WARNING, "preftune"):
        apply_template(own, None, TALKS)
        apply_template(none, None, [pair("Q: ", "yes", "no")])
    assert (own.chat_template, none.chat_template, caplog.records) == (CHATML, None, [])


def test_a_template_that_is_not_there_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Refusal, match=r"gone.jinja cannot be read") as refused:
        render(TALKS, tokenizer, template="gone.jinja")
    assert refused.value.code == "bad_template"


def test_what_is_said_of_a_tokenizer_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A run renders training data, held-out data and prompts; each line is about its tokenizer."""
    chat, text = TALKS[0], pair("", "yes", "no")
    with caplog.at_level(logging.WARNING, "preftune"):
        for tok in (tiny.tokenizer(start=False), tiny.tokenizer(start=False)):
            apply_template(tok, None, [text])
            for _ in range(2):
                render([chat, text], tok)
                render_prompts([chat, text, chat], tok)
    assert len(caplog.records) == 4 and len({r.message for r in caplog.records}) == 2, "one each for two tokenizers"


def test_a_template_file_takes_the_place_of_the_tokenizers_own(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(LLAMA3)
    tok = tiny.tokenizer(template=CHATML)
    batch = render(
        [pair(turns("hi"), turns("yes", first="assistant"), turns("no", first="assistant"))],
        tok,
        template=str(tmp_path / "own.jinja"),
    )
    assert scored(batch, tok) == "yes<|eot_id|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, "call<|im_end|>done<|im_end|>"), (LLAMA3, "call<|eot_id|>done<|eot_id|>"), ("plain", " call done</s>")],
    ids=["chatml", "llama3", "plain"],
)
def test_of_several_messages_only_the_assistants_own_turns_are_scored(template: str, expected: str) -> None:
    answer = (Message("assistant", "call"), Message("tool", "42"), Message("assistant", "done"))
    group = pair(turns("hi"), answer, turns("no", first="assistant"))
    if template == "plain":
        tok, batch = tiny.tokenizer(), render([group], tiny.tokenizer(), template="plain")
    else:
        tok = tiny.tokenizer(template=template)
        batch = render([group], tok)
    assert scored(batch, tok) == expected
    assert "42" in tok.decode(list(batch.sequences[0].ids))


def test_what_a_template_refuses_becomes_a_finding_and_the_rest_goes_on() -> None:
    tok = tiny.tokenizer(template=REFUSES)
    good = pair(turns("hi"), turns("yes", first="assistant"), turns("no", first="assistant"), row=2)
    bad = pair(turns("hi", first="assistant"), turns("yes", first="assistant"), turns("no", first="assistant"), row=1)
    batch = render([bad, good], tok)
    assert batch.groups == (good,) and len(batch) == 2
    assert [(f.code, f.severity, f.file, f.row) for f in batch.findings] == [("template_error", "error", "pairs.jsonl", 1)]
    assert "starts with the user" in batch.findings[0].message
    with pytest.raises(Refusal, match="refuses prompt 2: starts with the user"):
        render_prompts([good, bad], tok)
    assert [f.code for f in render([Group(bad.prompt)], tok).findings] == ["template_error"], "a prompt alone counts too"


def test_a_response_that_the_template_refuses_takes_its_own_marks_with_it() -> None:
    tok = tiny.tokenizer(template="{% if messages[-1].content == 'no' %}{{ raise_exception('not so') }}{% endif %}" + CHATML)
    yes, no, well = (turns(word, first="assistant") for word in ("yes", "no", "well"))
    marks = tuple(Comparison(a, b, origin=Origin("pairs.jsonl", 1, "answer 0")) for a, b in ((0, 1), (0, 2)))
    batch = render([Group(turns("hi"), answers(turns("hi"), yes, no, well), marks)], tok)
    assert [(f.code, f.column) for f in batch.findings] == [("template_error", "answer 1")]
    assert [m.responses for m in batch.groups[0].marks] == [(0, 1)]
    assert [scored(batch, tok, n) for n in (0, 1)] == ["yes<|im_end|>", "well<|im_end|>"]


@pytest.mark.parametrize("template", [None, "plain", CHATML, LLAMA3, BARE, TWO_ENDS])
def test_an_unfinished_response_has_no_end_token(template: str | None) -> None:
    tok = tiny.tokenizer(template=None if template == "plain" else template)
    prompt, text = ("Q: ", "the cat") if template is None else (turns("hi"), turns("the cat", first="assistant"))
    batch = render([Group(prompt, (Response(text, finished=False),))], tok, template="plain" if template == "plain" else None)
    assert scored(batch, tok) == (" the cat" if template == "plain" else "the cat")


def test_prompts_are_rendered_ready_to_be_continued(tokenizer: Any) -> None:
    tok = tiny.tokenizer(template=CHATML)
    text, empty = pair("Q: ", "yes", "no"), pair("", "yes", "no")
    chat = pair(turns("hi"), turns("yes", first="assistant"), turns("no", first="assistant"))
    assert [tokenizer.decode(list(ids)) for ids in render_prompts([text, empty], tokenizer)] == ["<s>Q: ", "<s>"]
    assert [tok.decode(list(ids)) for ids in render_prompts([chat], tok)] == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ]
    assert render_prompts([empty], tiny.tokenizer(start=False)) == [(tokenizer.eos_token_id,)]


# -- length and drops -----------------------------------------------------------------------------------------------------

LONG = Group(
    "Q: ",
    answers("Q: ", "ok", "no", "x" * 20),
    (Comparison(0, 2, origin=None), Comparison(0, 1, origin=None)),
)


def with_rows(group: Group) -> Group:
    first = group.responses[0].origins[0]
    return replace(group, marks=tuple(replace(m, origin=replace(first, row=n + 1)) for n, m in enumerate(group.marks)))


def test_too_long_drop_takes_the_marks_that_need_it_and_counts_them(tokenizer: Any) -> None:
    batch = render([with_rows(LONG)], tokenizer, max_length=10)
    assert [(f.code, f.row) for f in batch.findings] == [("too_long", 1)]
    (group,) = batch.groups
    assert [r.content for r in group.responses] == ["ok", "no"]
    assert [(m.a, m.b) for m in group.marks if isinstance(m, Comparison)] == [(0, 1)]
    assert [s.length for s in batch.sequences] == [3, 3]


@pytest.mark.parametrize(
    ("chosen", "rejected", "column", "message"),
    [
        ("x" * 9, "no", "answer 0", "14 tokens, over max_length 10"),
        ("no", "x" * 9, "answer 1", "14 tokens, over max_length 10"),
        ("x" * 9, "y" * 8, "answer 0, answer 1", "14 tokens, over max_length 10; 13 tokens, over max_length 10"),
    ],
)
def test_too_long_names_the_column_that_is(tokenizer: Any, chosen: str, rejected: str, column: str, message: str) -> None:
    (found,) = render([pair("Q: ", chosen, rejected, row=3)], tokenizer, max_length=10).findings
    assert (found.file, found.row, found.column, found.message) == ("pairs.jsonl", 3, column, message)


@pytest.mark.parametrize("too_long", ["drop", "truncate_prompt_start"])
def test_a_response_too_long_that_no_mark_needs_is_named_too(tokenizer: Any, too_long: Any) -> None:
    marked = replace(LONG, marks=LONG.marks[1:])
    for group, left in (
        (marked, ["ok", "no"]),
        (replace(LONG, marks=()), ["ok", "no"]),
        (Group("Q: ", LONG.responses[2:]), []),
    ):
        batch = render([group], tokenizer, max_length=8, too_long=too_long)
        assert [(f.code, f.file, f.row, f.column) for f in batch.findings][-1:] == [
            ("too_long", "pairs.jsonl", 1, group.responses[-1].origins[0].column)
        ]
        assert len(batch.findings) == 1
        assert [r.content for g in batch.groups for r in g.responses] == left
        assert len(batch.sequences) == len(left)


def test_exactly_max_length_is_kept_and_one_more_is_not(tokenizer: Any) -> None:
    group = pair("Q: ", "123", "12")  # start, Q, colon, space, 3, end: 8 tokens
    assert len(render([group], tokenizer, max_length=8)) == 2
    assert len(render([group], tokenizer, max_length=7)) == 0


def test_too_long_truncate_response_leaves_no_end_token(tokenizer: Any) -> None:
    batch = render([with_rows(LONG)], tokenizer, max_length=10, too_long="truncate_response")
    assert not batch.findings and len(batch) == 3
    assert (scored(batch, tokenizer, 0), scored(batch, tokenizer, 2)) == ("ok</s>", "x" * 6)
    assert len(batch.sequences[2].ids) == 10


def test_truncation_cuts_the_mask_with_the_tokens() -> None:
    tok = tiny.tokenizer(template=CHATML)
    answer = (Message("assistant", "call"), Message("tool", "42"), Message("assistant", "x" * 40))
    group = pair(turns("hi"), answer, turns("no", first="assistant"))
    batch = render([group], tok, max_length=60, too_long="truncate_response")
    s = batch.sequences[0]
    assert len(s.ids) == 60 and s.mask is not None and len(s.mask) == 60 - s.start
    assert scored(batch, tok).startswith("call<|im_end|>xx") and scored(batch, tok).endswith("x")


@pytest.mark.parametrize("start", [True, False])
def test_too_long_truncate_prompt_start_cuts_one_shared_prompt_and_keeps_the_start_token(start: bool) -> None:
    tok = tiny.tokenizer(start=start)
    batch = render([pair("0123456789", "yes", "n")], tok, max_length=9, too_long="truncate_prompt_start")
    prompt = "<s>6789" if start else "56789"
    assert [before(batch, tok, n) for n in (0, 1)] == [prompt, prompt]
    assert [scored(batch, tok, n) for n in (0, 1)] == ["yes</s>", "n</s>"]
    assert max(len(s.ids) for s in batch.sequences) == 9


def test_truncate_prompt_start_drops_an_answer_that_fills_the_length_alone(tokenizer: Any) -> None:
    batch = render([with_rows(LONG)], tokenizer, max_length=8, too_long="truncate_prompt_start")
    assert [f.code for f in batch.findings] == ["too_long"]
    assert [(before(batch, tokenizer, n), scored(batch, tokenizer, n)) for n in (0, 1)] == [
        ("<s>Q: ", "ok</s>"),
        ("<s>Q: ", "no</s>"),
    ]


def test_answers_with_the_same_tokens_are_dropped(tokenizer: Any) -> None:
    batch = render([pair("Q: ", "yes", "yes</s>", row=7)], tokenizer)
    assert [(f.code, f.row) for f in batch.findings] == [("identical_tokens", 7)]
    assert not batch.groups and not batch.sequences


def test_an_answer_without_a_token_is_a_finding_and_no_crash() -> None:
    tok = tiny.tokenizer(start=False, end=False)
    batch = render([pair("Q: ", "yes", "", row=3), pair("", "", "yes", row=4)], tok)
    assert [(f.code, f.row) for f in batch.findings] == [("empty_answer", 3), ("empty_answer", 4)]
    tok = tiny.tokenizer(start=False)
    assert [scored(render([pair("", "", "yes")], tok), tok, n) for n in (0, 1)] == ["</s>", "yes</s>"]


def test_sequences_stand_in_order_and_chunks_change_nothing(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = pair(turns("hi"), turns("yes", first="assistant"), turns("no", first="assistant"))
    groups = [*tiny.pairs(3), chat, pair("same", "x", "x</s>"), *tiny.pairs(2)]
    whole = render(groups, tokenizer)
    monkeypatch.setattr(rendering, "_CHUNK", 2)
    assert render(groups, tokenizer) == whole
    assert [(s.group, s.response) for s in whole.sequences] == [(g, r) for g in range(6) for r in range(2)]
    assert [whole.index(s.group, s.response) for s in whole.sequences] == list(range(12))


def test_a_turn_that_ends_in_the_end_token_is_continued_after_it() -> None:
    """Scoring and sampling see the same prompt: an end token that the template writes belongs to the turn."""
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer = tiny.tokenizer(template=template)
    group = tiny.pair(tiny.turns("hi"), tiny.turns("yes", first="assistant"), tiny.turns("no", first="assistant"))
    (prompt,) = render_prompts([group], tokenizer)
    scored = render([group], tokenizer).sequences[0]
    assert prompt == scored.ids[: scored.start] and prompt[-1] == tokenizer.eos_token_id


def test_the_plain_form_drops_what_it_has_no_words_for_and_says_so() -> None:
    call = {"tool_calls": [{"function": {"name": "look_up", "arguments": {}}}]}
    asked = tiny.turns("What is the time?")
    calls = tiny.pair(asked, (Message("assistant", "", call),), tiny.turns("no idea", first="assistant"), row=3)
    tools = replace(
        tiny.pair(asked, *(tiny.turns(t, first="assistant") for t in ("noon", "no")), row=4), tools=({"name": "x"},)
    )
    plain = tiny.pair(asked, *(tiny.turns(t, first="assistant") for t in ("noon", "no")), row=5)
    batch = render([calls, tools, plain], tiny.tokenizer())
    assert len(batch.groups) == 1 and len(batch) == 2
    assert {(f.row, f.code) for f in batch.findings} == {(3, "template_error"), (4, "template_error")}
    assert all("no words for tool" in f.message for f in batch.findings)
