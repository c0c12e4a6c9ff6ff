"""The demo's two judges of film-review text: `sentiment` labels the training pairs, `lexicon` only evaluates.

Both are `scorer=preftune.demo.scorers:NAME` functions: lists of prompts and of responses in, one number per response
out, higher is more positive. They know no words, only 64-bit hashes of them, so that no corpus text is shipped;
`examples/controlled_sentiment/make_scorer.py` makes both files and measures their accuracy.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib import resources
from itertools import pairwise

from safetensors.numpy import load

WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")  # don't, it's and well-made are one word each


def words(text: str) -> list[str]:
    """The words of a text, lower-cased, without punctuation: the one tokenisation that both scorers use."""
    return WORD.findall(text.lower().replace("’", "'"))


@lru_cache(maxsize=1 << 17)
def key(feature: str) -> int:
    """64 bits of BLAKE2b over a word, or over two neighbouring words with a space between: the same everywhere."""
    return int.from_bytes(hashlib.blake2b(feature.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def features(text: str) -> set[str]:
    """The distinct words and pairs of neighbouring words: saying a word again changes nothing."""
    found = words(text)
    return {*found, *map(" ".join, pairwise(found))}


@cache
def weights(name: str) -> dict[int, float]:
    """The hashed features of one packaged file, with their weights."""
    tensors = load(resources.files("preftune.demo").joinpath("assets", f"{name}.safetensors").read_bytes())
    return dict(zip(tensors["keys"].tolist(), tensors["weights"].tolist(), strict=True))


def log_odds(present: Iterable[str], weight: dict[int, float]) -> float:
    """sum(weight of the features present) / sqrt(number of features present), in nats; 0 for no features.

    The square root keeps the spread of the score alike over lengths: the sum of n unrelated weights grows with
    sqrt(n). Features without a weight count in n, so filler dilutes. float16 weights add up exactly in float64: the
    same features in another order give the same number.
    """
    found = list(present)
    return sum(weight.get(key(feature), 0.0) for feature in found) / math.sqrt(len(found)) if found else 0.0


def sentiment(prompts: list[str], responses: list[str]) -> list[float]:
    """The log-odds (nats) that prompt and response, read as one passage, are positive; 0 where nothing is known.

    As in the DPO paper, Section 6 and Appendix C, the whole passage is judged. sigmoid(sentiment(a) - sentiment(b))
    is the Bradley-Terry probability that a is preferred to b.

    >>> good, bad = sentiment(["the film is"] * 2, [" a moving and wonderful story .", " a dull and boring mess ."])
    >>> good > 0 > bad
    True
    """
    known = weights("sentiment")
    return [log_odds(features(p + r), known) for p, r in zip(prompts, responses, strict=True)]


def lexicon(prompts: list[str], responses: list[str]) -> list[float]:
    """(positive words - negative words) / words of the *response*, in [-1, 1]; 0 for a response without words.

    Only the response is judged: with the prompt's own words in the sum, responses equal in all but length would not
    tie. The word list is Bing Liu's opinion lexicon, which had no part in the training pairs' labels.

    >>> lexicon(["the film is"], [" good , not bad , and long"])
    [0.0]
    """
    known = weights("lexicon")
    scores: list[float] = []
    for _, response in zip(prompts, responses, strict=True):
        found = words(response)
        scores.append(sum(known.get(key(word), 0.0) for word in found) / max(len(found), 1))
    return scores
