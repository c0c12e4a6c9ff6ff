"""Held-out prompts are the same in any order, in any file, on any machine."""

from __future__ import annotations

import random
from dataclasses import replace

import tiny

from preftune.data.split import split
from preftune.records import Comparison, Group, Origin


def prompts(count: int) -> list[Group]:
    return [tiny.pair(f"prompt {n}", "yes", "no", row=n + 1) for n in range(count)]


def texts(count: int) -> Group:
    """Demonstrations without a prompt: all of one group."""
    contents = [f"text {n}" for n in range(count)]
    marks = tuple(tiny.Demonstration(n, origin=Origin("texts.jsonl", n + 1, "text")) for n in range(count))
    return Group("", tiny.answers("", *contents), marks)


def names(groups: list[Group]) -> set[object]:
    return {g.prompt for g in groups}


def contents(groups: list[Group]) -> set[object]:
    return {g.responses[m.responses[0]].content for g in groups for m in g.marks}


def test_the_split_depends_on_the_prompt_alone() -> None:
    groups = prompts(300)
    train, held = split(groups)
    mixed = groups.copy()
    random.Random(0).shuffle(mixed)
    elsewhere = [
        replace(g, responses=tuple(replace(r, origins=(Origin("other.csv", 9, "x"),)) for r in g.responses)) for g in mixed
    ]
    for other in (mixed, elsewhere):
        assert [names(part) for part in split(other)] == [names(train), names(held)]
    assert names(split(groups[:150])[1]) == names(held) & names(groups[:150]), "a prompt moved when others came along"
    assert names(split(prompts(60), share=0.05)[1]) == {"prompt 4", "prompt 22", "prompt 25"}, "the same on every machine"


def test_every_group_is_in_one_part_and_about_the_share_is_held_out() -> None:
    groups = prompts(4000)
    train, held = split(groups)
    assert len(train) + len(held) == 4000 and not names(train) & names(held)
    assert 150 <= len(held) <= 250  # 200 expected, standard deviation 14
    for part in (train, held):
        chosen = names(part)
        assert part == [g for g in groups if g.prompt in chosen], "the order of the file is lost"


def test_at_most_so_many_are_held_out_and_they_are_the_same_ones() -> None:
    groups = prompts(1000)
    everyone, few = split(groups, share=0.5)[1], split(groups, share=0.5, at_most=20)
    assert len(few[1]) == 20 and len(few[0]) == 980
    assert names(few[1]) < names(everyone)
    assert names(split(groups[::-1], share=0.5, at_most=20)[1]) == names(few[1])
    assert not names(few[0]) & names(few[1])


def test_texts_without_a_prompt_are_held_out_one_by_one() -> None:
    whole = texts(1000)
    train, held = split([whole])
    assert contents(train) | contents(held) == contents([whole]) and not contents(train) & contents(held)
    assert 20 <= len(contents(held)) <= 80  # 50 expected, standard deviation 7
    assert all(
        m.origin and whole.responses[m.origin.row - 1] == g.responses[m.response]
        for g in held
        for m in g.marks
        if isinstance(m, tiny.Demonstration)
    )
    turned = replace(
        whole,
        responses=whole.responses[::-1],
        marks=tuple(m.moved(lambda n: 999 - n) for m in whole.marks[::-1]),
    )
    assert contents(split([turned])[1]) == contents(held)
    assert len(contents(split([whole], share=0.5, at_most=30)[1])) == 30


def test_a_group_that_is_split_keeps_its_comparisons_whole() -> None:
    pairs = tuple(Comparison(2 * n, 2 * n + 1) for n in range(200))
    group = Group("", tiny.answers("", *(f"answer {n}" for n in range(400))), pairs)
    train, held = split([group], share=0.3)
    assert sum(len(g.marks) for g in train + held) == 200
    for part in (*train, *held):
        for mark in part.marks:
            a, b = (part.responses[i].content for i in mark.responses)
            assert isinstance(a, str) and isinstance(b, str) and int(a[7:]) + 1 == int(b[7:])
