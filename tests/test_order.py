"""The order of training: sources by their weights, comparisons by their margin, and what is refused of both."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import PAIRS, call, write_model, write_rows

import preftune
from preftune.config import resolve
from preftune.data.options import Source
from preftune.errors import Refusal
from preftune.keys import EvaluateKeys, TrainKeys
from preftune.records import Origin
from preftune.training.method import Example
from preftune.training.order import Mixing, check_curriculum, margins, ordered, systematic


def examples(*sizes: int, marks: int = 1, **more: Any) -> list[Example]:
    """`sizes` groups of the files a, b, ... with so many examples each; all different."""
    found: list[Example] = []
    for file, size in zip("abc", sizes, strict=False):
        for _ in range(size):
            group = len(found)
            found += [Example(group, (n, n + 1), origin=Origin(file, len(found) + 1, "chosen"), **more) for n in range(marks)]
    return found


def mixing(*weights: float) -> Mixing:
    found = Mixing.of([Source(path=path, weight=weight) for path, weight in zip("abc", weights, strict=False)])
    assert found is not None
    return found


def epochs(given: list[Example], number: int, seed: int = 0, **how: Any) -> list[list[Example]]:
    return list(islice(ordered(given, seed, **how), number))


def files(order: list[Example]) -> Counter[str]:
    return Counter(e.origin.file for e in order if e.origin)


# -- weights ------------------------------------------------------------------------------------------------------------------


def test_each_source_has_its_share_of_every_epoch_whatever_its_size() -> None:
    for order in epochs(examples(90, 10), 5, mixing=mixing(1, 3)):
        assert files(order) == {"a": 25, "b": 75}


def test_weights_are_shares_of_their_sum() -> None:
    given = examples(30, 20, 10)
    assert epochs(given, 3, mixing=mixing(1, 2, 3)) == epochs(given, 3, mixing=mixing(0.5, 1, 1.5))


def test_a_source_is_gone_through_before_it_comes_again() -> None:
    """a gives 25 of its 90 in an epoch, each once until all were there; b its 10 seven or eight times."""
    first, *rest = epochs(examples(90, 10), 4, mixing=mixing(1, 3))
    assert sorted(Counter(e for e in first if files([e])["b"]).values()) == [7] * 5 + [8] * 5
    seen = Counter(e for order in (first, *rest) for e in order if files([e])["a"])
    assert sorted(seen.values()) == [1] * 80 + [2] * 10


def test_a_group_that_is_cut_goes_on_in_the_next_epoch() -> None:
    """a gives 40 of its 90 each time, which cuts a group of three: after three epochs all were there, and 30 came twice."""
    given = examples(30, 10, marks=3)
    seen = Counter(e for order in epochs(given, 3, mixing=mixing(1, 2)) for e in order if files([e])["a"])
    assert sorted(seen.values()) == [1] * 60 + [2] * 30


def test_parts_of_an_example_are_there_in_expectation() -> None:
    """7 examples with shares of 2.1, 0.7 and 4.2: whole numbers around them, which come right on average."""
    given, weights = examples(3, 3, 1), (0.3, 0.1, 0.6)
    counts = [files(order) for order in epochs(given, 4000, mixing=mixing(*weights))]
    assert {sum(c.values()) for c in counts} == {7}
    for file, weight in zip("abc", weights, strict=True):
        assert {c[file] for c in counts} == {int(7 * weight), int(7 * weight) + 1}
        assert sum(c[file] for c in counts) / len(counts) == pytest.approx(7 * weight, abs=0.03)


def test_systematic_counts_have_the_sum_of_what_was_expected() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        cuts = sorted(draw.random() * 50 for _ in range(draw.randrange(6)))
        expected = [b - a for a, b in zip([0.0, *cuts], [*cuts, 50.0], strict=True)]
        found = systematic(expected, draw.random())
        assert sum(found) == 50
        assert all(abs(n - e) < 1 for n, e in zip(found, expected, strict=True))
    assert systematic([0.5, 0.5], 0.0) == [1, 0] and systematic([0.5, 0.5], 0.6) == [0, 1]


def test_the_same_seed_draws_the_same_and_another_seed_another() -> None:
    given = examples(20, 20)
    once = epochs(given, 3, mixing=mixing(1, 3))
    assert once == epochs(given, 3, mixing=mixing(1, 3))
    assert once != epochs(given, 3, seed=1, mixing=mixing(1, 3))
    assert once[0] != once[1]


def test_sources_are_mixed_within_an_epoch_and_groups_stay_together() -> None:
    (order,) = epochs(examples(30, 30, marks=3), 1, mixing=mixing(1, 1))
    assert set(files(order[:60])) == {"a", "b"}
    runs = [e.group for n, e in enumerate(order) if n == 0 or order[n - 1].group != e.group]
    assert len(runs) <= 62, "a group is cut where a source's share ends, and nowhere else"


def test_a_source_without_examples_leaves_its_share_to_the_others() -> None:
    assert files(epochs(examples(10, 0, 30), 1, mixing=mixing(1, 5, 1))[0]) == {"a": 20, "c": 20}


def test_files_of_a_folder_share_its_weight() -> None:
    found = Mixing.of([Source(path="./deep/folder/", weight=1), Source(path="one.jsonl", weight=1)])
    assert found is not None
    names = ["deep/folder/a.jsonl", "deep/folder/b.jsonl", "./one.jsonl"]
    given = [Example(n, (0, 1), origin=Origin(name, n + 1, "chosen")) for n, name in enumerate(names)]
    assert [[e.group for e in part] for part in found.parts(given)] == [[0, 1], [2]]


def test_without_weights_an_epoch_is_every_example_once() -> None:
    assert Mixing.of([Source(path="a"), Source(path="b")]) is None
    assert Counter(epochs(examples(5, 3), 1)[0]) == Counter(examples(5, 3))


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        (["data=[{path: a, weight: 2}, {path: b}]"], "data.sources.1.weight", "b has no weight, and others have"),
        (["data=[{path: a, weight: 2}, {path: ./a, weight: 1}]"], "data.sources", "a stands there twice"),
        (["data=[{path: a, weight: 0}]"], "data.sources.0.weight", "greater than 0"),
        (["data=[{path: a, weight: .inf}]"], "data.sources.0.weight", "finite"),
        (["data=a", "eval_data={path: b, weight: 1}"], "eval_data.0.weight", "held-out data is used as it is"),
    ],
)
def test_weights_that_say_nothing_are_refused(words: list[str], key: str, says: str) -> None:
    with pytest.raises(Refusal, match=says) as refused:
        resolve(TrainKeys, ["model=m", *words])
    assert refused.value.key == key


def test_a_verb_that_does_not_draw_says_that_it_reads_no_weights(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "preftune"):
        resolve(EvaluateKeys, ["model=m", "data=[{path: a, weight: 2}, {path: b, weight: 1}]"])
    assert "not used: the weights of the sources" in caplog.text


def test_a_run_draws_by_weight(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    short_answers: None,
    no_report: None,
) -> None:
    """17 short pairs and 3 long ones, one to one: ten of each in an epoch, though all 20 are to be trained on."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("m"), positions=128)
    for name, answer, part in (("a", " yes", PAIRS[:17]), ("b", " yes yes yes", PAIRS[17:20])):
        write_rows(Path(f"{name}.jsonl"), [{**row, "chosen": answer} for row in part])
    write_rows(Path("e.jsonl"), PAIRS[20:22])
    data = "data=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1}]"
    answer = call(capsys, "train", "model=m", data, "eval_data=e.jsonl", "batch_size=20", "steps=1", "out=run")
    assert answer.code == 0, answer.err
    assert "of each epoch of 20 examples: a.jsonl 50.0% (0.59 times its 17), b.jsonl 50.0% (3.3 times its 3)" in answer.err
    (line,) = Path("run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["length/chosen"] == (10 * 5 + 10 * 13) / 20


# -- curriculum ---------------------------------------------------------------------------------------------------------------


def strong(*strengths: float, **more: Any) -> list[Example]:
    return [Example(n, (0, 1), strength=s, **more) for n, s in enumerate(strengths)]


@pytest.mark.parametrize(("curriculum", "groups"), [("easy_first", [1, 3, 0, 2]), ("hard_first", [2, 0, 3, 1])])
def test_comparisons_come_in_order_of_their_strength(curriculum: Any, groups: list[int]) -> None:
    for order in epochs(strong(1, 9, -2, 4), 3, curriculum=curriculum):
        assert [e.group for e in order] == groups


def test_without_strengths_they_come_in_order_of_their_certainty() -> None:
    given = [Example(n, (0, 1), preference=p) for n, p in enumerate([0.6, 1.0, 0.5, 0.8])]
    assert [e.group for e in epochs(given, 1, curriculum="easy_first")[0]] == [1, 3, 0, 2]
    assert margins([*given, Example(9, (0, 1), strength=3.0)])[1] == "certainty", "some have a strength, and not all"
    tied = [*strong(1, 2), Example(2, (0, 1), preference=0.5)]
    clear, name = margins(tied)
    assert (name, [clear(e) for e in tied]) == ("strength", [1, 2, 0])


def test_groups_stay_together_and_stand_by_their_mean() -> None:
    given = [Example(g, (n, n + 1), strength=s) for g, own in enumerate([(1, 8), (6, 2, 4), (9, 3)]) for n, s in enumerate(own)]
    (order,) = epochs(given, 1, curriculum="easy_first")
    assert [(e.group, e.strength) for e in order] == [(2, 9), (2, 3), (0, 8), (0, 1), (1, 6), (1, 4), (1, 2)]


def test_equal_margins_stay_shuffled() -> None:
    given = strong(*[1.0] * 20, *[2.0] * 20)
    one, two = epochs(given, 2, curriculum="easy_first")
    assert [e.strength for e in one] == [2.0] * 20 + [1.0] * 20
    assert one != two and sorted(e.group for e in one[:20]) == list(range(20, 40))


def test_a_curriculum_goes_with_weights() -> None:
    given = [Example(e.group, e.responses, origin=e.origin, strength=1.0 + e.group % 5) for e in examples(20, 20)]
    (order,) = epochs(given, 1, mixing=mixing(1, 3), curriculum="hard_first")
    assert files(order) == {"a": 10, "b": 30}
    assert [e.strength for e in order] == sorted(e.strength for e in order)


def test_equal_comparisons_have_no_order() -> None:
    with pytest.raises(Refusal, match="all comparisons have the same certainty, 1:") as refused:
        check_curriculum("easy_first", strong(0, 0))
    assert (refused.value.code, refused.value.key) == ("no_order", "train.curriculum")
    assert check_curriculum("hard_first", strong(3, 0.5)) == "curriculum: by strength, from 0.5 to 3"


def test_a_run_takes_its_comparisons_in_that_order() -> None:
    """Reward models say the length of what they were given: each pair has its own."""
    groups = [tiny.pair(f"{n} asks: ", "yes" * (n + 1), "no", preference=0.55 + n / 20) for n in range(8)]
    run = preftune.fit(
        tiny.model(), tiny.tokenizer(), groups, eval_groups=groups[:1], batch_size=1, beta=0.1, epochs=1.0, dtype="float32",
        train={"curriculum": "hard_first"},
    )  # fmt: skip
    lengths = [line["length/chosen"] for line in run.metrics]
    assert lengths == sorted(lengths) and len(set(lengths)) == 8


def test_a_curriculum_of_ratings_is_refused() -> None:
    groups = [preftune.read([{"prompt": f"q{n}", "completion": "a", "label": bool(n % 2)}])[0] for n in range(4)]
    with pytest.raises(Refusal, match="it orders comparisons, and kto trains on ratings"):
        preftune.fit(
            tiny.model(), tiny.tokenizer(), groups, method="kto", eval_groups=groups, train={"curriculum": "easy_first"}
        )
