"""Methods: what each one needs of the data, and its arithmetic on scores. The table here imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from preftune.errors import Refusal, nearest
from preftune.records import Comparison, Demonstration, Group, Mark, Rating

if TYPE_CHECKING:
    from preftune.training.method import Method


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method asks for: kinds of marks (any of them will do), a reference, and its usual learning rate."""

    marks: tuple[type[Mark], ...]
    reference: bool
    learning_rate: float


NEEDS: dict[str, Needs] = {
    "dpo": Needs((Comparison,), reference=True, learning_rate=1e-6),
    "sft": Needs((Demonstration, Comparison), reference=False, learning_rate=2e-5),
}

# what other tools call them, answered with our name
ELSEWHERE = {"sigmoid": "dpo", "rlhf": "dpo", "pt": "sft", "supervised": "sft", "finetune": "sft"}

DEFAULT_FOR: dict[type[Mark], str] = {Comparison: "dpo", Rating: "kto", Demonstration: "sft"}

_WORDS: dict[type[Mark], str] = {Comparison: "comparisons", Rating: "ratings", Demonstration: "demonstrations"}


def check_name(name: str) -> str:
    """The canonical name of a method; refused where it is not known."""
    canonical = name.replace("-", "_").lower()
    if canonical in NEEDS:
        return canonical
    hint = f" Here that is method={ELSEWHERE[canonical]}." if canonical in ELSEWHERE else nearest(canonical, NEEDS)
    raise Refusal(f"method {name!r} is not known; known: {', '.join(NEEDS)}.{hint}", code="unknown_method", key="method")


def choose(name: str | None, groups: list[Group]) -> str:
    """The method for these groups: the one asked for, if its marks are there; else by the kind of marks, unmixed."""
    kinds = {type(mark) for group in groups for mark in group.marks}
    found = ", ".join(sorted(_WORDS[k] for k in kinds)) or "no marks"
    if name is None:
        if len(kinds) > 1:
            raise Refusal(f"the data holds {found}: name the method (method=...)", code="mixed_marks", key="method")
        if not kinds:
            raise Refusal("the data holds prompts only: no answers and no judgements of them", code="no_marks", key="data")
        name = DEFAULT_FOR[kinds.pop()]
        if name not in NEEDS:
            raise Refusal(
                f"the data holds {found}, and no method for them is here yet; known: {', '.join(NEEDS)}",
                code="no_method",
                key="method",
            )
        return name
    if not kinds & set(NEEDS[name].marks):
        wanted = " or ".join(_WORDS[k] for k in NEEDS[name].marks)
        others = [m for m, needs in NEEDS.items() if kinds & set(needs.marks)]
        hint = f" For these: method={' or '.join(others)}." if others else ""
        raise Refusal(f"method {name} needs {wanted}; the data holds {found}.{hint}", code="method_without_marks", key="method")
    return name


def unused(name: str, groups: Sequence[Group], examples: int) -> dict[str, int]:
    """Marks that the method makes no example of, by what they are: of a kind that it does not take; or of its own kind but
    tied, of weight 0, or of an answer that another mark shows already."""
    kinds = Counter(type(mark) for group in groups for mark in group.marks)
    foreign = {_WORDS[kind]: count for kind, count in kinds.items() if kind not in NEEDS[name].marks}
    own = sum(count for kind, count in kinds.items() if kind in NEEDS[name].marks) - examples
    return foreign | ({"ties, weights of 0 or answers shown before": own} if own else {})


def make(name: str, *, beta: float) -> Method:
    """The method itself (imports torch)."""
    from preftune.methods import dpo, sft

    makers: dict[str, Any] = {"dpo": lambda: dpo.DPO(beta), "sft": sft.SFT}
    return makers[name]()
