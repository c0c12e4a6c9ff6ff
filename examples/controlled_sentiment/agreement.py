"""What the lexicon's win rate in the demo can be expected to reach: how often it sides with people and with the scorer.

    python examples/controlled_sentiment/agreement.py

prints, as JSON, how often the opinion lexicon prefers (a tie counts one half)

    people        a positive passage of people's own to one drawn from as many positive as negative ones
    labels        the answer that the sentiment scorer prefers, over all pairs of the demo's training answers
    best_of_four  the answer that the sentiment scorer likes best of an opening's four, to another of them

People's passages are two labelled sentences of one polarity, cut to as many words as the model's answers have.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from corpus import BUILD, share

from preftune.demo import experiment, scorers
from preftune.models.load import load_model, load_tokenizer

DRAWS = 200_000


def wins(pairs: Sequence[tuple[float, float]]) -> float:
    return round(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs), 3)


def people(path: Path, words: int) -> float:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    passages: dict[int, list[str]] = {}
    for label in (0, 1):
        texts = sorted(
            (r["text"] for r in rows if r["kind"] == "sentence" and r["label"] == label), key=lambda t: share(t, "pair")
        )
        joined = [f"{a} {b}" for a, b in zip(texts[::2], texts[1::2], strict=False)]
        passages[label] = [" ".join(text.split()[:words]) for text in joined]
    liked = [scorers.lexicon([""] * len(texts), texts) for texts in (passages[0], passages[1])]
    draw = random.Random(0)
    return wins([(draw.choice(liked[1]), draw.choice(liked[draw.randrange(2)])) for _ in range(DRAWS)])


def answers(count: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]], float]:
    """The lexicon's values of (preferred, other) over all pairs and over (best, other), and the mean words of an answer."""
    tokenizer, model = load_tokenizer(experiment.model_folder()), load_model(experiment.model_folder())
    openings = experiment.sample_openings(model, tokenizer, count, 0)
    found = experiment.continuations(model, tokenizer, openings, samples=experiment.SAMPLES, seed=1)
    pairs: list[tuple[float, float]] = []
    best: list[tuple[float, float]] = []
    for n, opening in enumerate(openings):
        texts = [s.text for s in found if s.prompt_index == n]
        reward, liked = (score([opening] * len(texts), texts) for score in (scorers.sentiment, scorers.lexicon))
        for a, b in combinations(range(len(texts)), 2):
            pairs.append((liked[a], liked[b]) if reward[a] > reward[b] else (liked[b], liked[a]))
        first = max(range(len(texts)), key=reward.__getitem__)
        best += [(liked[first], liked[n]) for n in range(len(texts)) if n != first]
    return pairs, best, sum(len(s.text.split()) for s in found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="How far the demo's two scorers agree.")
    parser.add_argument("--data", type=Path, default=BUILD)
    pairs, best, words = answers(experiment.TRAIN_PROMPTS)
    found = people(parser.parse_args().data / "labelled_train.jsonl", round(words))
    print(json.dumps({"words": round(words), "people": found, "labels": wins(pairs), "best_of_four": wins(best)}))


if __name__ == "__main__":
    main()
