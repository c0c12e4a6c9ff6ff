"""Filters: which rows of a source are read, as `column op value and ...`. A grammar of its own; nothing is run as code.

filter = both {"or" both}
both   = test {"and" test}
test   = column op value | column ("in" | "not in") "[" value {"," value} "]" | "(" filter ")"
op     = "=" | "==" | "!=" | "<" | "<=" | ">" | ">=" | "contains" | "not contains"
column = a word, or any text between ` `; a dot leads into an object: metadata.lang
value  = a number | true | false | null | a word | "text" | 'text'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from preftune.data.dialogue import is_list, is_object
from preftune.data.faults import RowFault
from preftune.data.formats.columns import as_number, as_text, measured, short

Keeps = Callable[[Mapping[str, Any]], bool]
Value = float | bool | str | None

_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_EQUAL, _WORDS = ("=", "==", "!="), ("in", "contains")
_OPS = "= != < <= > >= in, not in, contains or not contains"
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<column>`[^`]+`)|(?P<op>[!<>=]=|[<>=])|(?P<mark>[()\[\],])"""
    r"""|(?P<word>[^\s()\[\],<>=!"'`]+))"""
)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NAMED: dict[str, Value] = {"true": True, "false": False, "null": None}


class BadFilter(ValueError):
    """A text that is no filter: where, from character 1 on, and what is expected there."""


@dataclass(frozen=True, slots=True)
class Filter:
    """columns: all that it names. keeps: whether a row passes; a value that cannot be compared is a RowFault."""

    columns: tuple[str, ...]
    keeps: Keeps


def parse(text: str) -> Filter:
    """The filter that a text says.

    A column that is missing or null equals null alone, differs from every other value, and is neither less nor more than any.

    Raises:
        BadFilter: names the character.
    """
    parser = _Parser(text)
    keeps = parser.either()
    parser.end()
    return Filter(tuple(parser.columns), keeps)


def holds(row: Mapping[str, Any], column: str) -> bool:
    """Whether the row has the column, be it null."""
    return _found(row, column)[0]


class _Token(NamedTuple):
    kind: str
    text: str
    at: int  # its first character, from 1

    def is_word(self, *words: str) -> bool:
        return self.kind == "word" and self.text.lower() in words


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            place = len(text) - len(text[at:].lstrip())
            why = "this quote is never closed" if text[place] in "\"'`" else f"{text[place]} means nothing here"
            raise BadFilter(f"{text}: character {place + 1}: {why}")
        yield _Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1)
        at = match.end()
    yield _Token("end", "the end", len(text.rstrip()) + 1)


class _Parser:
    """Reads from left to right, a function for each rule of the grammar; `columns` collects the names."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.columns: dict[str, None] = {}

    def either(self) -> Keeps:
        return self.joined("or", self.both, any)

    def both(self) -> Keeps:
        return self.joined("and", self.test, all)

    def joined(self, word: str, rule: Callable[[], Keeps], hold: Callable[[Iterable[bool]], bool]) -> Keeps:
        parts = [rule()]
        while self.tokens[0].is_word(word):
            self.tokens.pop(0)
            parts.append(rule())
        return parts[0] if len(parts) == 1 else lambda row: hold(part(row) for part in parts)

    def test(self) -> Keeps:
        if self.takes("("):
            inner = self.either()
            self.needs(")")
            return inner
        column = self.column()
        op = self.op()
        found = self.compared(column, op.removeprefix("not "))
        return (lambda row: not found(row)) if op == "!=" or op.startswith("not ") else found

    def compared(self, column: str, op: str) -> Keeps:
        """What the operator says; of != it is that they are equal."""
        if op == "in":
            values = self.values()
            return lambda row: any(_equal(_found(row, column)[1], value) for value in values)
        token, value = self.tokens[0], self.value()
        if op == "contains":
            return lambda row: _contains(_found(row, column)[1], _text(value), column)
        if op in _EQUAL:
            return lambda row: _equal(_found(row, column)[1], value)
        if value is None or isinstance(value, bool):
            raise self.fault(token, f"{op} needs a number or a text")
        return lambda row: _ordered(_found(row, column)[1], value, op, column)

    def column(self) -> str:
        token = self.tokens.pop(0)
        if token.kind not in ("word", "column") or token.is_word("and", "or", "not", *_WORDS):
            raise self.fault(token, "the name of a column is expected (between ` ` if it is no plain word)")
        name = token.text.strip("`")
        self.columns.setdefault(name)
        return name

    def op(self) -> str:
        token = self.tokens.pop(0)
        if token.kind == "op" and (token.text in _EQUAL or token.text in _ORDERS):
            return token.text
        if token.is_word(*_WORDS):
            return token.text.lower()
        if token.is_word("not") and self.tokens[0].is_word(*_WORDS):
            return f"not {self.tokens.pop(0).text.lower()}"
        raise self.fault(token, f"{_OPS} is expected")

    def values(self) -> list[Value]:
        self.needs("[")
        found = [self.value()]
        while self.takes(","):
            found.append(self.value())
        self.needs("]")
        return found

    def value(self) -> Value:
        token = self.tokens.pop(0)
        if token.kind == "text":
            return re.sub(r"\\(.)", r"\1", token.text[1:-1])
        if token.kind != "word":
            raise self.fault(token, "a value is expected: a number, true, false, null or a text")
        if token.text.lower() in _NAMED:
            return _NAMED[token.text.lower()]
        return float(token.text) if _NUMBER.fullmatch(token.text) else token.text

    def takes(self, mark: str) -> bool:
        if self.tokens[0].kind == "mark" and self.tokens[0].text == mark:
            self.tokens.pop(0)
            return True
        return False

    def needs(self, mark: str) -> None:
        if not self.takes(mark):
            raise self.fault(self.tokens[0], f"{mark} is expected")

    def end(self) -> None:
        if self.tokens[0].kind != "end":
            raise self.fault(self.tokens[0], "and, or, or the end is expected (a text of several words stands in quotes)")

    def fault(self, token: _Token, why: str) -> BadFilter:
        return BadFilter(f"{self.text}: character {token.at}: {why}, found {token.text}")


def _found(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """(whether it is there, what it holds); `metadata.lang` is a column of that name, or `lang` in the object `metadata`."""
    if column in row:
        return True, row[column]
    first, _, rest = column.partition(".")
    inner = row.get(first) if rest else None
    return _found(inner, rest) if is_object(inner) else (False, None)


def _equal(found: object, value: Value) -> bool:
    """CSV holds numbers, true and false as text."""
    if value is None or found is None:
        return value is found
    if isinstance(value, bool):
        return found is value or (isinstance(found, str) and found.lower() == _text(value))
    if isinstance(value, float):
        return measured(found) == value
    return not is_list(found) and as_text(found) == value


def _ordered(found: object, value: float | str, op: str, column: str) -> bool:
    if found is None or found == "":
        return False
    if isinstance(value, float):
        return _ORDERS[op](as_number(found, column), value)
    if not isinstance(found, str):
        raise RowFault("wrong_type", f"the filter compares it with a text, this is {short(found)}", column)
    return _ORDERS[op](found, value)


def _contains(found: object, text: str, column: str) -> bool:
    """A part of a text, or of a message; one item of a list."""
    if found is None:
        return False
    if isinstance(found, str):
        return text in found
    if is_object(found):
        return _contains(found.get("content", found.get("value", found.get("text"))), text, column)
    if is_list(found):
        return any(_contains(item, text, column) if is_object(item) else as_text(item) == text for item in found)
    raise RowFault("wrong_type", f"the filter looks for a text in it, this is {short(found)}", column)


def _text(value: Value) -> str:
    """A value as it is written in a row."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
