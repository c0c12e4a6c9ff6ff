"""Two answers, A and B, and a verdict on them, or several: ties, strengths, who judged, and which side stood first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from preftune.data.dialogue import Turns, is_list, text, turns
from preftune.data.faults import RowFault
from preftune.data.formats.columns import (
    Row,
    as_number,
    as_text,
    asked,
    by_of,
    measured,
    objects,
    short,
    truth,
    unpacked,
    value,
)
from preftune.data.formats.example import Example, Format, Verdict, judged, two
from preftune.data.formats.pairs import alpaca_prompt
from preftune.data.formats.ranked import steered
from preftune.records import By, Content, Message

A, B, TIE = 1.0, 0.0, 0.5  # the probability that A is better
BAD = ("neither", "both_bad", "bothbad", "tie (bothbad)")
WORDS = {
    A: ("a", "1", "left", "first", "model_a", "model_1", "response_a", "answer_a"),
    B: ("b", "2", "right", "second", "model_b", "model_2", "response_b", "answer_b"),
    TIE: ("tie", "equal", "same", "draw", "both", "both_good", *BAD),
}
CHOICES = {word: preference for preference, words in WORDS.items() for word in words}
NUMBERED = {0: TIE, 1: A, 2: B}


def chosen(found: object, column: str) -> float:
    """The probability that A is better, from a word for one of the sides or for a tie."""
    word = _word(found)
    if word not in CHOICES:
        raise RowFault("bad_value", f"a, b or tie (or left, right, 1, 2) is expected, this is {short(found)}", column)
    return CHOICES[word]


def why(found: object) -> str:
    """A tie because both are bad is not the same as one because both are good."""
    return "both bad" if _word(found) in BAD else ""


def _word(found: object) -> str:
    return str(found).strip().lower().removesuffix(".0")


def _numbered(found: object, column: str) -> float:
    """1 or 2 for the side, 0 for a tie."""
    read = measured(found)
    if read not in NUMBERED:
        raise RowFault("bad_value", f"1, 2 or 0 for a tie is expected, this is {short(found)}", column)
    return NUMBERED[int(read)]


# SHP, HALOs, AlpacaEval, LLMBar, PandaLM


def _shp(row: Row) -> Example:
    verdict = (A if truth(row, "labels") else B), By(kind="person", strength=measured(row.get("score_ratio")))
    return judged(row, asked(row, "history"), ("human_ref_A", "human_ref_B"), [verdict])


def _halos(row: Row) -> Example:
    """Label 1: A got the higher reward; 0 says that it did not, which with equal rewards is a tie."""
    first, second = measured(row.get("reward_A")), measured(row.get("reward_B"))
    tied = first is not None and first == second
    by = By(strength=measured(row.get("reward_difference")), who=as_text(row.get("annotator")))
    preference = TIE if tied else A if truth(row, "label") else B
    return judged(row, asked(row, "prompt"), ("output_A", "output_B"), [(preference, by if by != By() else None)])


def _alpaca_eval(row: Row) -> Example:
    """From 1 (the first output is better) to 2 (the second is), numbers between for a judge that is not sure; 0 was a tie."""
    read = as_number(value(row, "preference"), "preference")
    if read != 0 and not 1 <= read <= 2:
        raise RowFault("bad_value", f"a preference from 1 to 2 is expected, this is {short(row['preference'])}", "preference")
    who = as_text(row.get("annotator"))
    by = By(who, kind="" if not who or who.isdigit() else "model", time=as_text(row.get("date")))
    verdict = (2 - read if read else TIE), by if by != By() else None
    return judged(row, alpaca_prompt(row), ("output_1", "output_2"), [verdict])


def _llmbar(row: Row) -> Example:
    if value(row, "label") in (0, "0"):
        raise RowFault("bad_value", "1 or 2 is expected, this is 0", "label")
    return judged(row, asked(row, "input"), ("output_1", "output_2"), [(_numbered(row["label"], "label"), by_of(row))])


def _pandalm(row: Row) -> Example:
    """One column for each annotator, of whom some may not have judged the row."""
    columns = [column for column in row if re.fullmatch(r"annotator\d+", column) and row[column] is not None]
    verdicts = [(_numbered(row[column], column), By(column, kind="person")) for column in columns]
    return judged(row, alpaca_prompt(row), ("response1", "response2"), verdicts)


# HelpSteer 2 and 3


def _steered(found: object, column: str, reason: str = "") -> Verdict:
    """From -3 (the first is much better) to 3 (the second is), 0 for a tie; -100: neither is any good."""
    read = as_number(found, column)
    if read == -100:
        return TIE, By(kind="person", reason=reason or "both bad")
    if not -3 <= read <= 3:
        raise RowFault("bad_value", f"a strength from -3 to 3 is expected, this is {short(found)}", column)
    return A if read < 0 else B if read > 0 else TIE, By(kind="person", strength=abs(read), reason=reason)


def _helpsteer2(row: Row, votes: str = "all_preferences_unprocessed") -> Example:
    verdicts = [_steered(vote.get("strength"), votes, as_text(vote.get("justification"))) for vote in _votes(row, votes)]
    overall = "preference_strength"
    prompt = steered(text(value(row, "prompt"), "prompt"))
    return judged(row, prompt, ("response_1", "response_2"), verdicts or [_steered(value(row, overall), overall)])


def _helpsteer3(row: Row, votes: str = "individual_preference") -> Example:
    verdicts = [_steered(vote.get("score"), votes, as_text(vote.get("reasoning"))) for vote in _votes(row, votes)]
    overall = "overall_preference"
    return judged(row, asked(row, "context"), ("response1", "response2"), verdicts or [_steered(value(row, overall), overall)])


def _votes(row: Row, column: str) -> list[dict[str, Any]]:
    """What each annotator said, where the row has it."""
    return objects(row, column) if column and row.get(column) not in (None, "", []) else []


# Chatbot Arena and MT-Bench


def _arena(row: Row) -> Example:
    """A vote on two conversations; of MT-Bench's, which go on after it, on the exchanges up to `turn`."""
    first, second = (_until(row, turns(unpacked(value(row, c), c), c)) for c in ("conversation_a", "conversation_b"))
    found, judge = value(row, "winner"), as_text(row.get("judge"))
    by = By(
        who=judge,
        kind="model" if judge.lower().startswith("gpt") else "person",
        time=as_text(row.get("tstamp")),
        side="a",
        reason=why(found),
    )
    return two(row, (), ((first, "conversation_a"), (second, "conversation_b")), [(chosen(found, "winner"), by)])


def _until(row: Row, conversation: Turns) -> Turns:
    last, exchanges = measured(row.get("turn")) or len(conversation), 0
    for n, message in enumerate(conversation):
        exchanges += message.role == "user"
        if exchanges > last:
            return conversation[:n]
    return conversation


def _arena_55k(row: Row) -> Example:
    """All questions of a battle and each side's answers, lists kept as JSON text, and three columns for the verdict."""
    columns = "response_a", "response_b"
    first, second = (tuple(_exchanges(row, column)) for column in columns)
    verdicts = ("winner_model_a", A), ("winner_model_b", B), ("winner_tie", TIE)
    won = [preference for column, preference in verdicts if truth(row, column)]
    if len(won) != 1:
        raise RowFault("bad_value", "one of winner_model_a, winner_model_b and winner_tie has to be 1", "winner_tie")
    return two(row, (), ((first, columns[0]), (second, columns[1])), [(won[0], By(kind="person", side="a"))])


def _exchanges(row: Row, column: str) -> Iterator[Message]:
    questions, answers = (_texts(row, c) for c in ("prompt", column))
    if len(questions) != len(answers):
        raise RowFault("bad_value", f"holds {len(answers)} answers to {len(questions)} questions", column)
    for question, answer in zip(questions, answers, strict=True):
        yield Message("user", question)
        yield Message("assistant", answer)


def _texts(row: Row, column: str) -> Sequence[str]:
    found = unpacked(value(row, column), column)
    if not is_list(found):
        raise RowFault("wrong_type", f"a list of texts is expected, this is {short(found)}", column)
    return [text(item, column) for item in found]


# what MT-Bench's judge was shown; a reference answer may stand between question and answers
_ONE = re.compile(
    r"\[User Question\]\n(.*?)\n\n(?:\[The Start of Reference Answer\].*?\[The End of Reference Answer\]\n\n)?"
    r"\[The Start of Assistant A's Answer\]\n(.*?)\n\[The End of Assistant A's Answer\]\n\n"
    r"\[The Start of Assistant B's Answer\]\n(.*?)\n\[The End of Assistant B's Answer\]",
    re.DOTALL,
)
_SEVERAL = r"<\|The Start of Assistant {0}'s Conversation with User\|>(.*?)\n\n<\|The End of Assistant {0}'s Conversation"


def _mt_bench(row: Row) -> Example:
    """A judge's two verdicts, the second with the answers in the other order."""
    shown = text(value(row, "g1_user_prompt"), "g1_user_prompt")
    prompt, first, second = _shown(shown)
    verdicts: list[Verdict] = []
    for game, side in (("g1", "a"), ("g2", "b")):
        found = value(row, f"{game}_winner")
        if found == "error":
            continue
        by = By(
            who=as_text(row.get("judge")),
            kind="model",
            time=as_text(row.get("tstamp")),
            side="a" if side == "a" else "b",
            reason=as_text(row.get(f"{game}_judgment")),
        )
        verdicts.append((chosen(found, f"{game}_winner"), by))
    return two(row, prompt, ((first, "g1_user_prompt"), (second, "g1_user_prompt")), verdicts)


def _shown(shown: str) -> tuple[Content, Content, Content]:
    """(prompt, answer of model 1, answer of model 2), cut out of what the judge was shown."""
    if match := _ONE.search(shown):
        question, first, second = match.groups()
        return (Message("user", question),), first, second
    sides = [re.search(_SEVERAL.format(side), shown, re.DOTALL) for side in "AB"]
    if not all(sides):
        raise RowFault("bad_value", "is none of MT-Bench's own prompts: question and answers are not found", "g1_user_prompt")
    first, second = (tuple(_headed(side[1])) for side in sides if side)
    return (), first, second


def _headed(conversation: str) -> Iterator[Message]:
    _, *parts = re.split(r"\n\n### (User|Assistant [AB]):\n", conversation)
    for who, words in zip(parts[::2], parts[1::2], strict=True):
        yield Message("user" if who == "User" else "assistant", words)


BATTLES = (
    Format("shp", "SHP", "comparisons", ("history", "human_ref_A", "human_ref_B", "labels"), _shp),
    Format("halos_pairs", "HALOs pairwise feedback", "comparisons", ("prompt", "output_A", "output_B", "label"), _halos),
    Format("helpsteer2", "HelpSteer2 preferences", "comparisons",
           ("prompt", "response_1", "response_2", "preference_strength"), _helpsteer2),
    Format("helpsteer2_overall", "HelpSteer2 overall preferences", "comparisons",
           ("prompt", "response_1", "response_2", "preference_strength"), lambda row: _helpsteer2(row, ""), automatic=False),
    Format("helpsteer3", "HelpSteer3 preferences", "comparisons",
           ("context", "response1", "response2", "overall_preference"), _helpsteer3),
    Format("helpsteer3_overall", "HelpSteer3 overall preferences", "comparisons",
           ("context", "response1", "response2", "overall_preference"), lambda row: _helpsteer3(row, ""), automatic=False),
    Format("arena", "Chatbot Arena battles", "comparisons",
           ("model_a", "model_b", "winner", "conversation_a", "conversation_b"), _arena),
    Format("arena_55k", "Chatbot Arena battles as on Kaggle", "comparisons",
           ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"), _arena_55k),
    Format("mt_bench", "MT-Bench judgments", "comparisons", ("model_1", "model_2", "g1_winner", "g2_winner", "g1_user_prompt"),
           _mt_bench),
    Format("alpaca_eval", "AlpacaEval annotations", "comparisons", ("instruction", "output_1", "output_2", "preference"),
           _alpaca_eval),
    Format("llmbar", "LLMBar", "comparisons", ("input", "output_1", "output_2", "label"), _llmbar),
    Format("pandalm", "PandaLM", "comparisons", ("instruction", "response1", "response2", "annotator1"), _pandalm),
)  # fmt: skip
