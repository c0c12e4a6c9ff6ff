"""Which marks cannot be used, and what is left of a group without them and without its faulty responses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from preftune.errors import Refusal
from preftune.records import Comparison, Finding, Group, Mark, Origin, Ranking, origins

SHORTER = "shorter_ranking"


class Fault(NamedTuple):
    """Why a response, or a mark, cannot be used."""

    code: str
    message: str


def check_marks(groups: Iterable[Group]) -> None:
    """Refuses a mark that no number could be computed of, which rows of a file cannot have and groups made in Python can."""
    for n, group in enumerate(groups):
        for mark in group.marks:
            _check(mark, len(group.responses), n)


def _check(mark: Mark, answers: int, group: int) -> None:
    wrong, responses, strength = "", mark.responses, mark.by.strength if mark.by else None
    if isinstance(mark, Comparison) and not 0 <= mark.preference <= 1:
        wrong = f"a preference is a probability, from 0 to 1, not {mark.preference:g}"
    elif not 0 <= mark.weight < math.inf:
        wrong = f"a weight is a finite number of 0 or more, not {mark.weight:g}"
    elif strength is not None and not math.isfinite(strength):
        wrong = f"a strength is a finite number, not {strength:g}"
    elif any(not 0 <= response < answers for response in responses):
        wrong = f"it judges answers {', '.join(map(str, responses))} of a prompt that has {answers}, counted from 0"
    elif len(set(responses)) < len(responses) or len(responses) < (2 if isinstance(mark, Ranking) else 1):
        wrong = "it compares an answer with itself, or with none"
    if wrong:
        file, row = (mark.origin.file, mark.origin.row) if mark.origin else (f"group {group} (from 0)", None)
        raise Refusal(wrong, code="bad_mark", file=file, row=row)


def without(
    group: Group, faults: Mapping[int, Fault], bad_marks: Mapping[int, Fault], findings: list[Finding]
) -> tuple[Group, list[int]]:
    """The group without faulty responses, the marks that need them, and what is then needed by no mark any more.

    Args:
        faults: by index of the response. bad_marks: by index of the mark.
        findings: gets one for each mark that is gone (for each vote that it was made of), and one for each faulty response that
            no mark needs.

    Returns:
        What is left, and the indices that its responses had.
    """
    if not faults and not bad_marks:
        return group, list(range(len(group.responses)))
    marked = {i for mark in group.marks for i in mark.responses}
    lost = set(faults)
    marks: list[Mark] = []
    for n, mark in enumerate(group.marks):
        faulty = [i for i in mark.responses if i in faults]
        if not faulty and n not in bad_marks:
            marks.append(mark)
            continue
        if isinstance(mark, Ranking) and n not in bad_marks and (shorter := mark.without(faults)):
            marks.append(shorter)
            findings.append(replace(_finding(group, mark.origin, faulty, faults), code=SHORTER, severity="warning"))
            continue
        lost |= set(mark.responses)
        for place in origins(mark):
            findings.append(_finding(group, place, faulty, faults) if faulty else _at(place, bad_marks[n]))
    findings += [_at(next(iter(group.responses[i].origins), None), faults[i]) for i in faults if i not in marked]
    needed = {i for mark in marks for i in mark.responses}
    order = [i for i in range(len(group.responses)) if i in needed or i not in lost]
    return group.restricted(marks, order), order


def _finding(group: Group, origin: Origin | None, faulty: list[int], faults: Mapping[int, Fault]) -> Finding:
    """Names the columns of the answers that are at fault, which need not be the mark's own."""
    where = origin or Origin("", 0, "")
    places = [o for i in faulty for o in group.responses[i].origins if (o.file, o.row) == (where.file, where.row)]
    columns = ", ".join(dict.fromkeys(o.column for o in places))
    message = "; ".join(dict.fromkeys(faults[i].message for i in faulty))
    return _at(replace(where, column=columns), Fault(faults[faulty[0]].code, message))


def _at(origin: Origin | None, fault: Fault) -> Finding:
    file, row, column = (origin.file, origin.row or None, origin.column or None) if origin else ("", None, None)
    return Finding(fault.code, "error", fault.message, file, row, column)
