"""Dawid and Skene: every annotator has a confusion matrix, and every item a true answer that nobody has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preftune.labels.labels import Labels, one_annotator
from preftune.labels.votes import CHOICES, TIE, A, Bools, Floats, Ints, Votes, tally

SMOOTHING = 10.0
NEVER = 1e-12  # what takes the place of a probability 0 in a logarithm


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """posterior: [I, 3] probability that a is better, that both are equal, that b is better.
    confusion: [W, 3, 3] probability that the annotator says (second index) the one that stands first, a tie or the one that
        stands second, where it is (first index) the one or the other in truth.
    classes: [3] share of each truth before any vote.
    converged: the posterior stood still before the last round allowed.
    """

    labels: Labels
    posterior: Floats
    confusion: Floats
    classes: Floats
    rounds: int
    converged: bool

    def expected(self, votes: Votes) -> Floats:
        """[V, 3] probability of each choice for votes by these annotators on these items (what they chose is not looked at)."""
        truth = self.posterior[votes.item]
        seen = {side: _turned(truth, np.full(len(votes), side < 0)) for side in (1, -1)}
        said = {side: np.einsum("vz,vzc->vc", seen[side], self.confusion[votes.annotator]) for side in seen}
        ahead, behind = said[1], said[-1][:, ::-1]
        known = np.stack([behind, (ahead + behind) / 2, ahead])
        return known[votes.side + 1, np.arange(len(votes))]


def dawid_skene(votes: Votes, *, smoothing: float = SMOOTHING, tolerance: float = 1e-6, max_rounds: int = 1000) -> DawidSkene:
    """Annotators' confusion and items' truth by expectation and maximisation, from the shares of votes on.

    P(truth z of an item | its votes) ~ class(z) * product over votes v of confusion_w(v)[z, v]; confusion_w[z, c] ~ number of
    votes c of annotator w on items of truth z, in expectation, + smoothing * (the same share over all annotators).

    Source: Dawid and Skene 1979, Applied Statistics 28(1), equations 2.3 to 2.5. Ours: the smoothing, by which annotators of
    few votes are taken for the average annotator (theirs is 0); truth and votes are turned to the order in which the two
    answers stood, so that a liking for the first place is an error like others, while which of both is stored as `a` means
    nothing: a vote of unknown order counts one half in each, and a and b are as likely before any vote.

    Args:
        votes: several on most items.
        smoothing: votes that the average annotator's confusion counts in each row of everybody's, not negative.
        tolerance: largest change of a posterior in the last round.

    Returns:
        The fit. labels.preference = P(a) + P(tie) / 2; the reliability is the information in nats that a vote of the annotator
        gives about the truth, over its mean over all votes.
    """
    turned = np.concatenate([votes.side < 0, np.ones(int((votes.side == 0).sum()), dtype=bool)])
    unknown = votes.side == 0
    twice = np.concatenate([np.arange(len(votes)), np.flatnonzero(unknown)])
    fit = em(
        votes.item[twice],
        votes.annotator[twice],
        np.where(turned, 2 - votes.choice[twice], votes.choice[twice]),
        np.where(unknown, 0.5, 1.0)[twice] * votes.weight[twice],
        (len(votes.items), len(votes.annotators), len(CHOICES)),
        turned=turned,
        smoothing=smoothing,
        tolerance=tolerance,
        max_rounds=max_rounds,
    )
    preference = (fit.posterior[:, A] + fit.posterior[:, TIE] / 2).clip(0, 1)
    told = _information(fit.classes, fit.confusion)
    each = tally(votes.annotator, len(votes.annotators), votes.weight)
    mean = (told @ each) / max(each.sum(), NEVER)
    reliability = told / mean if mean > NEVER else np.ones(len(told))
    labels = Labels(
        preference,
        np.maximum(preference, 1 - preference),
        tally(votes.item, len(votes.items), votes.weight * reliability[votes.annotator]),
        reliability,
        one_annotator(votes, np.arange(len(votes.items))),
    )
    return DawidSkene(labels, *fit)


class Fit(NamedTuple):
    posterior: Floats
    confusion: Floats
    classes: Floats
    rounds: int
    converged: bool


def em(
    item: Ints,
    annotator: Ints,
    said: Ints,
    weight: Floats,
    sizes: tuple[int, int, int],
    *,
    turned: Bools | None = None,
    smoothing: float = 0.0,
    tolerance: float = 1e-6,
    max_rounds: int = 1000,
) -> Fit:
    """The algorithm for any number K of classes.

    Args:
        item, annotator, said, weight: [V] of each vote.
        sizes: numbers I, W and K.
        turned: [V] the vote was given with the classes in reverse; the classes are as likely as in reverse then. None: the
            classes have no such mirror image.
    """
    items, annotators, classes = sizes
    column = np.arange(classes)
    cell = (annotator[:, None] * classes + column) * classes + said[:, None]  # [V, K] of the confusion, for every truth
    place = item[:, None] * classes + column  # [V, K] of the posterior
    if turned is not None:
        place = _turned(place, turned)
    given = tally(place[np.arange(len(said)), said], items * classes, weight)
    posterior = _normal(given.reshape(items, classes))
    change, done = np.inf, 0
    prior, confusion = _normal(posterior.sum(0)), np.empty(0)
    while done < max_rounds and change > tolerance:
        prior = _normal(posterior.sum(0))
        if turned is not None:
            prior = (prior + prior[::-1]) / 2
        expected = tally(cell.ravel(), annotators * classes**2, (posterior.ravel()[place] * weight[:, None]).ravel())
        expected = expected.reshape(annotators, classes, classes)
        confusion = _normal(expected + max(smoothing, NEVER) * _normal(expected.sum(0)))
        told = np.log(np.maximum(confusion, NEVER)).ravel()[cell] * weight[:, None]
        score = np.log(np.maximum(prior, NEVER)) + tally(place.ravel(), items * classes, told.ravel()).reshape(items, classes)
        found = _normal(np.exp(score - score.max(1, keepdims=True)))
        change, posterior, done = float(np.abs(found - posterior).max(initial=0)), found, done + 1
    return Fit(posterior, confusion, prior, done, change <= tolerance)


def _normal(counts: Floats) -> Floats:
    """Shares along the last axis; equal ones where there is nothing."""
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, 1 / counts.shape[-1]), where=total > 0)


def _turned(rows: NDArray[Any], turned: Bools) -> NDArray[Any]:
    """The rows [V, K], those in reverse where turned."""
    return np.where(turned[:, None], rows[:, ::-1], rows)


def _information(classes: Floats, confusion: Floats) -> Floats:
    """[W] mutual information of truth and vote, in nats."""
    joint = classes[:, None] * confusion
    apart = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
    return (joint * np.log(np.maximum(joint, NEVER) / np.maximum(apart, NEVER))).sum((1, 2)).clip(min=0)
