"""Votes to labels on people's own votes: how well the votes that were held out are foretold, and how far people agree.

    python benchmarks/votes.py --ukp pairs_with_votes.jsonl.gz --pandalm testset-v1.json

UKPConvArg1: of every pair one vote is drawn (seeded) and held out. Each method sees the others and says how likely each choice
of that annotator on that pair is; printed is the log-loss in nats per vote. The majority is the share of the pair's other
votes, smoothed towards the share of all votes with the constant that is best on the held-out votes themselves: a tuning in its
favour alone. The models take their defaults, round numbers that no held-out vote has chosen; what halving and doubling each
of them does is printed too. Which argument stood first the data does not say, and no method is told. The gold labels were made
from the same votes, by a model of another kind (MACE): agreeing with them is a fit, not a test.
PandaLM: Cohen's kappa of its three annotators, and the majorities.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import common
import numpy as np
from scipy.optimize import minimize_scalar

from preftune.labels.agreement import agreement, cohen_kappa, pair_tables
from preftune.labels.annotators import to_look_at
from preftune.labels.bradley_terry import Prior, bradley_terry
from preftune.labels.comparisons import METHODS
from preftune.labels.dawid_skene import SMOOTHING, dawid_skene
from preftune.labels.labels import majority
from preftune.labels.votes import CHOICES, Votes
from preftune.records import By, Vote

RESAMPLES = 2000
PLAIN = Prior(discrimination=1e-3, tie=1e-3, side=1e-3)  # all annotators alike
UKP = {"a1": "a", "a2": "b", "equal": "tie"}
PANDALM = {0: "tie", 1: "a", 2: "b"}


def interval(values: np.ndarray[Any, Any], clusters: np.ndarray[Any, Any] | None = None) -> list[float]:
    """[mean, low, high]: 95 %, bootstrap over the values, or over the clusters they stand in."""
    place = np.arange(len(values)) if clusters is None else clusters
    sums, many = np.bincount(place, values), np.bincount(place)
    draw = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for n in range(RESAMPLES):
        drawn = draw.integers(0, len(sums), len(sums))
        means[n] = sums[drawn].sum() / many[drawn].sum()
    return [float(values.mean()), *np.percentile(means, [2.5, 97.5]).tolist()]


def held_out(votes: Votes, seed: int) -> tuple[Votes, Votes]:
    """(the other votes, one vote of every item)."""
    order = np.lexsort((np.random.default_rng(seed).random(len(votes)), votes.item))
    first = order[np.searchsorted(votes.item[order], np.arange(len(votes.items)))]
    held = np.zeros(len(votes), dtype=bool)
    held[first] = True
    return votes.where(~held), votes.where(held)


def smoothed(train: Votes, held: Votes) -> tuple[float, np.ndarray[Any, Any]]:
    """(the best constant, losses of the held-out votes under the smoothed shares)."""
    counts = train.counts()
    overall = counts.sum(0) / counts.sum()

    def losses(constant: float) -> np.ndarray[Any, Any]:
        shares = (counts + constant * overall) / (counts.sum(1, keepdims=True) + constant)
        return -np.log(shares[held.item, held.choice])

    best = minimize_scalar(lambda constant: losses(constant).mean(), bounds=(0.01, 100), method="bounded").x
    return float(best), losses(best)


def loss_of(said: np.ndarray[Any, Any], held: Votes) -> np.ndarray[Any, Any]:
    return -np.log(said[np.arange(len(held)), held.choice])


def foretold(votes: Votes, topics: np.ndarray[Any, Any], seed: int) -> dict[str, Any]:
    """Losses of each method, and by how much the models are below the majority."""
    train, held = held_out(votes, seed)
    topics = topics[held.item]
    constant, plain = smoothed(train, held)
    losses = {
        "majority": plain,
        "dawid_skene": loss_of(dawid_skene(train).expected(held), held),
        "bradley_terry": loss_of(bradley_terry(train).expected(held), held),
        "bradley_terry, annotators alike": loss_of(bradley_terry(train, prior=PLAIN).expected(held), held),
    }
    return {
        "seed": seed,
        "votes": [len(train), len(held)],
        "constant": constant,
        "log_loss": {name: interval(x) for name, x in losses.items()},
        "below_majority": {name: interval(plain - x) for name, x in losses.items() if name != "majority"},
        "below_majority_by_topic": {name: interval(plain - x, topics) for name, x in losses.items() if name != "majority"},
    }


def other_settings(votes: Votes) -> Iterator[dict[str, Any]]:
    """The loss with each setting halved and doubled: how much hangs on the defaults."""
    train, held = held_out(votes, 0)
    for factor in (0.5, 2.0):
        said = dawid_skene(train, smoothing=SMOOTHING * factor).expected(held)
        yield {"setting": "smoothing", "value": SMOOTHING * factor, "log_loss": float(loss_of(said, held).mean())}
        for name, value in Prior()._asdict().items():
            said = bradley_terry(train, prior=Prior()._replace(**{name: value * factor})).expected(held)
            yield {"setting": f"prior.{name}", "value": value * factor, "log_loss": float(loss_of(said, held).mean())}


def with_gold(votes: Votes, gold: np.ndarray[Any, Any]) -> dict[str, float]:
    """Share of pairs whose likeliest choice, from all votes, is the gold one. The majority takes, of choices that are equally
    frequent, the one that was said first."""
    counts = votes.numbers()
    first = np.full(counts.shape, len(votes))
    np.minimum.at(first, (votes.item, votes.choice), np.arange(len(votes)))
    most = np.lexsort((first.ravel(), -counts.ravel(), np.repeat(np.arange(len(counts)), 3)))[::3] % 3
    said = {
        "majority": most,
        "dawid_skene": dawid_skene(votes).posterior.argmax(1),
        "bradley_terry": bradley_terry(votes).average.argmax(1),
    }
    known = gold >= 0
    return {name: float((found == gold)[known].mean()) for name, found in said.items()}


def timed(votes: Votes) -> dict[str, float]:
    """Seconds on all votes, the best of three."""
    found = dict[str, float]()
    for name, work in {**METHODS, "agreement": agreement, "pairs": pair_tables, "to look at": to_look_at}.items():
        for _ in range(3):
            began = time.perf_counter()
            work(votes)
            found[name] = min(found.get(name, math.inf), time.perf_counter() - began)
    return found


def ukp(path: Path, seeds: int) -> dict[str, Any]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    began = time.perf_counter()
    records = [
        Vote(row["id"], UKP[v["value"]], By(v["worker"], kind="person", time=v["submit"], reason=v["reason"] or ""))
        for row in rows
        for v in row["votes"]
    ]
    votes = Votes.of(records, {row["id"]: (row["a1"], row["a2"]) for row in rows})
    seconds = {"arrays": time.perf_counter() - began, **timed(votes)}
    gold = np.array([CHOICES.index(UKP[row["gold"]]) if row["gold"] else -1 for row in rows])
    _, topics = np.unique([row["id"].partition("#")[0] for row in rows], return_inverse=True)
    return {
        "items": len(votes.items),
        "annotators": len(votes.annotators),
        "votes": len(votes),
        "held_out": [foretold(votes, topics, seed) for seed in range(seeds)],
        "other_settings": list(other_settings(votes)),
        "gold": {"pairs": int((gold >= 0).sum()), "agreement": with_gold(votes, gold)},
        "agreement": {name: value for name, value in described(votes).items()},
        "seconds": {**seconds, "all": sum(seconds.values())},
    }


def described(votes: Votes) -> dict[str, Any]:
    found = agreement(votes)
    named = [suspect.reason for suspect in to_look_at(votes)]
    return {
        **{name: list(getattr(found, name)) for name in ("raw", "alpha_nominal", "alpha_ordinal", "fleiss")},
        "to_look_at": {reason: named.count(reason) for reason in sorted(set(named))},
    }


def pandalm(path: Path) -> dict[str, Any]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    names = ("annotator1", "annotator2", "annotator3")
    records = [Vote(str(row["idx"]), PANDALM[row[name]], By(name, kind="person")) for row in rows for name in names]
    votes = Votes.of(records)
    pairs, tables = pair_tables(votes)
    kappas = dict(zip((f"{i + 1} and {j + 1}" for i, j in pairs.tolist()), cohen_kappa(tables).tolist(), strict=True))
    leaning = majority(votes).preference
    most = np.bincount(votes.numbers().argmax(1), minlength=3).tolist()
    return {
        "items": len(votes.items),
        "kappas": kappas,
        "majorities": dict(zip(CHOICES, most, strict=True)),
        "leaning": {"a": int((leaning > 0.5).sum()), "b": int((leaning < 0.5).sum())},
        "agreement": described(votes),
    }


def main() -> None:
    parser = common.arguments(__doc__, data=False)
    parser.add_argument("--ukp", type=Path, required=True, help="pairs_with_votes.jsonl.gz of UKPConvArg1")
    parser.add_argument("--pandalm", type=Path, required=True, help="testset-v1.json of PandaLM")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the held-out votes")
    words = parser.parse_args()
    result = {"ukp": ukp(words.ukp, words.seeds), "pandalm": pandalm(words.pandalm)}
    result["versions_of"] = {name: metadata.version(name) for name in ("numpy", "scipy")}
    for draw in result["ukp"]["held_out"]:
        print(f"held out, seed {draw['seed']}: log-loss, nats per vote (95 %)")
        for name, (mean, low, high) in draw["log_loss"].items():
            print(f"  {name:34} {mean:.4f} ({low:.4f} to {high:.4f})")
    settings = [x["log_loss"] for x in result["ukp"]["other_settings"]]
    print(f"settings halved and doubled: {min(settings):.4f} to {max(settings):.4f}")
    gold = ", ".join(f"{name} {share:.2%}" for name, share in result["ukp"]["gold"]["agreement"].items())
    print(f"agreement with the gold made from the same votes (a fit): {gold}")
    print(f"{result['ukp']['votes']:,} votes:", ", ".join(f"{k} {s:.2f} s" for k, s in result["ukp"]["seconds"].items()))
    kappas = ", ".join(f"{pair} {kappa:.3f}" for pair, kappa in result["pandalm"]["kappas"].items())
    print(f"pandalm: kappas {kappas}; majorities {result['pandalm']['majorities']}")
    common.write(words, "votes", result)


if __name__ == "__main__":
    main()
