"""Methods: what each one needs of the data, and its arithmetic on scores. Nothing here imports torch but `make`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from preftune.errors import Refusal
from preftune.methods.options import (
    Asked,
    MethodOptions,
    beta_of,
    beta_said,
    check,
    check_beta,
    check_head,
    keys_of,
    needs,
    options_of,
    resolved,
)
from preftune.methods.table import DEFAULT_FOR, ELSEWHERE, NEEDS, WORDS, Needs, check_name
from preftune.records import Comparison, Group, Mark, Ranking, Rating

if TYPE_CHECKING:
    from preftune.training.method import Method

__all__ = [
    "ELSEWHERE",
    "NEEDS",
    "Asked",
    "MethodOptions",
    "Needs",
    "balance",
    "beta_of",
    "beta_said",
    "check",
    "check_beta",
    "check_head",
    "check_name",
    "choose",
    "keys_of",
    "make",
    "needs",
    "options_of",
    "resolved",
    "unused",
]


def choose(method: Asked, groups: Sequence[Group]) -> MethodOptions:
    """The method for these groups: the one asked for, if its marks are there; else by the kind of marks, unmixed.

    Raises:
        Refusal: there is none, or the one asked for has no use for these marks, or a key that it does not read is given.
    """
    asked = options_of(method)
    kinds = {type(mark) for group in groups for mark in group.marks}
    found = ", ".join(sorted(WORDS[k] for k in kinds)) or "no marks"
    if not asked.members:
        usual = {DEFAULT_FOR[kind] for kind in kinds}
        if len(usual) > 1:
            raise Refusal(f"the data holds {found}: name the method (method=...)", code="mixed_marks", key="method")
        if not usual:
            raise Refusal("the data holds prompts only: no answers and no judgements of them", code="no_marks", key="data")
        asked = options_of(asked.model_copy(update={"name": usual.pop()}))
    wanted = needs(asked)
    if not kinds & set(wanted.marks):
        raise Refusal(
            f"method {asked.label} needs {' or '.join(WORDS[k] for k in wanted.marks)}; the data holds {found}."
            f"{_instead(wanted, kinds)}",
            code="method_without_marks",
            key="method",
        )
    if wanted.strength and all(_strength(mark) is None for group in groups for mark in group.marks):
        raise Refusal(
            f"{asked.label} needs how strong each judgement is, a reward model's score of chosen minus that of rejected, and "
            "no row says it: write it into a column strength (or score_chosen and score_rejected); by.strength in Python",
            code="method_without_marks",
            key="method",
        )
    return asked


def _strength(mark: Mark) -> float | None:
    return mark.by.strength if mark.by else None


def _instead(wanted: Needs, kinds: set[type[Mark]]) -> str:
    """What these marks are good for, and how they may become what was wanted."""
    fitting = sorted({DEFAULT_FOR[kind] for kind in kinds})
    hint = f" For these: method={' or method='.join(fitting)}." if fitting else ""
    if Rating in wanted.marks and kinds & {Comparison, Ranking}:
        return f"{hint} Or write two rows for each pair: chosen with label true, rejected with label false."
    if Comparison in wanted.marks and Rating in kinds:
        return f"{hint} Or write a row with chosen and rejected for each prompt that has a desirable and an undesirable answer."
    return hint


def unused(method: MethodOptions, groups: Sequence[Group], used: int) -> dict[str, int]:
    """Marks that the method makes no example of, by what they are: of a kind that it does not take; or of its own kind but
    tied, of weight 0, or of an answer that another mark shows already. `used`: how many it does make examples of."""
    kinds = Counter(type(mark) for group in groups for mark in group.marks)
    marks = needs(method).marks
    foreign = {WORDS[kind]: count for kind, count in kinds.items() if kind not in marks}
    own = sum(kinds[kind] for kind in marks) - used
    return foreign | ({"ties, weights of 0 or answers shown before": own} if own else {})


def balance(method: MethodOptions, groups: Sequence[Group]) -> str:
    """A line about the two kinds of ratings, by KTO's rule: (desirable_weight * desirable) / (undesirable_weight * undesirable)
    between 1 and 3/2 (Ethayarajh et al. 2024); nothing for other methods."""
    if needs(method).kind != "ratings":
        return ""
    ratings = [mark for group in groups for mark in group.marks if isinstance(mark, Rating)]
    yes, no = (sum(mark.weight for mark in ratings if mark.desirable is kind) for kind in (True, False))
    full = resolved(method)
    up, down = (full.desirable_weight or 0.0) * yes, (full.undesirable_weight or 0.0) * no
    line = f"ratings: {yes:g} desirable of weight {full.desirable_weight:g}, {no:g} undesirable of {full.undesirable_weight:g}"
    if not up or not down:
        return f"{line}: one kind alone counts"
    ratio = up / down
    if 1 <= ratio <= 1.5:
        return f"{line}: {ratio:.3g} to 1, within KTO's rule of 1 to 1.5"
    key, value = ("desirable_weight", no / yes) if ratio < 1 else ("undesirable_weight", yes / no)
    value *= (full.undesirable_weight if ratio < 1 else full.desirable_weight) or 0.0
    return f"{line}: {ratio:.3g} to 1, outside KTO's rule of 1 to 1.5; method.{key}={value:.4g} makes them even"


def make(method: Asked, *, beta: float | None = None) -> Method:
    """The method itself (imports torch).

    Args:
        method: its name, or the keys of a run's `method`.
        beta: None: the method's own default.
    """
    from preftune.methods.making import made

    asked = options_of(method)
    return made(asked, beta_of(asked, beta))
