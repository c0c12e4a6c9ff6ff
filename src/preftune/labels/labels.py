"""What every method makes of votes, and the plainest of them: the majority."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import betainc

from preftune.labels.votes import TIE, A, B, Bools, Floats, Ints, Votes


@dataclass(frozen=True, slots=True)
class Labels:
    """One label for each of the I items, and what a vote of each of the W annotators counts.

    preference: [I] the probability that a is better, a tie one half; 0.5 for an item without votes.
    certainty: [I] the probability that the side which the preference leans to is the better one: from 0.5, where nothing is
        known or where people find both equal, to 1.
    weight: [I] effective number of votes: the sum over the item's votes of weight * reliability.
    reliability: [W] what one vote counts, in votes of the average vote: 0 tells nothing.
    alone: [I] all votes that this label was made of are one annotator's: nobody can say how good they are.
    """

    preference: Floats
    certainty: Floats
    weight: Floats
    reliability: Floats
    alone: Bools


def majority(votes: Votes) -> Labels:
    """The share of votes: preference = (n_a + n_tie / 2) / n, with n sums of weights.

    A loss that is linear in the preference (dpo, for one) is, with weight n and this preference, the sum of the losses of the
    single votes. The certainty is that of a share under a uniform prior, Beta(1 + n_a + n_tie / 2, 1 + n_b + n_tie / 2): the
    mass on the side of one half that the preference leans to.
    """
    n = votes.counts()
    a, b = n[:, A] + n[:, TIE] / 2, n[:, B] + n[:, TIE] / 2
    total = a + b
    preference = np.divide(a, total, out=np.full(len(a), 0.5), where=total > 0)
    certainty: Floats = betainc(1 + np.minimum(a, b), 1 + np.maximum(a, b), 0.5)
    return Labels(preference, certainty, total, np.ones(len(votes.annotators)), one_annotator(votes, np.arange(len(a))))


def one_annotator(votes: Votes, part: Ints) -> Bools:
    """[I] whether all votes on the items of one part are one annotator's; `part` [I] has the number of each item's part."""
    parts, who = part[votes.item], votes.annotator
    first = np.full(len(part), -1, dtype=np.int64)
    first[parts[::-1]] = who[::-1]
    mixed = np.zeros(len(part), dtype=bool)
    mixed[parts[first[parts] != who]] = True
    return ~mixed[part]
