"""The demo's two scorers: order, ties, determinism, and what is packaged."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
import time
from importlib import resources

import pytest

from preftune.demo import scorers

# (better, worse): sentences made up for this test
ORDERED = [
    (" a wonderful , moving and witty story .", " a dull , tired and pointless mess ."),
    (" one of the best performances of the year .", " one of the worst performances of the year ."),
    (" beautifully shot and superbly acted .", " badly shot and poorly acted ."),
    (" an enjoyable and touching portrait of a family .", " a boring waste of time , stupid and lifeless ."),
]
PROMPT = "the film is"


@pytest.mark.parametrize("name", ["sentiment", "lexicon"])
@pytest.mark.parametrize(("better", "worse"), ORDERED)
def test_good_reviews_score_above_bad_ones(name: str, better: str, worse: str) -> None:
    high, low = getattr(scorers, name)([PROMPT] * 2, [better, worse])
    assert high > 0 > low


@pytest.mark.parametrize("name", ["sentiment", "lexicon"])
@pytest.mark.parametrize("text", ["", "   \n", " . . . !", "zzqx"])
def test_text_that_says_nothing_scores_zero(name: str, text: str) -> None:
    assert getattr(scorers, name)([""], [text]) == [0.0]


def test_sentiment_reads_the_prompt_and_lexicon_does_not() -> None:
    prompts, responses = ["a wonderful film with", "a terrible film with"], [" two men and a car ."] * 2
    high, low = scorers.sentiment(prompts, responses)
    assert high > low
    assert scorers.lexicon(prompts, responses) == [0.0, 0.0]


def test_a_word_cut_by_the_prompt_is_one_word() -> None:
    assert scorers.sentiment(["a wonder"], ["ful film"]) == scorers.sentiment(["a "], ["wonderful film"])


def test_ties_are_exact() -> None:
    words = scorers.words("good and moving but slow with a dull score and bright pictures of the wide sea")
    forwards, backwards = " . ".join(words), " . ".join(reversed(words))
    known = scorers.weights("sentiment")
    odds = [scorers.log_odds(order, known) for order in (words, words[::-1], sorted(words))]
    assert odds[0] == odds[1] == odds[2] != 0.0
    a, b = scorers.sentiment([PROMPT] * 2, [" great fun !", "  GREAT fun ..."])  # only the words count
    assert a - b == 0.0
    a, b = scorers.lexicon([PROMPT] * 2, [forwards, backwards])
    assert a - b == 0.0
    a, b = scorers.lexicon([PROMPT] * 2, [" good film", " good film , good film"])  # 1/2 and 2/4
    assert a - b == 0.0


def test_repetition_is_not_rewarded() -> None:
    once, often = scorers.sentiment(["", ""], ["great fun great fun", "great fun " * 20])
    assert once == often


def test_a_mixture_is_between_its_parts() -> None:
    good, bad = ORDERED[0]
    high, middle, low = scorers.sentiment([PROMPT] * 3, [good, good + bad, bad])
    assert high > middle > low


def test_lexicon_is_net_words_over_words() -> None:
    assert scorers.lexicon([PROMPT], [" a wonderful but boring and stupid film !"]) == [-1 / 7]


def test_words_keep_apostrophes_and_hyphens() -> None:
    assert scorers.words("It's well-made , don't -- “miss” it’s 3rd act !") == [
        "it's", "well-made", "don't", "miss", "it's", "3rd", "act",
    ]  # fmt: skip


def test_hashes_never_change() -> None:
    assert scorers.key("wonderful") == 17069596466849890207
    assert scorers.key("not funny") == 3621901963481410635


def test_same_numbers_in_another_process() -> None:
    """Sets of strings are in another order in every process: the sums must not notice."""
    text = " a slow , strange and finally rather beautiful film that nobody should miss ."
    code = f"from preftune.demo import scorers; print(repr(scorers.sentiment([{PROMPT!r}], [{text!r}])[0]))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(printed) == scorers.sentiment([PROMPT], [text])[0]


def test_lists_must_be_of_one_length() -> None:
    for scorer in (scorers.sentiment, scorers.lexicon):
        with pytest.raises(ValueError, match="argument"):
            scorer([PROMPT], [])


@pytest.mark.parametrize(("name", "most"), [("sentiment", 1_000_000), ("lexicon", 100_000)])
def test_packaged_files_are_small_and_finite(name: str, most: int) -> None:
    content = resources.files("preftune.demo").joinpath("assets", f"{name}.safetensors").read_bytes()
    assert len(content) < most
    assert b"Creative Commons Attribution 4.0" in content
    assert all(math.isfinite(weight) and weight != 0 for weight in scorers.weights(name).values())


def test_ten_thousand_passages_in_seconds() -> None:
    good, bad = (part * 8 for part in ORDERED[0])  # 8 times 8 words
    passages = [f"{good} {bad} {number}" for number in range(10_000)]
    begin = time.process_time()
    scorers.sentiment([PROMPT] * len(passages), passages)
    assert time.process_time() - begin < 10


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(scorers).failed == 0


def test_scorers_need_no_torch() -> None:
    code = "import sys, preftune.demo.scorers as s; s.sentiment(['a'], ['b']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
