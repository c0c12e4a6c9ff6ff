"""Figures as people write them. Shares are in [0, 1] and shown in per cent."""

from __future__ import annotations

import math

from preftune.report.folder import number, pair

NONE = "\N{EN DASH}"


def minus(text: str) -> str:
    """A leading hyphen as a real minus sign."""
    return "\N{MINUS SIGN}" + text[1:] if text.startswith("-") else text


def figure(value: object, digits: int = 3) -> str:
    """A number to `digits` significant digits; whole from 1,000 up. Absent is a dash; NaN and infinity are said."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NONE
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if isinstance(value, int) or abs(value) >= 1000:
        return minus(f"{value:,.0f}")
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return minus(f"{value:.{digits - 1}e}" if decimals > digits + 2 else f"{value:.{max(0, decimals)}f}")


def plain(value: object) -> str:
    """A number that somebody chose (a beta, a step), without trailing zeros."""
    chosen = number(value)
    return figure(value) if chosen is None else minus(f"{chosen:,g}")


def percent(value: object) -> str:
    """A share as per cent with one decimal."""
    share = number(value)
    return figure(value) if share is None else minus(f"{share * 100:.1f} %")


def interval(value: object, *, share: bool = False) -> str:
    """A [low, high] pair joined by a dash, or by "to" where a minus would meet the dash; empty where there is none."""
    ends = pair(value)
    if ends is None:
        return ""
    texts = [f"{end * 100:.1f}" if share else figure(end) for end in ends]
    between = " to " if min(ends) < 0 else "\N{EN DASH}"
    return between.join(minus(text) for text in texts) + (" %" if share else "")


def change(before: object, after: object, *, share: bool = False) -> str:
    """After minus before, with its sign; shares in percentage points."""
    first, second = number(before), number(after)
    if first is None or second is None:
        return ""
    difference = second - first
    text = minus(f"{difference * 100:.1f} pp" if share else figure(difference))
    return f"+{text}" if difference > 0 else text


def duration(seconds: float) -> str:
    """Seconds as people say them: "48 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{figure(seconds)} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def count(number_of: int, plural: str) -> str:
    """A count with its noun: "1 step", "2,000 steps"."""
    return f"{number_of:,} {plural if number_of != 1 else plural[:-1]}"
