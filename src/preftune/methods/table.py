"""The table of methods: what each asks for, as far as it can be said without torch. A method is a loss of that name in `losses`
and a row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from preftune.errors import Refusal, nearest
from preftune.records import Comparison, Demonstration, Mark, Ranking, Rating

# what an example is made of: a pair of answers; a pair, and the longer one cut to the shorter one's length; answers in order;
# one rated answer; one answer to imitate
Kind = Literal["pairs", "cut_pairs", "rankings", "ratings", "answers"]

MARKS: dict[Kind, tuple[type[Mark], ...]] = {
    "pairs": (Comparison, Ranking),
    "cut_pairs": (Comparison, Ranking),
    "rankings": (Ranking, Comparison),
    "ratings": (Rating,),
    "answers": (Demonstration, Comparison, Ranking),
}
WORDS: dict[type[Mark], str] = {
    Comparison: "comparisons",
    Ranking: "rankings",
    Rating: "ratings",
    Demonstration: "demonstrations",
}
DEFAULT_FOR: dict[type[Mark], str] = {Comparison: "dpo", Ranking: "dpo", Rating: "kto", Demonstration: "sft"}


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method asks for.

    beta: its default; None: it reads none. reads: its hyperparameters (the keys `method.NAME`) and their defaults.
    diverges: its loss sees the policy through the log-ratio alone, so another divergence may take its place.
    strength: it needs to know how strong a judgement is.
    scalar: it trains a reward model, one number per answer, and not a language model.
    """

    kind: Kind = "pairs"
    reference: bool = True
    learning_rate: float = 1e-6
    beta: float | None = 0.1
    reads: Mapping[str, float] = field(default_factory=dict[str, float])
    diverges: bool = False
    strength: bool = False
    scalar: bool = False

    @property
    def marks(self) -> tuple[type[Mark], ...]:
        return MARKS[self.kind]


_KINDS = {"desirable_weight": 1.0, "undesirable_weight": 1.0}

NEEDS: dict[str, Needs] = {
    "sft": Needs("answers", reference=False, learning_rate=2e-5, beta=None),
    "reward": Needs(
        reference=False,
        learning_rate=1e-5,
        beta=None,
        reads={"centering": 0.0, "margin_scale": 0.0, "listwise": False},
        scalar=True,
    ),
    "dpo": Needs(diverges=True),
    "cdpo": Needs(reads={"noise": 0.1}, diverges=True),
    "robust": Needs(reads={"noise": 0.1}, diverges=True),
    "ipo": Needs(diverges=True),
    "ipo_mean": Needs(diverges=True),
    "hinge": Needs(diverges=True),
    "simpo": Needs(reference=False, beta=2.0, reads={"gamma": 1.0}),
    "orpo": Needs(reference=False, learning_rate=5e-6),
    "cpo": Needs(reference=False, reads={"alpha": 1.0}),
    "apo_zero": Needs(diverges=True),
    "apo_down": Needs(diverges=True),
    "exo": Needs(reads={"epsilon": 1e-3}, diverges=True),
    "nca": Needs(diverges=True),
    "bco": Needs(diverges=True),
    "sppo": Needs(diverges=True),
    "aot": Needs(),
    "aot_unpaired": Needs(),
    "discopop": Needs(reads={"temperature": 0.05}, diverges=True),
    "r_dpo": Needs(reads={"alpha": 0.01}, diverges=True),
    "ld_dpo": Needs("cut_pairs", reads={"alpha": 0.5}),
    "ln_dpo": Needs(learning_rate=5e-7, beta=5.0, diverges=True),
    "rpo": Needs(reads={"alpha": 1.0}),
    "dpop": Needs(reads={"penalty": 50.0}, diverges=True),
    "mm_dpo": Needs(reads={"scale": 0.5, "rate": 0.5}, diverges=True, strength=True),
    "plackett_luce": Needs("rankings"),
    "kto": Needs("ratings", learning_rate=5e-6, reads=_KINDS),
    "bco_unpaired": Needs("ratings", learning_rate=5e-6, reads=_KINDS),
    "apo_zero_unpaired": Needs("ratings", learning_rate=5e-6, reads=_KINDS),
}

# what other tools and papers call them, answered with our name
ELSEWHERE = {
    # TRL
    "sigmoid": "dpo",
    "sigmoid_norm": "ln_dpo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "aot_pair": "aot",
    "nll": "sft",
    # LLaMA-Factory, OpenRLHF, HALOs and others; `ipo`, `hinge`, `orpo`, `simpo`, `cpo` are the same everywhere
    "pt": "sft",
    "rlhf": "dpo",
    "kto_pair": "kto",
    "supervised": "sft",
    "finetune": "sft",
    "slic": "hinge",
    "slic_hf": "hinge",
    "rso": "hinge",
    "rdpo": "robust (wrong labels) or method=r_dpo (length)",
    "robust_dpo": "robust",
    "conservative_dpo": "cdpo",
    "dpo_positive": "dpop",
    "smaug": "dpop",
    "dpo_norm": "ln_dpo",
    "irpo": "rpo",
}


def by_marks() -> dict[str, list[str]]:
    """The names of all methods, by the marks that they take."""
    found: dict[str, list[str]] = {}
    for name, row in NEEDS.items():
        *first, last = [word for kind, word in WORDS.items() if kind in row.marks]
        found.setdefault(f"{', '.join(first)} or {last}" if first else last, []).append(name)
    return found


def check_name(name: str) -> str:
    """The canonical name of a method; refused where it is not known."""
    canonical = name.strip().replace("-", "_").lower()
    if canonical in NEEDS:
        return canonical
    hint = f" Here that is method={ELSEWHERE[canonical]}." if canonical in ELSEWHERE else nearest(canonical, NEEDS)
    raise Refusal(f"method {name!r} is not known.{hint} Known: {', '.join(NEEDS)}", code="unknown_method", key="method")
