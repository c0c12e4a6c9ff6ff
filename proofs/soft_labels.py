"""Soft labels against hard ones: reward models trained on the votes of several people, on topics that were held out.

UKPConvArg1 (Habernal and Gurevych 2016, ACL; CC BY 4.0) has pairs of arguments on a debate, five votes each. The packaged model
becomes a reward model four times a seed, on the same pairs: with the label that most votes say (pairs without
one left out), with the share of votes, and with the probabilities of Dawid-Skene and of Bradley-Terry. Every model is held to
the votes on debates that it has not seen, and to their majorities.

    python proofs/soft_labels.py [--ukp FOLDER]

FOLDER has arguments.jsonl.gz (id, topic, debate, stance, text) and pairs_with_votes.jsonl.gz (id, a1, a2, votes).
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import common
import torch

from preftune import labels
from preftune.data.render import render
from preftune.demo.experiment import model_folder
from preftune.evaluation.calibration import calibration
from preftune.methods.pairs import comparisons, right_sign
from preftune.models.load import load_tokenizer
from preftune.models.reward import load_reward
from preftune.records import By, Comparison, Group, Mark, Response
from preftune.runs.fit import fit
from preftune.scoring.score import score

SEEDS, HELD_DEBATES, PAIRS, CHUNK = 5, 4, 1500, 8
SAID = {"a1": 1.0, "equal": 0.5, "a2": 0.0}
LENGTH = 128  # tokens of topic and argument; the end of longer ones is cut
SETTINGS: dict[str, Any] = {
    "batch_size": 32, "learning_rate": 3e-4, "epochs": 1.0, "max_length": LENGTH, "dtype": "float32",
    "data": {"too_long": "truncate_response"}, "train": {"tokens_per_microbatch": 4096},
}  # fmt: skip
ARMS = ("hard", *labels.METHODS)
NAMES = {"hard": "majority, hard", "majority": "share of votes", "dawid_skene": "Dawid-Skene", "bradley_terry": "Bradley-Terry"}
FIGURES = {
    "votes/log_loss": "log-loss of a vote",
    "votes/ece": "ECE, votes",
    "majority/log_loss": "log-loss of the majority",
    "majority/ece": "ECE, majority",
    "accuracy": "accuracy",
}


def debates(folder: Path) -> dict[str, list[Group]]:
    """The groups of each debate, one for each side of it: its arguments, and a Comparison for each vote."""

    def rows(name: str) -> list[dict[str, Any]]:
        with gzip.open(folder / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    arguments = {row["id"]: row for row in rows("arguments.jsonl.gz")}
    texts: dict[str, dict[str, int]] = {}
    marks: dict[str, list[Mark]] = {}
    for row in rows("pairs_with_votes.jsonl.gz"):
        topic = arguments[row["a1"]]["topic"]
        own = texts.setdefault(topic, {})
        a, b = (own.setdefault(f" {arguments[row[side]]['text'].strip()}", len(own)) for side in ("a1", "a2"))
        if a != b:
            cast = [Comparison(a, b, SAID[v["value"]], by=By(v["worker"], kind="person")) for v in row["votes"]]
            marks.setdefault(topic, []).extend(cast)
    found: dict[str, list[Group]] = {}
    about = {row["topic"]: row for row in arguments.values()}
    for topic, own in texts.items():
        prompt = f"{about[topic]['debate']} {about[topic]['stance']}\n"
        group = Group(prompt, tuple(map(Response, own)), tuple(marks[topic]), user_id=topic)
        found.setdefault(about[topic]["debate"], []).append(group)
    return found


def pairs_of(groups: Sequence[Group]) -> list[tuple[Group, Comparison]]:
    return [(group, mark) for group in groups for mark in group.marks if isinstance(mark, Comparison)]


def label(groups: Sequence[Group], arm: str) -> list[tuple[Group, Comparison]]:
    """A Comparison for each pair, in the order in which they were read; a hard one says what most do, or 0.5."""
    found = pairs_of(labels.merged(groups, "majority" if arm == "hard" else arm))
    return [(g, hardened(mark)) for g, mark in found] if arm == "hard" else found


def hardened(mark: Comparison) -> Comparison:
    """a or b, whichever has more votes; a tie where they have equally many."""
    return replace(mark, preference=0.5 + 0.5 * ((mark.preference > 0.5) - (mark.preference < 0.5)), weight=1.0)


def chunks(pairs: Sequence[tuple[Group, Comparison]], chosen: Sequence[int]) -> list[Group]:
    """Groups of up to 8 pairs of one topic: a step holds pairs of several, and arguments of a group are scored once."""
    by_topic: dict[str, list[int]] = {}
    for n in chosen:
        by_topic.setdefault(pairs[n][0].id, []).append(n)
    found: list[Group] = []
    for topic, own in by_topic.items():
        for start in range(0, len(own), CHUNK):
            group, marks = pairs[own[start]][0], [pairs[n][1] for n in own[start : start + CHUNK]]
            small = group.restricted(marks, sorted({r for mark in marks for r in mark.responses}))
            found.append(replace(small, user_id=f"{topic} {start}"))
    return found


def measured(model: Any, tokenizer: Any, held: Sequence[Group]) -> dict[str, float]:
    """Held to the votes on pairs of unseen debates, and to their majorities."""
    soft = labels.merged(held, "majority")
    batch = render(soft, tokenizer, max_length=LENGTH, too_long="truncate_response")
    with torch.no_grad():
        rewards = score(model, batch, head="scalar").scalar
    assert rewards is not None
    examples = comparisons(batch.groups)
    index = torch.tensor([[batch.index(e.group, r) for r in e.responses] for e in examples])
    margin = rewards[index[:, 0]] - rewards[index[:, 1]]
    share = torch.tensor([e.preference for e in examples])
    decided = share != 0.5
    votes, most = calibration(margin, share), calibration(margin[decided], torch.ones(int(decided.sum())))
    found = {f"votes/{key}": votes[key] for key in ("log_loss", "ece")} | {
        f"majority/{key}": most[key] for key in ("log_loss", "ece")
    }
    return found | {"accuracy": float(right_sign(margin, share).nanmean()), "pairs": float(len(share))}


def one(found: dict[str, list[Group]], job: tuple[int, str]) -> dict[str, float]:
    """A reward model of one kind of labels and one seed, which draws the debates held out, the pairs, and the new head."""
    logging.getLogger("preftune").setLevel(logging.ERROR)
    seed, arm = job
    tokenizer, order = load_tokenizer(model_folder()), sorted(found)
    random.Random(seed).shuffle(order)
    held, train = ([g for name in part for g in found[name]] for part in (order[:HELD_DEBATES], order[HELD_DEBATES:]))
    pairs = label(train, arm)
    chosen = sorted(random.Random(seed).sample(range(len(pairs)), min(PAIRS, len(pairs))))
    if arm == "hard":  # a tie says nothing
        chosen = [n for n in chosen if pairs[n][1].preference != 0.5]
    data = chunks(pairs, chosen)
    model = load_reward(model_folder(), seed=seed)
    began = time.perf_counter()
    fit(model, tokenizer, data, method="reward", eval_groups=data[:1], seed=seed, **SETTINGS)
    seconds = time.perf_counter() - began
    figures = measured(model, tokenizer, held) | {"trained_on": float(sum(len(g.marks) for g in data)), "seconds": seconds}
    print(seed, arm, {key: round(value, 4) for key, value in figures.items()}, flush=True)
    return figures


def draw(figure: Any, runs: dict[str, list[dict[str, float]]]) -> None:
    panels = figure.subplots(1, 3)
    shown = ("votes/log_loss", "accuracy", "votes/ece")
    for axes, key in zip(panels, shown, strict=True):
        for n, arm in enumerate(runs):
            values = [run[key] for run in runs[arm]]
            axes.plot([n] * len(values), values, "o", color=common.INKS[n], markersize=4, alpha=0.6)
            axes.plot([n - 0.25, n + 0.25], [fmean(values)] * 2, color=common.INKS[n], linewidth=2)
        axes.set_xticks(range(len(runs)), [NAMES[arm] for arm in runs], fontsize=7, rotation=20)
        axes.set_title(FIGURES[key], fontsize=9)
        axes.tick_params(axis="y", labelsize=8)


def spread(values: Sequence[float], form: str = ".4f") -> str:
    return f"{fmean(values):{form}} ± {stdev(values):.4f}"


def against_hard(runs: dict[str, list[dict[str, float]]], arm: str, key: str) -> str:
    """Mean difference within a seed, and its 95 % interval (Student, four degrees of freedom)."""
    gaps = [own[key] - hard[key] for own, hard in zip(runs[arm], runs["hard"], strict=True)]
    half = 2.776 * stdev(gaps) / len(gaps) ** 0.5
    return f"{fmean(gaps):+.4f} ({fmean(gaps) - half:+.4f} to {fmean(gaps) + half:+.4f})"


def report(runs: dict[str, list[dict[str, float]]]) -> None:
    hard, tokens = runs["hard"], SETTINGS["batch_size"]
    head = f"{min(r['pairs'] for r in hard):,.0f} to {max(r['pairs'] for r in hard):,.0f}"
    text = [
        f"UKPConvArg1: {SEEDS} seeds, each with {HELD_DEBATES} of the 16 debates held out ({head} pairs; no arm sees their "
        f"votes) and {PAIRS:,} pairs of the others to train on, a part of what there is, to keep runs short. The "
        f"packaged model (2.8 million weights, of film reviews) with a new head, one epoch of steps of {tokens} pairs at "
        f"{SETTINGS['learning_rate']:g}, arguments cut at {LENGTH} tokens. Hard labels leave out the "
        f"{PAIRS - fmean(r['trained_on'] for r in hard):.0f} pairs (mean) on which as many are for one side as for the other. "
        "Mean ± standard deviation over the seeds; nats. A vote for neither counts half for each.",
        "![log-loss, accuracy and calibration](soft_labels.png)",
        common.table(
            ["labels", *FIGURES.values()],
            [[NAMES[arm], *(spread([r[key] for r in own]) for key in FIGURES)] for arm, own in runs.items()],
        ),
        "Against hard labels, within a seed (95 % interval):",
        common.table(
            ["labels", *FIGURES.values()],
            [[NAMES[arm], *(against_hard(runs, arm, key) for key in FIGURES)] for arm in runs if arm != "hard"],
        ),
    ]
    common.picture("soft_labels", lambda figure: draw(figure, runs), size=(9.5, 3.2))
    common.write("soft_labels", "Soft labels from votes", "\n\n".join(text), {"settings": SETTINGS, "runs": runs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[2] / "shared" / "data" / "ukp_convarg"
    parser.add_argument("--ukp", type=Path, default=default, help="folder of UKPConvArg1")
    folder = parser.parse_args().ukp
    if not (folder / "pairs_with_votes.jsonl.gz").is_file():
        print(f"skipped: no pairs_with_votes.jsonl.gz in {folder}; --ukp names the folder of UKPConvArg1")
        return
    jobs = [(seed, arm) for seed in range(SEEDS) for arm in ARMS]
    with common.workers() as pool:
        measured_by = dict(zip(jobs, pool.map(partial(one, debates(folder)), jobs), strict=True))
    report({arm: [measured_by[seed, arm] for seed in range(SEEDS)] for arm in ARMS})


if __name__ == "__main__":
    main()
