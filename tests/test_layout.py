"""Which nodes of a trie a call of attention takes, and which of their tokens see which."""

from __future__ import annotations

import pytest
import torch
from test_flex import seen, tries
from torch.nn.functional import scaled_dot_product_attention

from preftune.scoring import attention, layout
from preftune.scoring.trie import grow

CPU = torch.device("cpu")


def test_calls_of_attention_take_a_subtree_where_that_costs_little() -> None:
    """A prompt of 100 tokens with two answers, one of 4 with two answers of which one goes on in two ways."""
    long, short = tuple(range(100)), (1000, 1001, 1002, 1003)
    sequences = [(*long, 200), (*long, 300, 301), (*short, 400), (*short, 500, 501, 600), (*short, 500, 501, 700)]
    trie = grow(sequences, 1)
    assert [node.end - node.begin for node in trie.nodes] == [100, 1, 2, 4, 1, 2, 1, 1]
    # two nodes below the prompt of 100: 103 * 103 products for 100 * 100 + 1 * 101 + 2 * 102, 304 more for two calls less
    apart = [range(n, n + 1) for n in range(8)]
    assert layout.subtrees(trie, 0) == apart
    assert layout.subtrees(trie, 151) == [*apart[:3], range(3, 8)]
    assert layout.subtrees(trie, 152) == [range(0, 3), range(3, 8)]
    # 2, 1 and 1 tokens below 4: 4 * 8 products for 2 * 6 + 1 * 7 + 1 * 7, 6 more for two calls less; then 9 * 9 for 16 + 5 + 32
    assert layout.subtrees(trie, 3) == [*apart[:5], range(5, 8)]
    assert layout.subtrees(trie, 2) == apart
    assert layout.subtrees(grow([], 1), 10) == []


def test_a_call_of_several_nodes_takes_no_more_than_products_are_small_for(monkeypatch: pytest.MonkeyPatch) -> None:
    trie = grow([(*range(10), 20), (*range(10), 30)], 1)
    monkeypatch.setattr(layout, "SMALL", 12 * 12)
    assert layout.subtrees(trie, 10**6) == [range(0, 3)]
    monkeypatch.setattr(layout, "SMALL", 12 * 12 - 1)
    assert layout.subtrees(trie, 10**6) == [range(0, 1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize("worth", [0, 100, 2**12])
def test_the_masks_of_calls_are_the_dense_mask(worth: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of deep tries and wide ones, and of two prompts as long with all below them that fork in other places. What a call
    has no key of, none of its tokens sees."""
    monkeypatch.setattr(layout, "WORTH", worth)
    alike = grow([(1, 2, 3, 4), (1, 2, 5), (6, 1), (6, 2, 3, 4)], 1)
    for trie in (*tries(40), alike):
        made = layout.Layout.of(trie, CPU, torch.bfloat16)
        tokens = [range(trie.nodes[call[0]].begin, trie.nodes[call[-1]].end) for call in made.calls]
        assert [node for call in made.calls for node in call] == list(range(len(trie.nodes)))
        dense = seen(trie, window)
        for call, path in enumerate(made.paths):
            keys = [token for above in path for token in tokens[above]]
            keys = keys if window is None else keys[max(0, len(keys) - len(tokens[call]) - window + 1) :]
            mask = made.mask(call, len(keys), None if window is None or len(keys) <= window else window)
            rows = dense[list(tokens[call])]
            expected = rows[:, keys]
            assert torch.equal(torch.ones_like(expected) if mask is None else mask, expected)
            assert int(rows.sum()) == int(expected.sum())
            added = made.added(call, len(keys), None if window is None or len(keys) <= window else window, 2, torch.zeros(1))
            heads = (added == 0).view(2, -1, added.shape[1])
            assert heads.shape[1:] == layout.sides(len(rows), len(keys))
            assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0, : len(rows), : len(keys)], expected)
            assert not heads[0, :, len(keys) :].any() and heads[0, len(rows) :, : len(keys)].all()
    assert len(layout.Layout.of(alike, CPU, torch.bfloat16).calls) == (2 if worth else 6)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (3, 7), (32, 64), (33, 65)])
def test_two_products_are_attention(queries: int, keys: int) -> None:
    """Of heads that share keys, and values narrower than those; with its gradients, in float32."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, 4, queries, 8), (1, 2, keys, 8), (1, 2, keys, 6))
    q, k, v = (torch.randn(shape, generator=draw, requires_grad=True) for shape in shapes)
    visible = torch.rand(queries, keys, generator=draw) < 0.7
    visible[:, 0] = True
    mask = torch.zeros(layout.sides(queries, keys))
    mask[:, keys:] = float("-inf")
    mask[:queries, :keys].masked_fill_(~visible, float("-inf"))
    ours = attention._products(q, k, v, mask.repeat(2, 1), 0.3)
    theirs = scaled_dot_product_attention(q, k, v, visible, scale=0.3, enable_gqa=True)
    slope = torch.randn(theirs.shape, generator=draw)
    found, expected = ([x, *torch.autograd.grad(x, (q, k, v), slope)] for x in (ours, theirs))
    torch.testing.assert_close(found, expected)


def test_sides_of_products_are_few_and_not_far_above() -> None:
    asked = [(1, 1), (1, 32), (2, 33), (3, 64), (5, 5), (17, 100), (32, 32), (33, 65), (64, 64), (65, 96), (191, 191)]
    given = [(1, 32), (1, 32), (2, 64), (4, 64), (8, 32), (32, 128), (32, 32), (64, 96), (64, 64), (96, 96), (192, 192)]
    assert [layout.sides(*of) for of in asked] == given


def test_calls_of_one_node_in_float32() -> None:
    """What the fused attention and FlexAttention take."""
    for trie in tries(10):
        assert layout.Layout.of(trie, CPU, torch.float32).calls == [range(n, n + 1) for n in range(len(trie.nodes))]
