"""Rows as public data sets and tools have them, column for column: what each becomes, and which format wins where two fit."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from preftune.data.faults import RowFault
from preftune.data.formats import FORMATS, KINDS, Example, Score, fitting, understand
from preftune.records import By, Comparison, Message, Ranking, Rating

Q = (Message("user", "q"),)
PERSON, MODEL = By(kind="person"), By(kind="model")


def turn(role: str, said: Any) -> dict[str, Any]:
    return {"role": role, "content": said}


def a(said: str) -> tuple[Message, ...]:
    return (Message("assistant", said),)


def taken(row: dict[str, Any], name: str = "") -> Example:
    formats = [FORMATS[name]] if name else fitting(row)
    assert len(formats) == 1, [f.name for f in formats]
    return understand(formats[0], row)


def asked(*said: str) -> list[dict[str, Any]]:
    return [turn("assistant" if n % 2 else "user", words) for n, words in enumerate(said)]


# Several answers

ULTRAFEEDBACK = {
    "source": "evol_instruct", "instruction": "q", "models": ["m1", "m2", "m3", "m4"], "correct_answers": ["None"],
    "completions": [
        {
            "model": f"m{n}", "principle": "honesty", "custom_system_prompt": "s", "response": said, "critique": "c",
            "annotations": {"helpfulness": {"Rating": "4", "Rationale": "r"}, "honesty": {"Rating": "N/A", "Rationale": ""}},
            "fine-grained_score": fine, "overall_score": overall,
        }
        for n, said, fine, overall in ((1, "w", 4.25, 7.0), (2, "x", 2.0, 8.0), (3, "y", 4.25, 5.0), (4, "z", 5.0, 5.0))
    ],
}  # fmt: skip
NECTAR = {
    "prompt": "\n\nHuman: q\n\nAssistant: r\n\nHuman: so\n\nAssistant: ", "turns": 2, "num_responses": 3, "source": ["a"],
    "answers": [{"answer": said, "model": "m", "rank": rank} for said, rank in (("x", 2.0), ("y", 1.0), ("z", 3.0))],
    "good_natured": True,
}  # fmt: skip
NEMO = {
    "context": asked("q"),
    "completions": [{"rank": rank, "completion": [turn("assistant", said)]} for rank, said in ((1, "x"), (0, "y"), (1, "z"))],
}
# format, row, prompt, answers, marks
RANKED: list[tuple[str, dict[str, Any], Any, list[Any], list[Any]]] = [
    ("ultrafeedback", ULTRAFEEDBACK, Q, [a("w"), a("x"), a("y"), a("z")], [Ranking(((3,), (0, 2), (1,)), by=MODEL)]),
    ("nectar", NECTAR, (*Q, Message("assistant", "r"), Message("user", "so")), [a("x"), a("y"), a("z")],
     [Ranking(((1,), (0,), (2,)), by=MODEL)]),
    ("nemo", NEMO, Q, [a("x"), a("y"), a("z")], [Ranking(((1,), (0, 2)))]),
    ("nemo", {**NEMO, "completions": NEMO["completions"][:2]}, Q, [a("x"), a("y")], [Comparison(0, 1, 0.0)]),
    ("distilabel", {"instruction": "q", "generations": ["x", "y"], "ratings": [3, 3.5], "model_name": "m"}, Q,
     [a("x"), a("y")], [Comparison(0, 1, 0.0, by=MODEL)]),
    ("rewardbench2", {"id": "1", "prompt": "q", "chosen": ["x", "y"], "rejected": ["z"], "num_correct": 2, "subset": "Ties"},
     Q, [a("x"), a("y"), a("z")], [Ranking(((0, 1), (2,)))]),
    ("helpsteer", {"prompt": "q\n<extra_id_1>Assistant\nr\n<extra_id_1>User\nso", "response": "x", "helpfulness": 3,
                   "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1},
     (*Q, Message("assistant", "r"), Message("user", "so")), [a("x")], [Score(0, 3.0)]),
    ("halos_scores", {"prompt_id": "0", "prompt": asked("q"), "output": asked("", "x")[1:], "reward": -1.5,
                      "type": "scalar_feedback"}, Q, [a("x")], [Score(0, -1.5)]),
    ("ranking", {"prompt": "q", "responses": ["x", "y", "z"], "ranking": [2, [0, 1]], "annotator": "w"}, "q",
     ["x", "y", "z"], [Ranking(((2,), (0, 1)), by=By("w"))]),
    ("ranking", {"prompt": "q", "responses": ["x", "y"], "ranking": [[1], [0]], "weight": 2}, "q", ["x", "y"],
     [Comparison(0, 1, 0.0, 2.0)]),
    ("ranking", {"prompt": "q", "responses": ["x", "y"], "ranking": [[0, 1]]}, "q", ["x", "y"], [Comparison(0, 1, 0.5)]),
    ("ranking", {"prompt": "q", "responses": ["x", "y"], "ranking": [0, 1], "preference": 0.75}, "q", ["x", "y"],
     [Comparison(0, 1, 0.75)]),
    ("ranking", {"prompt": "q", "responses": ["x", "y", "z"], "ranks": [3, 1, 1]}, "q", ["x", "y", "z"],
     [Ranking(((1, 2), (0,)))]),
    ("ranking", {"prompt": asked("q"), "responses": ["x", asked("q", "y")], "scores": [0.5, 2]}, Q, [a("x"), a("y")],
     [Comparison(0, 1, 0.0)]),
    ("responses", {"prompt": "q", "responses": ["x", "y"]}, "q", ["x", "y"], []),
]  # fmt: skip

# Pairs under other names

BINARISED = {
    "prompt": "q",
    "prompt_id": "i",
    "chosen": asked("q", "x"),
    "rejected": asked("q", "y"),
    "messages": asked("q", "x"),
}
PAIRS = [
    ("ultrafeedback_binarized", {**BINARISED, "score_chosen": 8.5, "score_rejected": 6.0}, Q, [By(strength=2.5)]),
    ("ultrafeedback_binarized", {**BINARISED, "chosen-rating": 4, "rejected-rating": 4}, Q, [By(strength=0.0)]),
    ("ultrafeedback_argilla", {"source": "s", "instruction": "q", "chosen_response": "x", "rejected_response": "y",
                               "chosen_avg_rating": 5.0, "rejected_avg_rating": 3.75}, Q, [By(strength=1.25)]),
    ("rewardbench", {"prompt": "q", "chosen": "x", "rejected": "y", "chosen_model": "m", "rejected_model": "n",
                     "subset": "alpacaeval-easy", "id": 0}, Q, [None]),
    ("question_pairs", {"system": "", "question": "q", "chosen": "x", "rejected": "y"}, Q, [None]),
    ("question_pairs", {"input": "q", "chosen": "x", "rejected": "y", "margin": 0.5}, Q, [By(strength=0.5)]),
    ("swift_pairs", {"messages": asked("q", "x"), "rejected_response": "y"}, Q, [None]),
    ("swift_pairs", {"messages": asked("q", "x"), "rejected_messages": asked("q", "y"), "margin": 2}, Q, [By(strength=2.0)]),
]  # fmt: skip

# Battles

ARENA = {
    "question_id": "f00", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "arena_user_1", "turn": 1,
    "anony": True,
    "conversation_a": asked("q", "x"), "conversation_b": asked("q", "y"), "language": "English", "tstamp": 1682351654.67,
}  # fmt: skip
BENCH = {**ARENA, "winner": "tie", "judge": ["gpt-4", "pair-v2"], "conversation_a": asked("q", "x", "r", "v"),
         "conversation_b": asked("q", "y", "r", "w")}  # fmt: skip
VOTED = By("arena_user_1", "person", "1682351654.67", "a")
ONE = ("[User Question]\nq\n\n[The Start of Assistant A's Answer]\nx\n[The End of Assistant A's Answer]\n\n"
       "[The Start of Assistant B's Answer]\ny\n[The End of Assistant B's Answer]")  # fmt: skip
REFERENCE = ONE.replace("q\n\n", "q\n\n[The Start of Reference Answer]\nright\n[The End of Reference Answer]\n\n", 1)
SIDE = ("<|The Start of Assistant {0}'s Conversation with User|>\n\n### User:\nq\n\n### Assistant {0}:\n{1}\n\n### User:\nr\n\n"
        "### Assistant {0}:\n{2}\n\n<|The End of Assistant {0}'s Conversation with User|>")  # fmt: skip
TWO = SIDE.format("A", "x", "v") + "\n\n\n" + SIDE.format("B", "y", "w")
JUDGED = {
    "question_id": 81, "model_1": "m", "model_2": "n", "g1_winner": "model_1", "g2_winner": "tie",
    "judge": ["gpt-4", "pair-v2"],
    "g1_user_prompt": ONE, "g1_judgment": "[[A]]", "g2_user_prompt": "", "g2_judgment": "[[C]]", "turn": 1, "tstamp": 1687.5,
}  # fmt: skip
GAMES = [(1.0, By("gpt-4/pair-v2", "model", "1687.5", "a", reason="[[A]]")),
         (0.5, By("gpt-4/pair-v2", "model", "1687.5", "b", reason="[[C]]"))]  # fmt: skip
KAGGLE = {"id": "1", "model_a": "m", "model_b": "n", "prompt": '["q"]', "response_a": '["x"]', "response_b": '["y"]',
          "winner_model_a": "0", "winner_model_b": "0", "winner_tie": "1"}  # fmt: skip
PANDA = {"idx": 0, "motivation_app": "m", "cmp_key": "k", "instruction": "q", "input": "", "response1": "x", "response2": "y",
         "annotator1": 1, "annotator2": 0, "annotator3": 2}  # fmt: skip
STEER2 = {"split": "train", "prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": -2,
          "preference_statement": "s", "preference_elaboration": "e", "three_most_similar_preferences": [],
          "all_preferences_unprocessed": [{"strength": n, "justification": "j"} for n in (-3, 1, -100)]}  # fmt: skip
STEER3 = {
    "domain": "general",
    "language": "english",
    "context": asked("q"),
    "response1": "x",
    "response2": "y",
    "overall_preference": 2,
    "individual_preference": [{"score": 3, "reasoning": "r"}, {"score": 0, "reasoning": ""}],
}
HALOS = {"prompt_id": 3, "prompt": asked("q"), "output_A": asked("", "x")[1:], "output_B": asked("", "y")[1:], "label": 1,
         "reward_A": 2.5, "reward_B": 1.0, "reward_difference": 1.5, "type": "pairwise_feedback"}  # fmt: skip
SHP = {"post_id": "p", "domain": "askculinary_train", "history": "q", "human_ref_A": "x", "human_ref_B": "y", "labels": 0,
       "score_A": 52, "score_B": 54, "score_ratio": 1.0384, "seconds_difference": 3.0}  # fmt: skip
EVAL = {"instruction": "q", "output_1": "x", "generator_1": "g", "output_2": "y", "generator_2": "h", "dataset": "vicuna",
        "annotator": "weighted_alpaca_eval_gpt4_turbo", "preference": 1.25}  # fmt: skip
NEITHER = By(kind="person", reason="j")
# format, row, (preference, by) of each mark
BATTLES: list[tuple[str, dict[str, Any], list[tuple[float, By | None]]]] = [
    ("shp", SHP, [(0.0, By(kind="person", strength=1.0384))]),
    ("halos_pairs", HALOS, [(1.0, By(strength=1.5))]),
    ("halos_pairs", {**HALOS, "label": 0, "reward_B": 2.5, "reward_difference": 0}, [(0.5, By(strength=0.0))]),
    ("helpsteer2", STEER2, [(1.0, By(kind="person", strength=3.0, reason="j")),
                            (0.0, By(kind="person", strength=1.0, reason="j")), (0.5, NEITHER)]),
    ("helpsteer2", {**STEER2, "all_preferences_unprocessed": []}, [(1.0, By(kind="person", strength=2.0))]),
    ("helpsteer3", STEER3, [(0.0, By(kind="person", strength=3.0, reason="r")), (0.5, By(kind="person", strength=0.0))]),
    ("arena", ARENA, [(0.0, VOTED)]),
    ("arena", {**ARENA, "winner": "tie (bothbad)"}, [(0.5, replace(VOTED, reason="both bad"))]),
    ("arena", BENCH, [(0.5, By("gpt-4/pair-v2", "model", "1682351654.67", "a"))]),
    ("arena_55k", KAGGLE, [(0.5, By(kind="person", side="a"))]),
    ("mt_bench", JUDGED, GAMES),
    ("mt_bench", {**JUDGED, "g1_user_prompt": REFERENCE}, GAMES),
    ("mt_bench", {**JUDGED, "g2_winner": "error"}, GAMES[:1]),
    ("alpaca_eval", EVAL, [(0.75, By("weighted_alpaca_eval_gpt4_turbo", "model"))]),
    ("alpaca_eval", {**EVAL, "preference": 0, "annotator": None}, [(0.5, None)]),
    ("alpaca_eval", {**EVAL, "preference": 2, "annotator": 14}, [(0.0, By("14"))]),
    ("llmbar", {"input": "q", "output_1": "x", "output_2": "y", "label": 2}, [(0.0, None)]),
    ("pandalm", PANDA, [(p, By(f"annotator{n}", "person")) for n, p in enumerate((1.0, 0.5, 0.0), start=1)]),
    ("pandalm", {**PANDA, "annotator2": None}, [(1.0, By("annotator1", "person")), (0.0, By("annotator3", "person"))]),
]  # fmt: skip

# Labelling tools

VALUES = [{"rank": 1, "value": "response-2"}, {"rank": 2, "value": "response-1"}]
TEXTS = {"prompt": "q", "response_1": "x", "response_2": "y"}
FEEDBACK = {
    **TEXTS, "metadata": "{}", "external_id": None, "comment-suggestion": None,
    "preference": [{"user_id": "u1", "value": VALUES, "status": "submitted"},
                   {"user_id": "u2", "value": VALUES, "status": "discarded"}],
    "comment": [{"user_id": "u1", "value": "well", "status": "submitted"}],
}  # fmt: skip
COLUMNS = {
    "preference": {
        "user_id": ["u1"],
        "value": [{"rank": [2, 1], "value": ["response_1", "response_2"]}],
        "status": ["submitted"],
    }
}
RECORD = {**TEXTS, "id": "r1", "status": "completed", "better.responses": ["response_1", "tie"],
          "better.responses.users": ["u1", "u2"],
          "better.responses.status": ["submitted", "submitted"], "better.suggestion": "response_2"}  # fmt: skip
NESTED = {
    "id": "r1",
    "fields": TEXTS,
    "metadata": {},
    "suggestions": {},
    "vectors": {},
    "responses": {"better": [{"value": "response_1", "user_id": "u1"}, {"value": "response_2", "user_id": "u3"}]},
}
TASK = {"id": 1, "data": {"prompt": "q", "answer1": "x", "answer2": "y"}, "predictions": [], "annotations": [
    {"id": 5, "completed_by": {"id": 3, "email": "ann@lab"}, "was_cancelled": False, "created_at": "2024-05-01T10:00:00Z",
     "result": [{"from_name": "comparison", "to_name": "answer1,answer2", "type": "pairwise", "value": {"selected": "right"}}]},
    {"id": 6, "completed_by": 4, "was_cancelled": True, "result": []},
]}  # fmt: skip
LABELLED: list[tuple[str, dict[str, Any], list[tuple[float, By | None]]]] = [
    ("argilla_v1", FEEDBACK, [(0.0, By("u1", "person"))]),
    ("argilla_v1", {**TEXTS, **COLUMNS}, [(0.0, By("u1", "person"))]),
    ("argilla", RECORD, [(1.0, By("u1", "person")), (0.5, By("u2", "person"))]),
    ("argilla", {**RECORD, "better.responses": [["response_2", "response_1"]], "better.responses.users": ["u1"]},
     [(0.0, By("u1", "person"))]),
    ("argilla", {**RECORD, "better.responses.status": ["discarded", "draft"]}, [(0.0, MODEL)]),
    ("argilla", {"quality.responses": [2], "note.responses": ["[sic"], "quality.responses.users": ["u1"], **RECORD},
     [(1.0, By("u1", "person")), (0.5, By("u2", "person"))]),
    ("argilla_json", NESTED, [(1.0, By("u1", "person")), (0.0, By("u3", "person"))]),
    ("label_studio", TASK, [(0.0, By("ann@lab", "person", "2024-05-01T10:00:00Z", "a"))]),
    ("votes", {"item": "i", "annotator": "w1", "choice": "B", "prompt": "q", "response_a": "x", "response_b": "y",
               "side": "left", "time": 3.5}, [(0.0, By("w1", time="3.5", side="a"))]),
    ("votes", {"item": "i", "annotator": "w1", "choice": "neither", "response_a": "x", "response_b": "y"},
     [(0.5, By("w1", reason="both bad"))]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "prompt", "answers", "marks"), RANKED)
def test_ranked(name: str, row: dict[str, Any], prompt: Any, answers: list[Any], marks: list[Any]) -> None:
    example = taken(row)
    assert [f.name for f in fitting(row)] == [name]
    assert (example.prompt, [content for content, _ in example.answers]) == (prompt, answers)
    assert [*example.marks] == marks
    assert not example.notes


@pytest.mark.parametrize(("name", "row", "prompt", "by"), PAIRS)
def test_pairs(name: str, row: dict[str, Any], prompt: Any, by: list[By | None]) -> None:
    example = taken(row)
    assert [f.name for f in fitting(row)] == [name]
    assert (example.prompt, [content for content, _ in example.answers]) == (prompt, [a("x"), a("y")])
    assert [*example.marks] == [Comparison(0, 1, by=each) for each in by]


def test_a_strength_is_of_the_judgement() -> None:
    """Where the label is for the rejected answer, so is the difference of the scores."""
    for preference, strength in ((0.75, 2.5), (0.25, -2.5)):
        example = taken({**BINARISED, "score_chosen": 8.5, "score_rejected": 6.0, "preference": preference})
        assert [*example.marks] == [Comparison(0, 1, preference, by=By(strength=strength))]


@pytest.mark.parametrize(("name", "row", "verdicts"), [*BATTLES, *LABELLED])
def test_verdicts(name: str, row: dict[str, Any], verdicts: list[tuple[float, By | None]]) -> None:
    example = taken(row)
    assert [f.name for f in fitting(row)] == [name]
    texts = ["".join(m.content for m in said) if isinstance(said, tuple) else said for said, _ in example.answers]
    assert texts == ["x", "y"]
    assert example.prompt in (Q, "q", "")
    assert [*example.marks] == [Comparison(0, 1, preference, by=by) for preference, by in verdicts]


def test_conversations_part_where_the_answers_do() -> None:
    """All that both sides share is the prompt; of MT-Bench's second turn the answer is the rest of the conversation."""
    second = taken({**BENCH, "turn": 2})
    assert second.prompt == Q
    assert [content for content, _ in second.answers] == [
        (*a("x"), Message("user", "r"), *a("v")),
        (*a("y"), Message("user", "r"), *a("w")),
    ]
    shared = taken({**BENCH, "turn": 2, "conversation_b": asked("q", "x", "r", "w")})
    assert (len(shared.prompt or ()), [content for content, _ in shared.answers]) == (3, [a("v"), a("w")])
    judged = taken({**JUDGED, "g1_user_prompt": TWO})
    assert (judged.prompt, [content for content, _ in judged.answers]) == (Q, [content for content, _ in second.answers])


def test_formats_that_are_only_named() -> None:
    by_overall = taken(ULTRAFEEDBACK, "ultrafeedback_overall")
    assert by_overall.marks[0] == Ranking(((1,), (0,), (2, 3)), by=MODEL)
    assert [*taken(STEER2, "helpsteer2_overall").marks] == [Comparison(0, 1, by=By(kind="person", strength=2.0))]
    assert [*taken(STEER3, "helpsteer3_overall").marks] == [Comparison(0, 1, 0.0, by=By(kind="person", strength=2.0))]
    scored = {"prompt": "q", "completion": "x", "score": "0.5"}
    assert (taken(scored).marks[0], taken(scored, "scores").marks[0]) != (None, None)
    assert taken(scored, "scores").marks[0] == Score(0, 0.5)


def test_ratings_carry_a_reward() -> None:
    row = {
        "prompt_id": 1,
        "prompt": asked("q"),
        "output": asked("", "x")[1:],
        "label": 0,
        "reward": 1.5,
        "type": "binary_feedback",
    }
    assert [f.name for f in fitting(row)] == ["halos_ratings"]
    assert taken(row).marks[0] == Rating(0, False, by=By(strength=1.5))


def test_what_is_left_out_of_a_row_is_noted() -> None:
    rated = [*ULTRAFEEDBACK["completions"]]
    rated[0] = {**rated[0], "response": " "}
    rated[1] = {**rated[1], "fine-grained_score": None, "annotations": {}, "overall_score": None}
    example = taken({**ULTRAFEEDBACK, "completions": rated})
    assert [(note.code, note.column) for note in example.notes] == [
        ("no_judgement", "completions 2"),
        ("empty_answer", "completions 1"),
    ]
    assert [*example.marks] == [Comparison(0, 1, 0.0, by=MODEL)]
    same = taken({"prompt": "q", "responses": ["x", "y", "x"], "scores": [1, 2, 5]})
    assert [(note.code, note.column) for note in same.notes] == [("identical_answers", "responses 3")]
    assert (len(same.answers), *same.marks) == (2, Comparison(0, 1, 1.0)), "the mean of 1 and 5 is more than 2"


FAULTS = [
    ("no_judgement", "completions", {**ULTRAFEEDBACK, "completions": ULTRAFEEDBACK["completions"][:1]}),
    ("missing_value", "completions 1", {**ULTRAFEEDBACK, "completions": [{"response": None}]}),
    ("wrong_type", "answers 1", {**NECTAR, "answers": [{"answer": "x", "rank": None}, {"answer": "y", "rank": 1}]}),
    ("bad_value", "prompt", {**NECTAR, "prompt": "q"}),
    ("identical_answers", "responses 2", {"prompt": "q", "responses": ["x", "x"], "ranking": [0, 1]}),
    ("bad_value", "ranking", {"prompt": "q", "responses": ["x", "y"], "ranking": [0, 2]}),
    ("bad_value", "ranking", {"prompt": "q", "responses": ["x", "y"], "ranking": [0]}),
    ("wrong_type", "scores", {"prompt": "q", "responses": ["x", "y"], "scores": [1]}),
    ("empty_answer", "responses 1", {"prompt": "q", "responses": ["", "y"]}),
    ("prompts_differ", "completions 2",
     {**NEMO, "completions": [NEMO["completions"][0], {"rank": 1, "completion": asked("o", "y")}]}),
    ("wrong_type", "response1", {**PANDA, "response1": True}),
    ("bad_value", "annotator2", {**PANDA, "annotator2": 3}),
    ("bad_value", "label", {"input": "q", "output_1": "x", "output_2": "y", "label": 0}),
    ("bad_value", "labels", {**SHP, "labels": 2}),
    ("bad_value", "preference", {**EVAL, "preference": 3}),
    ("bad_value", "preference", {**EVAL, "preference": float("nan")}),
    ("bad_value", "overall_preference", {**STEER3, "individual_preference": None, "overall_preference": 4}),
    ("bad_value", "winner", {**ARENA, "winner": "gpt-4"}),
    ("identical_answers", "conversation_b", {**ARENA, "conversation_b": asked("q", "x")}),
    ("prompts_differ", "conversation_b", {**ARENA, "conversation_b": asked("o", "y")}),
    ("bad_value", "winner_tie", {**KAGGLE, "winner_model_a": "1"}),
    ("bad_value", "response_b", {**KAGGLE, "response_b": '["y", "z"]'}),
    ("wrong_type", "response_b", {**KAGGLE, "response_b": "[null]"}),
    ("no_judgement", None, {**JUDGED, "g1_winner": "error", "g2_winner": "error"}),
    ("bad_value", "g1_user_prompt", {**JUDGED, "g1_user_prompt": "which is better?"}),
    ("no_judgement", None, {**FEEDBACK, "preference": FEEDBACK["preference"][1:]}),
    ("missing_column", "prompt", {**FEEDBACK, "prompt": None}),
    ("missing_column", None, {k: v for k, v in RECORD.items() if k != "response_2"}),
    ("no_judgement", None, {**TASK, "annotations": TASK["annotations"][1:]}),
    ("bad_value", "choice", {"item": "i", "annotator": "w", "choice": "0", "response_a": "x", "response_b": "y"}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "column", "row"), FAULTS)
def test_faults(code: str, column: str | None, row: dict[str, Any]) -> None:
    with pytest.raises(RowFault) as caught:
        taken(row)
    assert (caught.value.code, caught.value.column) == (code, column)
    assert "\n" not in caught.value.message


# Which format it is

CLEAR = [
    ({"prompt": "q", "chosen": "x", "rejected": "y", "instruction": "q", "input": "q"}, ["pairs"]),
    ({"instruction": "q", "input": "i", "output": "x"}, ["alpaca"]),
    ({"instruction": "q", "input": "i", "chosen": "x", "rejected": "y"}, ["alpaca_pairs"]),
    ({"prompt": "q", "response": "x", "label": True, "score": 3}, ["ratings"]),
    ({"messages": asked("q", "x"), "rejected_response": "y", "label": True}, ["swift_pairs"]),
    ({**BINARISED, "instruction": "q", "generations": ["x", "y"], "ratings": [1, 2]}, ["pairs"]),
    ({**TEXTS, "chosen": "x", "rejected": "y", **COLUMNS}, ["argilla_v1"]),
    ({"prompt": "q", "conversations": [], "chosen": "x", "rejected": "y"}, ["pairs", "llamafactory_pairs"]),
    ({**ARENA, "prompt": "q", "chosen": "x", "rejected": "y"}, ["pairs", "arena"]),
    ({"messages": asked("q", "x"), "text": "t"}, ["conversations", "text"]),
]


@pytest.mark.parametrize(("row", "names"), CLEAR)
def test_which_wins(row: dict[str, Any], names: list[str]) -> None:
    assert [format.name for format in fitting(row)] == names


def test_no_two_formats_beat_each_other_and_every_one_can_be_found() -> None:
    """For any two formats: at most one wins, whatever columns are there; each wins where its own columns stand alone."""
    for one, other in itertools.combinations(FORMATS.values(), 2):
        both = [name for f in (one, other) for need in f.needs for name in ([need] if isinstance(need, str) else need)]
        assert not (one.beats(other, both) and other.beats(one, both)), (one.name, other.name)
    for format in FORMATS.values():
        assert all(name in FORMATS for name in format.over)
        assert format.kind in KINDS
        rivals = [
            f for f in FORMATS.values() if f is not format and f.automatic and f.needs == format.needs and f.kind == format.kind
        ]
        assert not format.automatic or format.where or not [f for f in rivals if not f.where]


def test_old_exports_keep_lists_as_one_object() -> None:
    columns = {key: [c[key] for c in ULTRAFEEDBACK["completions"]] for key in ("response", "fine-grained_score")}
    assert taken({**ULTRAFEEDBACK, "completions": columns}).marks == taken(ULTRAFEEDBACK).marks
    as_text = {**NEMO, "completions": json.dumps(NEMO["completions"])}
    assert understand(FORMATS["nemo"], as_text).marks == taken(NEMO).marks
