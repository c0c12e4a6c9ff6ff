"""How attention goes along a trie: which nodes a call of it takes, and which of their tokens see which."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from preftune.scoring import flex
from preftune.scoring.trie import Trie
from preftune.scoring.virtual import Kept, Virtual, below

# pairs of a query and a key: of a call that is two products, and of one of several nodes; `sides` at most doubles them
SMALL = 2**18
WORTH = 2**12  # pairs that take no longer than a call by itself, on a CPU
SIDE = 32  # keys: softmax in bfloat16 takes up to three times as long on a CPU where they are no multiple of it


@dataclass(slots=True)
class Layout:
    """What attention needs of a trie, on the device: and the masks that it makes once for all layers.

    trie: the row that the model is given. calls: of attention, the nodes of each (`subtrees`); lengths: their tokens; paths: of
    each the calls of its ancestors, and itself. blocks: of FlexAttention, which then takes the whole trie in one call; None:
    call by call. compare: both are run, and may not differ.
    kept: keys and values that stand for those of the trie's root, of `root` tokens: prefix tuning.
    windows: of each layer that attended, by which a model that does not attend along the trie is found.
    """

    trie: Trie
    calls: list[range]
    lengths: list[int]
    paths: list[list[int]]
    device: torch.device
    blocks: flex.Blocks | None
    compare: bool
    kept: Kept | None
    root: int
    _ends: Tensor
    _positions: Tensor
    windows: list[int | None] = field(default_factory=list["int | None"])
    _masks: dict[tuple[int | None, ...], Tensor] = field(default_factory=dict[tuple[int | None, ...], Tensor])
    _added: dict[tuple[int | None, ...], Tensor] = field(default_factory=dict[tuple[int | None, ...], Tensor])

    @classmethod
    def of(
        cls,
        trie: Trie,
        device: torch.device,
        dtype: torch.dtype,
        *,
        virtual: Virtual | None = None,
        fused: bool = False,
        compare: bool = False,
    ) -> Layout:
        """dtype: of the model. virtual: tokens that stand before all of the trie's."""
        root, kept = (virtual.count, virtual.kept()) if virtual else (0, None)
        trie = below(trie, root) if root else trie
        trie = flex.filled(trie) if fused else trie
        calls = subtrees(trie, WORTH if by_products(dtype, device) else 0)
        of_node = {node: n for n, call in enumerate(calls) for node in call}
        lengths = [trie.nodes[call[-1]].end - trie.nodes[call[0]].begin for call in calls]
        paths = [[of_node[node] for node in trie.path(call[0])] for call in calls]
        blocks = flex.Blocks(trie, device) if fused else None
        ends, positions = (torch.tensor(column, device=device) for column in (flex.ends(trie), trie.positions))
        return cls(trie, calls, lengths, paths, device, blocks, compare, kept, root, ends, positions)

    def mask(self, call: int, keys: int, window: int | None) -> Tensor | None:
        """[queries, keys] True = visible, for a call's tokens at the end of its keys; None where all of them are."""
        if len(self.calls[call]) == self.lengths[call] == 1:  # a window has cut its keys already
            return None
        wanted = (*self._like(call), keys, window)
        if wanted not in self._masks:
            self._masks[wanted] = self._make_mask(call, keys, window)
        return self._masks[wanted]

    def added(self, call: int, keys: int, window: int | None, heads: int, like: Tensor) -> Tensor:
        """[heads * high, wide] 0 = visible, -inf = not, of `heads` heads below each other, with high and wide by `sides`.
        No query sees added keys; added queries see all others, so that their softmax is a number."""
        wanted = (*self._like(call), keys, window, heads)
        if wanted not in self._added:
            mask, queries = self.mask(call, keys, window), self.lengths[call]
            one = like.new_zeros(sides(queries, keys))
            one[:, keys:] = float("-inf")
            if mask is not None:
                one[:queries, :keys].masked_fill_(~mask, float("-inf"))
            self._added[wanted] = one.repeat(heads, 1)
        return self._added[wanted]

    def _like(self, call: int) -> tuple[int, int]:
        """Calls of one node have the same masks where they are as long; one of several has its own."""
        return (-1 if len(self.calls[call]) == 1 else call), self.lengths[call]

    def _make_mask(self, call: int, keys: int, window: int | None) -> Tensor:
        """The last keys are the call's own tokens, those before them the last ones of its ancestors."""
        begin, queries = self.trie.nodes[self.calls[call][0]].begin, self.lengths[call]
        row, own = torch.arange(begin, begin + queries, device=self.device), slice(begin, begin + queries)
        below_it = (row <= row[:, None]) & (row[:, None] < self._ends[own])
        visible = torch.cat([below_it.new_ones(queries, keys - queries), below_it], 1)
        if window is None:
            return visible
        place = self._positions[own]
        before = place[0] - torch.arange(keys - queries, 0, -1, device=self.device)
        return visible & (place[:, None] - torch.cat([before, place]) < window)


def by_products(dtype: torch.dtype, device: torch.device, pairs: int = 0) -> bool:
    """Where two batched products beat torch's fused attention: in bfloat16 on the CPU, three to five times at these sizes. They
    keep their probabilities for the backward pass, which bounds the size."""
    return dtype == torch.bfloat16 and device.type == "cpu" and pairs <= SMALL


def sides(queries: int, keys: int) -> tuple[int, int]:
    """(queries, keys) that a call's products have: keys the next multiple of `SIDE`, queries that or the next power of 2,
    whichever is less. Calls then have few shapes: oneDNN compiles a kernel for each, and keeps it."""
    high, wide = (-(-n // SIDE) * SIDE for n in (queries, keys))
    return min(high, 1 << (queries - 1).bit_length()), wide


def subtrees(trie: Trie, worth: int) -> list[range]:
    """The nodes of each call of attention, one or one with all below it: so that pairs of a query and a key, and `worth` more
    for each call, are fewest. Several nodes have at most `SMALL` pairs, some of which a mask hides."""
    count = len(trie.nodes)
    last, price, whole = list(range(count)), [0] * count, [False] * count  # of each node with all below it
    for n in reversed(range(count)):  # children come after their parent: the sum of their prices stands there already
        node = trie.nodes[n]
        tokens, all_tokens = node.end - node.begin, trie.nodes[last[n]].end - node.begin
        apart = price[n] + tokens * (node.position + tokens) + worth
        pairs = all_tokens * (node.position + all_tokens)
        whole[n] = pairs <= SMALL and pairs + worth <= apart
        price[n] = pairs + worth if whole[n] else apart
        if node.parent >= 0:
            last[node.parent] = max(last[node.parent], last[n])
            price[node.parent] += price[n]
    found: list[range] = []
    n = 0
    while n < count:
        found.append(range(n, last[n] + 1 if whole[n] else n + 1))
        n = found[-1].stop
    return found
