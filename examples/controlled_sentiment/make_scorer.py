"""The two sentiment scorers of `preftune demo`.

    python examples/controlled_sentiment/make_scorer.py

reads the labelled rows of corpus.py and writes into src/preftune/demo/assets/

    sentiment.safetensors   logistic regression on the words and word pairs of a text, as hashes with weights
    lexicon.safetensors     Bing Liu's opinion lexicon, as hashes with signs

The regression's mixture of texts and its penalty are chosen, and its temperature is fitted, on a tenth of the training
text; then it is fitted anew on all of it. The accuracies printed, and kept in the file, are those of the finished files
on the held-out text, through `preftune.demo.scorers` itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import BUILD, ROOT, decode, find_zip, share
from safetensors.numpy import save
from torch.nn.functional import embedding_bag, softplus

import preftune.demo.scorers as scorers

ASSETS = ROOT / "src" / "preftune" / "demo" / "assets"
KINDS = ("sentence", "pair", "passage", "review")
MIXTURES = ((1, 0, 0, 0), (0, 0, 1, 0), (1, 0, 1, 0), (1, 0, 1, 0.5), (1, 1, 1, 0.5), (1, 1, 1, 0))  # shares of KINDS
PENALTIES = (1e-6, 3e-6, 1e-5)
VALIDATION = 0.1
FEWEST = 3  # sentences or passages that a feature must stand in
MOST_FEATURES = 60_000  # 10 bytes each
LICENCE = "Creative Commons Attribution 4.0 International"
REVIEWS = (
    "Trained on the Sentiment Polarity Dataset Version 2.0 (2004) and the Sentence Polarity Dataset v1.0 (2005) by Bo "
    "Pang and Lillian Lee, http://www.cs.cornell.edu/people/pabo/movie-review-data/, as distributed by NLTK"
)
LEXICON = (
    "Opinion Lexicon by Bing Liu, http://www.cs.uic.edu/~liub/FBS/sentiment-analysis.html#datasets, as distributed by "
    "NLTK; Minqing Hu and Bing Liu, Mining and Summarizing Customer Reviews, KDD 2004. Changes: words are hashed; "
    "words listed as both positive and negative, and entries that are no single word, are left out"
)


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    label: int
    kind: str
    fold: float


def read_texts(path: Path) -> list[Text]:
    """The rows of a labelled file, and pairs of its sentences.

    A passage carries its whole review's label, often wrongly. Two sentences of one polarity are as long as a passage
    and their label is right: kind "pair".
    """
    rows = [Text(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    for label, validation in itertools.product((0, 1), (False, True)):
        part = [r for r in rows if r.kind == "sentence" and r.label == label and (r.fold < VALIDATION) == validation]
        part.sort(key=lambda r: share(r.text, "pair"))
        for a, b in zip(part[::2], part[1::2], strict=False):
            rows.append(Text(f"{a.text} {b.text}", label, "pair", a.fold))
    return rows


def vocabulary(texts: list[Text]) -> dict[str, int]:
    """A column for every word and word pair that stands in at least FEWEST sentences or passages."""
    counts = Counter(f for t in texts if t.kind in ("sentence", "passage") for f in scorers.features(t.text))
    return {f: i for i, f in enumerate(sorted(f for f, n in counts.items() if n >= FEWEST))}


class Rows:
    """Texts as sparse rows: each known feature that is present counts 1 / sqrt(number of features present)."""

    def __init__(self, texts: list[Text], column: dict[str, int]) -> None:
        present = [scorers.features(t.text) for t in texts]
        columns = [sorted(column[f] for f in found if f in column) for found in present]
        self.sizes = torch.tensor([len(c) for c in columns])
        self.columns = torch.tensor(list(itertools.chain.from_iterable(columns)))
        self.values = torch.tensor([max(len(found), 1) ** -0.5 for found in present]).repeat_interleave(self.sizes)
        self.sign = torch.tensor([2.0 * t.label - 1 for t in texts])
        self.kind = torch.tensor([KINDS.index(t.kind) for t in texts])

    def __matmul__(self, weight: torch.Tensor) -> torch.Tensor:
        starts = self.sizes.cumsum(0) - self.sizes
        table, values = weight[:, None], self.values
        return embedding_bag(self.columns, table, starts, mode="sum", per_sample_weights=values).squeeze(1)

    def log_count_ratio(self, num_columns: int) -> torch.Tensor:
        """|log(share of a feature in the positive texts / in the negative ones)|, every count plus one.

        Scaling the features by it is the NB-SVM of Wang and Manning (ACL 2012): one-sided words are shrunk less.
        """
        rows = (self.kind == KINDS.index("sentence")) | (self.kind == KINDS.index("passage"))
        logs: list[torch.Tensor] = []
        for sign in (1.0, -1.0):
            counted = (rows & (self.sign == sign)).repeat_interleave(self.sizes)
            counts = self.columns[counted].bincount(minlength=num_columns) + 1.0
            logs.append((counts / counts.sum()).log())
        return (logs[0] - logs[1]).abs()

    def mean_by_kind(self, values: torch.Tensor) -> dict[str, float]:
        return {name: float(values[self.kind == k].mean()) for k, name in enumerate(KINDS)}


def fit(rows: Rows, num_columns: int, mixture: tuple[float, ...], penalty: float) -> torch.Tensor:
    """The weights w that minimise, with each kind's share of the mixture spread over its texts,

        sum(share * log(1 + exp(-sign * Xw))) + penalty / 2 * |w / scale|^2.

    No intercept: the classes are balanced, and a text without known words has log-odds 0.
    """
    shares = (torch.tensor(mixture) / sum(mixture) / rows.kind.bincount(minlength=len(KINDS)))[rows.kind]
    scale = rows.log_count_ratio(num_columns)
    scale = scale / scale.square().mean().sqrt()
    scaled = torch.zeros(num_columns, requires_grad=True)
    optimizer = torch.optim.LBFGS([scaled], max_iter=60, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = softplus(-rows.sign * (rows @ (scaled * scale)))
        loss = (shares * losses).sum() + penalty / 2 * scaled.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (scaled * scale).detach()


def choose(train: Rows, check: Rows, num_columns: int) -> tuple[tuple[float, ...], float, float]:
    """The mixture, penalty and temperature with the least loss on texts set aside, meaned over the kinds of demo length
    (all but whole reviews). Every candidate is printed."""
    found: list[tuple[float, tuple[float, ...], float, float]] = []
    for mixture, penalty in itertools.product(MIXTURES, PENALTIES):
        z = check @ fit(train, num_columns, mixture, penalty)

        def loss_at(temperature: float, z: torch.Tensor = z) -> float:
            losses = check.mean_by_kind(softplus(-check.sign * z / temperature))
            return (losses["sentence"] + losses["pair"] + losses["passage"]) / 3

        temperature = min((10 ** (exponent / 50) for exponent in range(-50, 51)), key=loss_at)
        loss = loss_at(temperature)
        accuracies = check.mean_by_kind((z * check.sign > 0).float())
        row = " ".join(f"{name} {accuracy:.3f}" for name, accuracy in accuracies.items())
        print(f"mixture {mixture} penalty {penalty:g} temperature {temperature:.2f} loss {loss:.4f} accuracy {row}")
        found.append((loss, mixture, penalty, temperature))
    return min(found)[1:]


def sentiment_weights(texts: list[Text]) -> tuple[dict[str, float], dict[str, str]]:
    """Features with their calibrated weights, the largest ones only; and the choices made."""
    train, check = ([t for t in texts if (t.fold < VALIDATION) == aside] for aside in (False, True))
    column = vocabulary(train)
    mixture, penalty, temperature = choose(Rows(train, column), Rows(check, column), len(column))
    column = vocabulary(texts)
    weight = fit(Rows(texts, column), len(column), mixture, penalty) / temperature
    kept = set(weight.abs().argsort(descending=True, stable=True)[:MOST_FEATURES].tolist())
    choices = {
        "mixture": ", ".join(f"{kind} {part:g}" for kind, part in zip(KINDS, mixture, strict=True)),
        "penalty": f"{penalty:g}",
        "temperature": f"{temperature:.3f}",
        "features": f"{len(kept)} of {len(column)}",
    }
    return {f: float(weight[i]) for f, i in column.items() if i in kept}, choices


def with_sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its metadata in alphabetical order: safetensors writes it in a random one."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return content[:8] + header.encode().ljust(size) + content[8 + size :]


def write(name: str, weight_of: dict[str, float], dtype: type[np.generic], metadata: dict[str, str]) -> int:
    """Write hashed features, in the order of their hashes, into one packaged file; returns its bytes."""
    hashed = {scorers.key(feature): weight for feature, weight in weight_of.items()}
    if len(hashed) < len(weight_of):
        raise SystemExit(f"{len(weight_of) - len(hashed)} features of {name} share a hash: they would be confused")
    keys = np.array(sorted(hashed), dtype=np.uint64)
    values = np.array([hashed[k] for k in sorted(hashed)], dtype=dtype)
    content = with_sorted_header(save({"keys": keys, "weights": values}, metadata))
    ASSETS.mkdir(parents=True, exist_ok=True)
    (ASSETS / f"{name}.safetensors").write_bytes(content)
    scorers.weights.cache_clear()
    return len(content)


def read_lexicon() -> dict[str, float]:
    """Positive words as +1, negative ones as -1."""
    lists: list[set[str]] = []
    with zipfile.ZipFile(find_zip("opinion_lexicon")) as corpus:
        for name in ("positive", "negative"):
            lines = decode(corpus.read(f"opinion_lexicon/{name}-words.txt")).splitlines()
            lists.append({line.strip() for line in lines if line.strip() and not line.startswith(";")})
    positive, negative = lists
    signs = dict.fromkeys(sorted(positive - negative), 1.0) | dict.fromkeys(sorted(negative - positive), -1.0)
    return {word: sign for word, sign in signs.items() if scorers.words(word) == [word]}


def accuracies(scorer: Callable[[list[str], list[str]], list[float]], texts: list[Text]) -> dict[str, float]:
    """Share of texts of each kind whose score has the right sign; a score of 0 counts one half."""
    scores = np.sign(scorer([""] * len(texts), [t.text for t in texts]))
    right = (1 + scores * np.array([2 * t.label - 1 for t in texts])) / 2
    return {kind: round(float(right[[t.kind == kind for t in texts]].mean()), 4) for kind in KINDS}


def by_length(texts: list[Text]) -> list[dict[str, float]]:
    """Mean and spread of the sentiment of passages by their length, and how well its sign is right."""
    table: list[dict[str, float]] = []
    for low, high in itertools.pairwise((10, 20, 30, 45, 60, 75, 91)):
        part = [t for t in texts if t.kind in ("passage", "pair") and low <= len(t.text.split()) < high]
        scores = np.array(scorers.sentiment([""] * len(part), [t.text for t in part]))
        positive = np.array([t.label == 1 for t in part])
        # each label weighs one half, so that the mean shows length alone and not the labels' shares
        mean = (scores[positive].mean() + scores[~positive].mean()) / 2
        row = {"words from": low, "to": high - 1, "n": len(part), "mean": mean, "deviation": scores.std()}
        table.append({name: round(float(value), 3) for name, value in row.items()})
    return table


def calibration(texts: list[Text]) -> list[dict[str, float]]:
    """Predicted probability against the share of positive labels, over sentences and pairs (true labels)."""
    part = [t for t in texts if t.kind in ("sentence", "pair")]
    scores = np.array(scorers.sentiment([""] * len(part), [t.text for t in part]))
    predicted, label = 1 / (1 + np.exp(-scores)), np.array([t.label for t in part])
    table: list[dict[str, float]] = []
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        at = (predicted >= low) & (predicted < low + 0.2)
        row = {"n": at.sum(), "predicted": predicted[at].mean(), "positive": label[at].mean()}
        table.append({name: round(float(value), 3) for name, value in row.items()})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Make and measure the demo's sentiment scorer and lexicon.")
    parser.add_argument("--data", type=Path, default=BUILD)
    data = parser.parse_args().data
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one order of addition

    weight_of, choices = sentiment_weights(read_texts(data / "labelled_train.jsonl"))
    heldout = read_texts(data / "labelled_heldout.jsonl")
    figures: dict[str, object] = {"n": dict(Counter(t.kind for t in heldout)), "choices": choices}
    lists = {
        "sentiment": (weight_of, np.float16, {"source": REVIEWS, "licence": LICENCE, **choices}),
        "lexicon": (read_lexicon(), np.int8, {"source": LEXICON, "licence": LICENCE}),
    }
    for name, (features, dtype, metadata) in lists.items():
        write(name, features, dtype, metadata)
        accuracy = accuracies(getattr(scorers, name), heldout)
        measured = ", ".join(f"{kind} {value:.3f}" for kind, value in accuracy.items())
        size = write(name, features, dtype, metadata | {"held-out accuracy": measured})
        figures[name] = {"features": len(features), "bytes": size, "held-out accuracy": accuracy}
    figures["sentiment by length"] = by_length(heldout)
    figures["calibration"] = calibration(heldout)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
