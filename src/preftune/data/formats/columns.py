"""Columns of a row, as values that can be relied on: each function gives what a format asks for, or says what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from preftune.data.dialogue import Turns, as_turns, is_list, is_object, text, turns
from preftune.data.faults import RowFault
from preftune.records import By

Row = Mapping[str, Any]
ANSWERS = ("completion", "response", "output")
LABELS = ("label", "kto_tag")
CHOSEN_SCORES = ("score_chosen", "chosen-rating", "chosen_rating", "chosen_score", "chosen_avg_rating")
REJECTED_SCORES = ("score_rejected", "rejected-rating", "rejected_rating", "rejected_score", "rejected_avg_rating")
_SIDES = {"a": "a", "chosen": "a", "left": "a", "b": "b", "rejected": "b", "right": "b"}


def value(row: Row, column: str) -> Any:
    found = row.get(column)
    if found is None:
        if column in row:
            raise RowFault("missing_value", "is null: fill it in or remove the row", column)
        raise RowFault("missing_column", "is missing in this row: add it, or name the file's column with columns=", column)
    return found


def one_of(row: Row, columns: tuple[str, ...]) -> str:
    """The first of these columns that holds something."""
    return next((c for c in columns if row.get(c) is not None), next((c for c in columns if c in row), columns[0]))


def as_number(found: object, column: str) -> float:
    """A finite number; CSV holds numbers as text."""
    try:
        if isinstance(found, bool):
            raise TypeError
        read = float(cast(Any, found))
    except (TypeError, ValueError):
        raise RowFault("wrong_type", f"a number is expected, this is {short(found)}", column) from None
    if not math.isfinite(read):
        raise RowFault("bad_value", f"a finite number is expected, this is {short(found)}", column)
    return read


def number(row: Row, column: str, highest: float) -> float:
    """A number from 0 to `highest`; 1 where the row does not say."""
    found = row.get(column)
    if found is None or found == "":
        return 1.0
    read = as_number(found, column)
    if not 0 <= read <= highest:
        most = "of 0 or more" if math.isinf(highest) else f"from 0 to {highest:g}"
        raise RowFault("bad_value", f"a number {most} is expected, this is {short(found)}", column)
    return read


def truth(row: Row, column: str) -> bool:
    """True, false, 1, 0, or those words as CSV writes them."""
    found = value(row, column)
    word = str(found).strip().lower()
    if word in ("true", "1", "1.0"):
        return True
    if word in ("false", "0", "0.0"):
        return False
    raise RowFault("bad_value", f"true or false (or 1 or 0) is expected, this is {short(found)}", column)


def unpacked(found: object, column: str) -> Any:
    """A list or an object, which may be kept as JSON text."""
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found) if found.strip() else None
    except (ValueError, RecursionError):
        raise RowFault("wrong_type", f"JSON is expected, this is {short(found)}", column) from None


def objects(row: Row, column: str) -> list[dict[str, Any]]:
    """A list of objects; older versions of `datasets` keep it as one object of lists."""
    found: Any = unpacked(value(row, column), column)
    if is_object(found):
        longest = max((len(held) for held in found.values() if is_list(held)), default=0)
        found = [{key: held[n] for key, held in found.items() if is_list(held) and n < len(held)} for n in range(longest)]
    if not is_list(found) or not all(is_object(item) for item in found):
        raise RowFault("wrong_type", f"a list of objects is expected, this is {short(found)}", column)
    return list(found)


def holds_objects(row: Row, column: str, *keys: str) -> bool:
    """Whether a list of objects with these keys stands there: a shape by which formats are told apart."""
    found: Any = row.get(column)
    if is_object(found):
        return all(is_list(found.get(key)) for key in keys)
    return is_list(found) and bool(found) and all(is_object(item) and all(k in item for k in keys) for item in found)


def holds_texts(row: Row, column: str) -> bool:
    found = row.get(column)
    return is_list(found) and bool(found) and all(isinstance(item, str) for item in found)


def tools_of(row: Row) -> tuple[Any, ...]:
    found = row.get("tools")
    if found is None:
        return ()
    found = unpacked(found, "tools")  # LLaMA-Factory keeps the list as JSON text
    if found is None:
        return ()
    if not is_list(found):
        raise RowFault("wrong_type", f"a list of tools is expected, this is {short(found)}", "tools")
    return tuple(found)


def system_of(row: Row) -> Turns:
    found = row.get("system")
    return () if found is None else as_turns(text(found, "system"), "system")


def under(system: Turns, prompt: Turns) -> Turns:
    """A system turn inside the conversation wins over the column."""
    return prompt if prompt and prompt[0].role == "system" else system + prompt


def asked(row: Row, column: str) -> Turns:
    """A question, as text or as turns: the beginning of a conversation."""
    found = value(row, column)
    if not isinstance(found, str):
        return turns(found, column)
    question = as_turns(text(found, column), "user")
    if not question:
        raise RowFault("missing_value", "the prompt is empty: fill it in or remove the row", column)
    return question


def with_input(row: Row, question: str, column: str) -> str:
    """An instruction and what it is about, as one question."""
    given = row.get(column)
    given = "" if given is None else text(given, column)
    return f"{question}\n{given}" if given.strip() else question


# What a row says of its judgement


def weight_of(row: Row) -> float:
    return number(row, "weight", math.inf)


def by_of(row: Row) -> By | None:
    """Who judged and how, as far as general columns say so. A value of another type is something else, and passed over."""
    found: dict[str, Any] = {}
    for column, (name, read) in _NOTED.items():
        if (held := row.get(column)) is not None and (said := read(held)) not in ("", None):
            found[name] = said
    if "strength" not in found and not row.keys().isdisjoint(CHOSEN_SCORES):
        chosen, rejected = (measured(row.get(one_of(row, columns))) for columns in (CHOSEN_SCORES, REJECTED_SCORES))
        if chosen is not None and rejected is not None:
            label = measured(row.get("preference"))
            # of the judgement, which below one half is for the rejected answer
            found["strength"] = rejected - chosen if label is not None and label < 0.5 else chosen - rejected
    return By(**found) if found else None


def measured(found: object) -> float | None:
    """A number where there is one."""
    try:
        return None if found is None else as_number(found, "")
    except RowFault:
        return None


def as_text(found: object) -> str:
    """A name, a number or a time as text; several are joined. Nothing for what is neither."""
    if type(found) is str:
        return found
    if is_list(found):
        return "/".join(filter(None, map(as_text, found)))
    return str(found) if isinstance(found, (str, int, float)) and not isinstance(found, bool) else ""


def _side(found: object) -> str:
    return _SIDES.get(as_text(found).lower(), "")


def _kind(found: object) -> str:
    return found if found in ("person", "model", "rule") else ""


def _reason(found: object) -> str:
    return found if isinstance(found, str) else ""


# what any row may say of its judgement, beside its weight and its soft label
_NOTED: dict[str, tuple[str, Callable[[object], object]]] = {
    "annotator": ("who", as_text),
    "annotator_kind": ("kind", _kind),
    "time": ("time", as_text),
    "side": ("side", _side),
    "margin": ("strength", measured),
    "strength": ("strength", measured),
    "reason": ("reason", _reason),
}
NOTES = tuple(_NOTED)


def short(found: object) -> str:
    shown = json.dumps(found, ensure_ascii=False, default=str)
    return shown if len(shown) <= 40 else shown[:37] + "..."
