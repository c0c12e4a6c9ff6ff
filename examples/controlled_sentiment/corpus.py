"""Film reviews as language-model passages and as labelled text.

    python examples/controlled_sentiment/corpus.py

reads NLTK's `movie_reviews` (2,000 reviews) and `sentence_polarity` (10,662 sentences) and writes, under
`build/controlled_sentiment/`:

    train.jsonl, heldout.jsonl                        {"text"}: what the language model sees, every sentence once
    labelled_train.jsonl, labelled_heldout.jsonl      {"text", "label", "kind", "fold"}: what the scorer sees

5 % of the reviews and sentences are held out, by a hash of their text: from the language model and the scorer alike.
The corpora themselves are never copied into the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, str | int | float]
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "controlled_sentiment"
HELD_OUT = 0.05
SHORTEST, LONGEST, MOST_SENTENCES = 20, 90, 4  # words and sentences of a passage
# Windows' punctuation, as it stands (U+0080..9F) or with its eighth bit lost on the way (U+0000..1F).
C1 = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}
QUOTES = {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": " . . . ", "\xad": "", "\xa0": " "}
STRAIGHT = str.maketrans(QUOTES)
LETTERED = re.compile(r"[^\W\d_]{2,}")
JUNK = re.compile(r"https?:|www\.|\.html?\b|\w@\w|^\W*\[?(?:r|pg|pg-13|nc-17|not rated)\]?\W*$|(?:[=*_~-]\s*){4,}|=20")


@dataclass(frozen=True, slots=True)
class Document:
    """One review, or one sentence of `sentence_polarity`: its clean sentences and whether it is positive."""

    source: str
    sentences: tuple[str, ...]
    label: int

    @property
    def held_out(self) -> bool:
        return share(" ".join(self.sentences), "held out") < HELD_OUT


def share(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text and the purpose alone: equal texts fall on the same side."""
    digest = hashlib.blake2b(f"{purpose}\n{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def find_zip(name: str) -> Path:
    """The corpus zip: in the folder NLTK_SENTIMENT, beside the checkout, or fetched by nltk's own downloader."""
    places = [Path(os.environ["NLTK_SENTIMENT"])] if "NLTK_SENTIMENT" in os.environ else []
    places += [ROOT.parent / "shared" / "data" / "nltk_sentiment", ROOT / "build" / "nltk_data" / "corpora"]
    for place in places:
        if (place / f"{name}.zip").is_file():
            return place / f"{name}.zip"
    try:
        nltk = importlib.import_module("nltk")
    except ModuleNotFoundError:
        raise SystemExit(f"{name}.zip was not found: `pip install nltk`, or set NLTK_SENTIMENT to its folder") from None
    fetched = places[-1] / f"{name}.zip"
    if not nltk.download(name, download_dir=str(places[-1].parent)) or not fetched.is_file():
        raise SystemExit(f"nltk could not download {name}")
    return fetched


def decode(raw: bytes) -> str:
    """UTF-8 where it is valid, else latin-1 (the corpora mix both)."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def clean(line: str) -> str:
    """One sentence on one line with straight quotes; empty if the line is no sentence (ratings, rules, addresses)."""
    mended = (chr(ord(c) + 0x80) if ord(c) < 0x20 and c not in "\t\n\r" else c for c in line)
    text = " ".join("".join(mended).translate(C1).translate(STRAIGHT).split())
    return "" if JUNK.search(text) or len(LETTERED.findall(text)) < 2 else text


def read_documents() -> list[Document]:
    """Every review and sentence with its label, in the zips' order, without copies.

    A document half of whose sentences were met before is a copy with changes (the corpus has a few): left out, since
    the two could fall on different sides of the split.
    """
    documents: list[Document] = []
    met: set[str] = set()

    def add(source: str, lines: list[str], label: int) -> None:
        sentences = tuple(filter(None, map(clean, lines)))
        if 2 * sum(sentence not in met for sentence in sentences) > len(sentences):
            documents.append(Document(source, sentences, label))
            met.update(sentences)

    with zipfile.ZipFile(find_zip("movie_reviews")) as corpus:
        for name in sorted(n for n in corpus.namelist() if n.endswith(".txt")):
            add("movie_reviews", decode(corpus.read(name)).splitlines(), int("/pos/" in name))
    with zipfile.ZipFile(find_zip("sentence_polarity")) as corpus:
        for name in sorted(n for n in corpus.namelist() if n.endswith((".pos", ".neg"))):
            for line in decode(corpus.read(name)).split("\n"):
                add("sentence_polarity", [line], int(name.endswith(".pos")))
    return documents


def passages(document: Document) -> Iterator[str]:
    """Cut a document into passages of 1 to 4 consecutive sentences, each sentence once.

    A passage is closed when it has its target of words (20 to 80, by a hash of its first sentence), has four
    sentences, or would pass 90 words. A single sentence longer than that is cut at 90 words and its rest left out.
    """
    words: list[str] = []
    count, target = 0, 0
    for sentence in document.sentences:
        new = sentence.split()[:LONGEST]
        if words and len(words) + len(new) > LONGEST:
            yield " ".join(words)
            words, count = [], 0
        if not words:
            target = SHORTEST + int((LONGEST - 10 - SHORTEST) * share(sentence, "passage length"))
        words, count = words + new, count + 1
        if len(words) >= target or count == MOST_SENTENCES:
            yield " ".join(words)
            words, count = [], 0
    if words:
        yield " ".join(words)


def labelled(document: Document) -> Iterator[Row]:
    """Rows for the scorer: a sentence; or a review whole and in passages, each with the review's label.

    `fold`, in [0, 1), keeps a review and its passages together when the scorer sets some of its training text aside.
    """
    whole = " ".join(document.sentences)
    kinds = {"sentence": [whole]}
    if document.source == "movie_reviews":
        kinds = {"review": [whole], "passage": list(passages(document))}
    for kind, texts in kinds.items():
        for text in texts:
            yield {"text": text, "label": document.label, "kind": kind, "fold": share(whole, "fold")}


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut NLTK's film-review corpora into training and held-out passages.")
    parser.add_argument("--out", type=Path, default=BUILD)
    out = parser.parse_args().out
    documents = read_documents()
    figures: dict[str, dict[str, int]] = {}
    for split, held_out in (("train", False), ("heldout", True)):
        part = [d for d in documents if d.held_out == held_out]
        texts = [text for document in part for text in passages(document)]
        write(out / f"{split}.jsonl", [{"text": text} for text in texts])
        write(out / f"labelled_{split}.jsonl", [row for document in part for row in labelled(document)])
        sources = Counter(document.source for document in part)
        figures[split] = {**sources, "passages": len(texts), "words": sum(len(text.split()) for text in texts)}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
