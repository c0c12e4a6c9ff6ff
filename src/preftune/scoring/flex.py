"""Attention over a whole trie in one call of torch's FlexAttention, instead of one call a node.

The nodes of a trie stand in the flat row in depth-first order, so that a node and all below it are one slice of the row. With
end[j] where the slice of token j's node ends, token i sees token j where j <= i < end[j] and, in a layer with a window,
position[i] - position[j] < window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from preftune.scoring.trie import Node, Trie

BLOCK = 128  # tokens; FlexAttention's own size
# most kinds of call that are compiled, by mask, precision, heads, soft-cap and what has a gradient; torch's own limit is 8
KINDS = 64

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def usable(device: torch.device) -> bool:
    """Whether it is worth a try; that it also works is asked of each model."""
    return device.type == "cuda"


def filled(trie: Trie) -> Trie:
    """The trie, and after it roots of filler tokens that make its row whole blocks, and two at least.

    No kernel then reads over the end of the row, and rows of one block, for which torch would compile apart, do not occur.
    """
    size = len(trie.ids)
    whole = max(2 * BLOCK, size + -size % BLOCK)
    longest = max(trie.positions) + 1  # so long a root at most: a model may have no further positions
    roots = [Node(-1, begin, min(begin + longest, whole), 0) for begin in range(size, whole, longest)]
    return replace(trie, ids=(*trie.ids, *[0] * (whole - size)), nodes=(*trie.nodes, *roots))


def ends(trie: Trie) -> list[int]:
    """[T] for each token, where in the flat row its node and all below it end."""
    of_node = [node.end for node in trie.nodes]
    for n in reversed(range(len(trie.nodes))):  # parents stand before their children
        parent = trie.nodes[n].parent
        if parent >= 0:
            of_node[parent] = max(of_node[parent], of_node[n])
    return [end for node, end in zip(trie.nodes, of_node, strict=True) for _ in range(node.begin, node.end)]


class Blocks:
    """The block masks of one trie, a filled one, each made once for all layers of its window."""

    def __init__(self, trie: Trie, device: torch.device) -> None:
        self._ends = torch.tensor(ends(trie), dtype=torch.int32, device=device)
        self._positions = torch.tensor(trie.positions, dtype=torch.int32, device=device)
        self._masks: dict[int | None, BlockMask] = {}

    def mask(self, window: int | None) -> BlockMask:
        if window not in self._masks:
            self._masks[window] = self._make(window)
        return self._masks[window]

    def _make(self, window: int | None) -> BlockMask:
        """From the least and the greatest end and position in each block, in T + (T / 128)^2 steps: torch's `create_block_mask`
        would look at all T^2 pairs of tokens, or have to be compiled as well.

        Of keys in a block before that of the queries, some are seen where an end lies beyond the first query, all where each
        end lies beyond the last. With a window the former is a bound, and a block may be listed of which nothing is seen: that
        costs its time only, since the mask function is asked wherever a block is not seen in full.
        """
        begin = torch.arange(0, len(self._ends), BLOCK, device=self._ends.device)
        queries = begin[:, None]
        least, greatest = self._ends.view(-1, BLOCK).aminmax(dim=1)
        some = (begin < queries) & (greatest > queries)
        every = (begin < queries) & (least >= queries + BLOCK)
        if window is not None:
            oldest, newest = self._positions.view(-1, BLOCK).aminmax(dim=1)
            some &= oldest[:, None] - newest < window
            every &= newest[:, None] - oldest < window
        partly = (some & ~every) | (begin == queries)
        size = (len(self._ends), len(self._ends))
        mask_mod = _mask_mod(self._ends, self._positions, window)
        return BlockMask.from_kv_blocks(*_listed(partly), *_listed(every), BLOCK, mask_mod, size)


def _mask_mod(end: Tensor, position: Tensor, window: int | None) -> MaskMod:
    def below(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    if window is None:
        return below
    # a tensor, because a Python number that a compiled function holds can be compiled into it
    first = position - window + 1

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key]) & (position[key] >= first[query])

    return near


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of a [n, n] mask how many are True, [1, 1, n], and their places, first in [1, 1, n, n]."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    *,
    scaling: float | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """As `attention.attend`, whose arguments these are: [1, T, heads, d].

    A sink's logit s takes part in the softmax and has no value: of the output without it remains
    exp(lse) / (exp(lse) + exp(s)) = sigmoid(lse - s), lse being the log-sum-exp of the scores.
    """
    from torch._dynamo import config

    # where lengths may change, so may numbers, says torch by itself; but a soft-cap cannot be a variable of the kernel
    with config.patch(specialize_float=True, recompile_limit=KINDS):
        found = _compiled()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=blocks.mask(sliding_window),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=None if s_aux is None else AuxRequest(lse=True),
        )
    if s_aux is None:
        return found.transpose(1, 2).contiguous()
    out, aux = found
    remains = torch.sigmoid(aux.lse - s_aux.reshape(1, -1, 1))
    return (out * remains[..., None]).to(out.dtype).transpose(1, 2).contiguous()


@cache
def _compiled() -> Any:
    """One for all models and lengths. `fullgraph`: what cannot be compiled raises, and that is found when the model is asked;
    without, it would run all the same, with the scores of all pairs of tokens in memory."""
    return torch.compile(flex_attention, fullgraph=True, dynamic=True)


def _capped(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
