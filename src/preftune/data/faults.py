"""What can be wrong with one row. A faulty row is dropped, counted and named; it never stops the reading."""

from __future__ import annotations

CODES = {
    "missing_column": "the row lacks a column that its format needs",
    "missing_value": "the column is there and holds null",
    "wrong_type": "the value is of a kind that cannot be read: text or messages are expected",
    "bad_value": "the value is of the right kind and out of range, or makes no sense",
    "empty_answer": "an answer is blank",
    "identical_answers": "chosen and rejected are the same",
    "no_judgement": "nobody has said which answer is better, or there is only one to judge",
    "unknown_item": "a vote is about an item that was not read before it",
    "prompts_differ": "chosen and rejected (or an answer and the prompt column) do not share a prompt",
    "bad_json": "the line is not JSON",
    "not_an_object": "the row is JSON, and not an object with named columns",
    "wrong_fields": "a CSV record has more or fewer fields than the header",
    "unsupported_content": "the row holds images, sounds or other parts that are not read yet",
}


class RowFault(Exception):
    """One row cannot be used: why, and in which column."""

    def __init__(self, code: str, message: str, column: str | None = None) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code, self.message, self.column = code, message, column
