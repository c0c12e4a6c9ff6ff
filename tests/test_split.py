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


def joined(group: Group) -> list[set[object]]:
    """Contents that a group's comparisons join, by merging sets until none share a member."""
    found: list[set[object]] = []
    for mark in group.marks:
        new: set[object] = {group.responses[i].content for i in mark.responses}
        found = [*(s for s in found if not s & new), new.union(*(s for s in found if s & new))]
    return found


def tables(count: int, width: int = 5) -> Group:
    """Comparisons without a prompt, each answer in several: `count` chains of `width` answers."""
    pairs = [(width * c + n, width * c + n + 1) for c in range(count) for n in range(width - 1)]
    random.Random(1).shuffle(pairs)
    marks = tuple(Comparison(*pair, origin=Origin("table.csv", n + 1, "a")) for n, pair in enumerate(pairs))
    return Group("", tiny.answers("", *(f"argument {n}" for n in range(width * count))), marks)


def test_without_a_prompt_no_answer_stands_on_both_sides() -> None:
    whole = tables(400)
    train, held = split([whole], share=0.2)
    answers = [{r.content for g in part for r in g.responses} for part in (train, held)]
    assert not answers[0] & answers[1] and len(answers[0] | answers[1]) == 2000
    assert sum(len(g.marks) for g in (*train, *held)) == 1600
    assert 240 <= sum(len(g.marks) for g in held) <= 400, "a share of the chains, however long they are"
    turned = replace(
        whole, responses=whole.responses[::-1], marks=tuple(m.moved(lambda n: 1999 - n) for m in whole.marks[::-1])
    )
    assert {r.content for g in split([turned], share=0.2)[1] for r in g.responses} == answers[1]
    assert len(joined(split([whole], share=0.5, at_most=30)[1][0])) == 30


def test_prompts_and_rows_without_one_share_the_limit() -> None:
    train, held = split([*prompts(100), texts(100)], share=1.0, at_most=50)
    assert sum(len(g.marks) for g in held) == 50 and sum(len(g.marks) for g in train) == 150


def test_a_group_without_marks_is_not_lost() -> None:
    alone = Group("", tiny.answers("", "one", "two"))
    assert split([alone], share=0.5) == ([alone], [])
