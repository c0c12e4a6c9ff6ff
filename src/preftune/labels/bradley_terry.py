"""Bradley and Terry with annotators: answers have strengths, and everybody sees them more or less clearly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import ndtr

from preftune.labels.labels import Labels, one_annotator
from preftune.labels.votes import TIE, A, B, Floats, Ints, Votes, tally

NODES, _shares = np.polynomial.hermite_e.hermegauss(9)
SHARES: Floats = _shares / _shares.sum()
LARGEST = 3000  # answers that hang together, up to which what they say about each other is computed
AT_ONCE = LARGEST**2  # entries of the matrices that are inverted in one call


class Prior(NamedTuple):
    """Standard deviations of the normal priors, in logits of the average annotator, whose discrimination is 1."""

    strength: float = 2.0
    discrimination: float = 0.5
    tie: float = 0.7
    side: float = 0.5
    common_tie: float = 3.0


@dataclass(frozen=True, slots=True)
class BradleyTerry:
    """strength: [A] of each answer, in logits.
    discrimination: [W] 1 for the average annotator, 0 for one who votes at random, negative for one who prefers the worse.
    tie: [W] logit of a tie between equals against either side.
    side: [W] logits that the answer which stands first has over the other for it.
    average: [I, 3] probability that the average annotator, to whom no place means anything, says a, tie or b.
    margin, deviation: [I] strength of a minus strength of b, and its standard deviation.
    converged: the optimum was found before the last round allowed.
    """

    labels: Labels
    strength: Floats
    discrimination: Floats
    tie: Floats
    side: Floats
    average: Floats
    margin: Floats
    deviation: Floats
    rounds: int
    converged: bool

    def expected(self, votes: Votes) -> Floats:
        """[V, 3] probability of each choice for votes by these annotators on these items (what they chose is not looked at)."""
        who = votes.annotator
        x = self.discrimination[who, None] * _around(self.margin, self.deviation)[votes.item]
        return (np.exp(davidson(x + (votes.side * self.side[who])[:, None], self.tie[who, None])) @ SHARES).T


def bradley_terry(votes: Votes, *, prior: Prior | None = None, max_rounds: int = 1000) -> BradleyTerry:
    """Strengths of the answers and habits of the annotators, by penalised maximum likelihood.

    Annotator w says a, tie, b with probabilities ~ exp(x / 2), exp(tie_w), exp(-x / 2), where
    x = discrimination_w * (strength_a - strength_b) + side_w * (1 where a stands first, -1 where b does, 0 where nobody knows).
    Minimised by L-BFGS: sum of weight * -ln P(vote), plus the squares of all parameters, discrimination's from 1, over twice
    their prior variance. tie_w = a level common to all + the annotator's own.

    Given the annotators, the posterior of an item's margin is taken as normal (Laplace), and probabilities are means over it:
    a pair with few votes is not as sure as its strengths alone would say.

    Source: Bradley and Terry 1952, Biometrika 39; ties: Davidson 1970, JASA 65 (nu = exp(tie)); annotators: Chen et al. 2013
    (WSDM), who turn a share of each annotator's votes round where this has a slope, which may be negative too.

    Args:
        votes: `answers` says which items share an answer; where none do, every item has a margin of its own.
        prior: None: Prior().

    Returns:
        The fit. labels.preference: probability that the average annotator says a, a tie one half; labels.certainty: that the
        margin has the sign it has; the reliability is discrimination^2 over its mean over all votes: the information of a vote
        about the margin.
    """
    prior = prior or Prior()
    means, precision = _priors(votes, prior)
    seen = tally(votes.answers[votes.item].ravel(), votes.num_answers, np.repeat(votes.weight, 2))
    each = tally(votes.annotator, len(votes.annotators), votes.weight)
    # about the parameters' own standard deviations, so that one step length fits all of them
    scale = 1 / np.sqrt(precision + np.concatenate([seen, each, each, each, [each.sum()]]) / 8)

    def scaled(z: Floats) -> tuple[float, Floats]:
        value, gradient = objective(means + z * scale, votes, prior)
        return value, gradient * scale

    how = {"maxiter": max_rounds, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-4}
    found = minimize(scaled, np.zeros_like(means), jac=True, method="L-BFGS-B", options=how)
    strength, discrimination, own, side, common = _split(means + found.x * scale, votes)
    a, b = votes.answers.T
    margin, tie = strength[a] - strength[b], own + common
    x = discrimination[votes.annotator] * margin[votes.item] + votes.side * side[votes.annotator]
    told = votes.weight * discrimination[votes.annotator] ** 2 * _information(x, tie[votes.annotator])
    parts = _parts(votes)
    deviation = _deviations(votes, tally(votes.item, len(votes.items), told), prior.strength**-2, parts)

    average = (np.exp(davidson(_around(margin, deviation), common)) @ SHARES).T
    mean = (discrimination**2 @ each) / each.sum() if len(votes) else 1.0
    reliability = discrimination**2 / mean
    labels = Labels(
        (average[:, A] + average[:, TIE] / 2).clip(0, 1),
        ndtr(np.abs(margin) / deviation),
        tally(votes.item, len(votes.items), votes.weight * reliability[votes.annotator]),
        reliability,
        one_annotator(votes, parts[a]),
    )
    return BradleyTerry(
        labels, strength, discrimination, tie, side, average, margin, deviation, int(found.nit), bool(found.success)
    )


def davidson(x: Floats, tie: Floats) -> Floats:
    """[3, ...] ln P(a), ln P(tie), ln P(b), where P ~ exp(x / 2), exp(tie), exp(-x / 2); tie is broadcast to x."""
    logits = np.stack([x / 2, np.broadcast_to(tie, x.shape), -x / 2])
    logits -= logits.max(0)
    return logits - np.log(np.exp(logits).sum(0))


def objective(parameters: Floats, votes: Votes, prior: Prior) -> tuple[float, Floats]:
    """What is minimised, and its gradient.

    Args:
        parameters: [A + 3 W + 1] strength, discrimination, tie, side and the common level of ties.
    """
    strength, discrimination, own, side, common = _split(parameters, votes)
    who, item = votes.annotator, votes.item
    a, b = votes.answers[item].T
    margin, slope = strength[a] - strength[b], discrimination[who]
    logp = davidson(slope * margin + votes.side * side[who], own[who] + common)
    place = votes.choice, np.arange(len(votes))
    value = -votes.weight @ logp[place]
    off_by = np.exp(logp)
    off_by[place] -= 1
    off_by *= votes.weight
    by_x, by_tie = (off_by[A] - off_by[B]) / 2, off_by[TIE]
    by_margin = by_x * slope
    answers, annotators = votes.num_answers, len(votes.annotators)
    gradient = [
        tally(a, answers, by_margin) - tally(b, answers, by_margin),
        tally(who, annotators, by_x * margin),
        tally(who, annotators, by_tie),
        tally(who, annotators, by_x * votes.side),
        by_tie.sum(keepdims=True),
    ]
    means, precision = _priors(votes, prior)
    off = parameters - means
    return float(value + off**2 @ precision / 2), np.concatenate(gradient) + precision * off


def _split(parameters: Floats, votes: Votes) -> list[Floats]:
    sizes = [votes.num_answers, *[len(votes.annotators)] * 3]
    return np.split(parameters, np.cumsum(sizes))


def _priors(votes: Votes, prior: Prior) -> tuple[Floats, Floats]:
    """Means and precisions of the parameters, in their order."""
    sizes = [votes.num_answers, *[len(votes.annotators)] * 3, 1]
    return np.repeat([0.0, 1.0, 0.0, 0.0, 0.0], sizes), np.repeat(np.array(prior) ** -2.0, sizes)


def _around(margin: Floats, deviation: Floats) -> Floats:
    """[I, 9] the nodes of the mean over a normal distribution."""
    return margin[:, None] + deviation[:, None] * NODES


def _information(x: Floats, tie: Floats) -> Floats:
    """Fisher information of one vote about x: the variance of (1 where it says a, -1 where b) / 2."""
    p = np.exp(davidson(x, tie))
    return (p[A] + p[B] - (p[A] - p[B]) ** 2) / 4


def _parts(votes: Votes) -> Ints:
    """[A] the number of each answer's part; answers of one item are in one, and so on from item to item."""
    n, (a, b) = votes.num_answers, votes.answers.T
    return connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False)[1].astype(np.int64)


def _deviations(votes: Votes, information: Floats, precision: float, parts: Ints) -> Floats:
    """[I] standard deviation of each margin. The covariance of the strengths is, part by part, the inverse of
    precision * 1 + sum over items of information * (e_a - e_b)(e_a - e_b)'. In a part of more than LARGEST answers every item
    is given what its own votes say alone: a deviation that is never too small."""
    a, b = votes.answers.T
    found = 1 / np.sqrt(precision / 2 + information)
    size = np.bincount(parts)
    order = np.argsort(parts, kind="stable")
    place = np.empty(len(parts), dtype=np.int64)  # of an answer in its part
    place[order] = np.arange(len(parts)) - np.repeat(np.cumsum(size) - size, size)
    for chosen, width in _batches(size):
        number = np.full(len(size), -1)
        number[chosen] = np.arange(len(chosen))
        mine = np.flatnonzero(number[parts[a]] >= 0)
        n, i, j, k = number[parts[a[mine]]], place[a[mine]], place[b[mine]], information[mine]
        matrix = np.tile(precision * np.eye(width), (len(chosen), 1, 1))
        for row, column, value in ((i, i, k), (j, j, k), (i, j, -k), (j, i, -k)):
            np.add.at(matrix, (n, row, column), value)
        inverse = np.linalg.inv(matrix)
        found[mine] = np.sqrt(inverse[n, i, i] + inverse[n, j, j] - 2 * inverse[n, i, j])
    return found


def _batches(size: Ints) -> Iterator[tuple[Ints, int]]:
    """(numbers of parts, their size): parts of one size, as many as are inverted at once."""
    for width in np.unique(size[size <= LARGEST]).tolist():
        same = np.flatnonzero(size == width)
        step = max(1, AT_ONCE // width**2)
        yield from ((same[start : start + step], width) for start in range(0, len(same), step))
