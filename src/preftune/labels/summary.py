"""Votes in one line: how many, of how many people, how far they agree, and whom to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from preftune.labels.agreement import krippendorff_alpha
from preftune.labels.annotators import Suspect, to_look_at
from preftune.labels.votes import Votes

NAMED = 3  # annotators that the line names


@dataclass(frozen=True, slots=True)
class Summary:
    """items: pairs with a vote, `several` of them with more than one. annotators: those with a name. alpha: Krippendorff's,
    nominal, of the last vote of each annotator on each item; NaN where no item has two, or all say the same. to_look_at: see
    `labels.to_look_at`."""

    votes: int
    annotators: int
    items: int
    several: int
    alpha: float
    to_look_at: tuple[Suspect, ...]

    def __str__(self) -> str:
        who = f"{self.annotators:,}" if self.annotators else "unnamed"
        line = f"{self.votes:,} votes of {who} annotators on {self.items:,} pairs"
        line += "" if math.isnan(self.alpha) else f", Krippendorff's alpha {self.alpha:.3f}"
        reasons: dict[str, list[str]] = {}
        for suspect in self.to_look_at:
            reasons.setdefault(suspect.annotator, []).append(suspect.reason)
        if not reasons:
            return line
        shown = [f"{who} ({', '.join(why)})" for who, why in list(reasons.items())[:NAMED]]
        more = ", ..." if len(reasons) > NAMED else ""
        return f"{line}, {len(reasons):,} annotators to look at: {', '.join(shown)}{more}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the annotators as lines, no alpha where there is none."""
        alpha = None if math.isnan(self.alpha) else self.alpha
        counts = {name: getattr(self, name) for name in ("votes", "annotators", "items", "several")}
        return {**counts, "alpha": alpha, "to_look_at": [str(suspect) for suspect in self.to_look_at]}


def summarised(votes: Votes) -> Summary:
    """What there is to say of votes before labels are made of them."""
    numbers = votes.numbers().sum(1)
    return Summary(
        votes=len(votes),
        annotators=sum(map(bool, votes.annotators)),
        items=int((numbers > 0).sum()),
        several=int((numbers > 1).sum()),
        alpha=float(krippendorff_alpha(votes.latest().numbers())),
        to_look_at=tuple(to_look_at(votes)),
    )
