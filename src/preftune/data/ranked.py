"""Rows of Python that rank their answers: {"prompt": ..., "responses": [...], "ranking": [...]}. No file has them yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from preftune.data.dialogue import as_turns, content, is_blank, is_list, split_answer
from preftune.data.faults import RowFault
from preftune.data.formats import MEDIA, judged, tools_of
from preftune.data.grouping import content_key
from preftune.records import Content, Group, Origin, Ranking, Response


def is_ranked(row: object) -> bool:
    return isinstance(row, dict) and "responses" in row and "ranking" in row


def ranked(row: dict[str, Any], file: str, number: int) -> Group | RowFault:
    """The row as a group with one ranking; where it cannot be read, why.

    Args:
        row: `prompt`, text or messages; `responses`, two or more; `ranking`, the place of each of them, 1 for the best, equal
            for ties. Besides `weight`, `annotator`, `tools` and `id`, as in rows of other formats.
    """
    try:
        for column in MEDIA:
            if row.get(column) not in (None, "", []):
                raise RowFault("unsupported_content", "images and sounds are not read yet: remove the row", column)
        answers, places = _list(row, "responses"), _places(_list(row, "ranking"))
        if len(answers) != len(places) or len(answers) < 2:
            line = f"a place for each of two or more responses is expected: {len(places)} for {len(answers)}"
            raise RowFault("bad_value", line, "ranking")
        prompt, contents = _parted(row, answers)
        if len(set(map(content_key, contents))) < len(contents):
            raise RowFault("identical_answers", "two of them are the same: rank each answer once", "responses")
        responses = tuple(Response(c, (Origin(file, number, f"responses.{n}"),)) for n, c in enumerate(contents))
        tiers = tuple(tuple(n for n, own in enumerate(places) if own == place) for place in sorted(set(places)))
        mark = Ranking(tiers, origin=Origin(file, number, "ranking"), **judged(row))
        return Group(prompt, responses, (mark,), tools_of(row), str(row["id"]) if row.get("id") is not None else "")
    except RowFault as fault:
        return fault


def _list(row: dict[str, Any], column: str) -> Sequence[Any]:
    found = row[column]
    if not is_list(found):
        raise RowFault("wrong_type", "a list is expected", column)
    return found


def _places(found: Sequence[Any]) -> list[float]:
    for place in found:
        if isinstance(place, bool) or not isinstance(place, int | float) or not 1 <= place < math.inf:
            line = f"places count from 1, the best, and equal ones tie; this is {place!r}"
            raise RowFault("bad_value", line, "ranking")
    return list(found)


def _parted(row: dict[str, Any], answers: Sequence[Any]) -> tuple[Content, list[Content]]:
    """(prompt, answers): all text, or all messages."""
    if row.get("prompt") is None:
        raise RowFault("missing_value", "is missing: give the prompt that was answered", "prompt")
    prompt, contents = content(row["prompt"], "prompt"), [content(answer, "responses") for answer in answers]
    if not isinstance(prompt, str) or not all(isinstance(c, str) for c in contents) or tools_of(row):
        asked = as_turns(prompt, "user")
        parted = [split_answer(asked, as_turns(c, "assistant"), "responses") for c in contents]
        if any(own != parted[0][0] for own, _ in parted):
            raise RowFault("prompts_differ", "not all go on from the same turns", "responses")
        prompt, contents = parted[0][0], list[Content](answer for _, answer in parted)
    if any(is_blank(c) for c in contents):
        raise RowFault("empty_answer", "an answer is blank: remove it, or the row", "responses")
    return prompt, contents
