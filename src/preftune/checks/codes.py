"""What the check finds beside the faults that a row is dropped for: every code, its severity, and what it means."""

from __future__ import annotations

from typing import NamedTuple

from preftune.records import Finding, Severity


class Code(NamedTuple):
    severity: Severity
    meaning: str


CHECKS = {
    "duplicate_row": Code("warning", "the row says again what an earlier one says, of the same annotator"),
    "near_duplicate": Code("warning", "its prompt and answers are almost those of an earlier row"),
    "contradiction": Code("warning", "the same two answers were judged the other way round in an earlier row"),
    "preference_cycle": Code("warning", "with earlier rows, each answer of a prompt is better than the next, in a circle"),
    "answers_alike": Code("warning", "the answers differ in case, spacing and punctuation alone"),
    "shared_prompt": Code("warning", "the prompt of a held-out row stands in the training data too"),
    "length_bias": Code("warning", "the longer answer wins much more or much less often than by chance"),
    "position_bias": Code("warning", "the answer that was shown first wins much more or much less often than by chance"),
    "disagreement": Code("info", "annotators judge the same pair in opposite ways"),
    "refusals": Code("info", "many answers refuse; training makes the model refuse more, or less"),
    "boilerplate": Code("info", "a set phrase stands in many answers, on one side more than on the other"),
    "unbalanced": Code("info", "nearly all rows are of one source or category"),
    "too_many_dropped": Code("error", "more than half of the rows are dropped, which training refuses"),
    "nothing_kept": Code("error", "no row can be used"),
    "faulty_row": Code("error", "a row is faulty, and data.strict refuses that"),
    "last_turn_cut": Code("warning", "cut at its start, the prompt loses its last question"),
    "not_prefix_stable": Code("warning", "the template writes the prompt otherwise once the answer follows"),
    "lost_turn": Code("warning", "the template leaves words of the conversation out"),
    "double_start_token": Code("warning", "two start tokens stand at the beginning"),
    "double_end_token": Code("warning", "an end token stands inside the answer, or two at its end"),
    "no_end_token": Code("warning", "nothing ends the answer: a model trained on it does not learn to stop"),
    "mixed_marks": Code("warning", "judgements of several kinds: training needs a method by name"),
}  # fmt: skip


def finding(
    code: str, message: str, file: str = "", row: int | None = None, *, column: str | None = None, mild: bool = False
) -> Finding:
    """One thing that was found; `mild`: less than the code's own severity, since it is weak."""
    return Finding(code, "info" if mild else CHECKS[code].severity, message, file, row, column)
