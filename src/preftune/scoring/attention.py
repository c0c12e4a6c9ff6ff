"""Attention over a token trie, as transformers' models call it.

A model's attention implementation is replaced by one of the same name with `preftune_` before it. Given a trie as a keyword of
the model's call it attends along the trie; without one it does exactly what the original does, so that generation and every
other use of the model stay as they are. The trie travels as a keyword, never through a global or a module: with gradient
checkpointing a layer runs again during the backward pass, and must find the trie of its own forward pass.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from preftune.scoring import flex
from preftune.scoring.trie import Trie
from preftune.scoring.virtual import Kept, Virtual, below, in_place

KEYWORD = "preftune_trie"
SMALL = 2**18  # queries times keys of a call
WORTH = 2**12  # queries times keys that cost no more than a call: measured on a CPU
PREFIX = "preftune_"


@dataclass(slots=True)
class Layout:
    """What attention needs of a trie, on the device: and the masks that it makes once for all layers.

    trie: the row that the model is given. calls: of attention, the nodes of each; lengths: their tokens; paths: for each those
    before it whose keys it sees, and itself. blocks: of FlexAttention, which then takes the whole trie in one call; None: call
    by call. compare: both are run, and may not differ.
    kept: keys and values that stand for those of the trie's root, of `root` tokens: prefix tuning.
    windows: of each call of attention, by which a model that does not attend along the trie is found.
    """

    trie: Trie
    calls: list[range]
    lengths: list[int]
    paths: list[list[int]]
    device: torch.device
    blocks: flex.Blocks | None = None
    compare: bool = False
    kept: Kept | None = None
    root: int = 0
    windows: list[int | None] = field(default_factory=list["int | None"])
    _masks: dict[tuple[int | None, ...], Tensor] = field(default_factory=dict[tuple[int | None, ...], Tensor])
    _added: dict[tuple[int | None, ...], Tensor] = field(default_factory=dict[tuple[int | None, ...], Tensor])

    @classmethod
    def of(
        cls,
        trie: Trie,
        device: torch.device,
        *,
        virtual: Virtual | None = None,
        fused: bool = False,
        compare: bool = False,
    ) -> Layout:
        """virtual: tokens that stand before all of the trie's."""
        root, kept = (virtual.count, virtual.kept()) if virtual else (0, None)
        trie = below(trie, root) if root else trie
        trie = flex.filled(trie) if fused else trie
        calls = subtrees(trie, WORTH if device.type == "cpu" else 0)
        of_node = {node: n for n, call in enumerate(calls) for node in call}
        lengths = [trie.nodes[call[-1]].end - trie.nodes[call[0]].begin for call in calls]
        paths = [[of_node[node] for node in trie.path(call[0])] for call in calls]
        return cls(trie, calls, lengths, paths, device, flex.Blocks(trie, device) if fused else None, compare, kept, root)

    def mask(self, call: int, keys: int, window: int | None) -> Tensor | None:
        """[queries, keys] True = visible, for a call's tokens at the end of its keys; None where all of them are."""
        queries = self.lengths[call]
        if len(self.calls[call]) == queries == 1 and (window is None or keys <= window):
            return None
        wanted = (*self._like(call), keys, window)
        if wanted not in self._masks:
            self._masks[wanted] = self._make_mask(self.calls[call], keys, window)
        return self._masks[wanted]

    def added(self, call: int, keys: int, window: int | None, heads: int, like: Tensor) -> Tensor:
        """[heads * queries, keys] 0 = visible, -inf = not, the mask of `heads` heads below each other."""
        wanted = (*self._like(call), keys, window, heads)
        if wanted not in self._added:
            mask = self.mask(call, keys, window)
            zeros = like.new_zeros(self.lengths[call], keys)
            one = zeros if mask is None else zeros.masked_fill(~mask, float("-inf"))
            self._added[wanted] = one.repeat(heads, 1)
        return self._added[wanted]

    def _like(self, call: int) -> tuple[int, int]:
        """Calls of one node have the same masks where they are as long; one of several has its own."""
        return (-1 if len(self.calls[call]) == 1 else call), self.lengths[call]

    def _make_mask(self, call: range, keys: int, window: int | None) -> Tensor:
        """The last keys are the call's own tokens, those before them the last ones of its ancestors."""
        nodes = [self.trie.nodes[n] for n in call]
        own = torch.tensor([node.position + i for node in nodes for i in range(node.end - node.begin)], device=self.device)
        others = torch.arange(nodes[0].position - keys + len(own), nodes[0].position, device=self.device)
        visible = torch.ones(len(own), keys, dtype=torch.bool, device=self.device).tril(keys - len(own))
        within = {n: slice(node.begin - nodes[0].begin, node.end - nodes[0].begin) for n, node in zip(call, nodes, strict=True)}
        for n, queries in within.items():
            beside = within.keys() - self.trie.path(n)
            for m in beside:
                visible[queries, len(others) :][:, within[m]] = False
        return visible if window is None else visible & (own[:, None] - torch.cat([others, own]) < window)


def subtrees(trie: Trie, worth: int) -> list[range]:
    """The nodes of each call of attention: one, or one with all below it, where for each call that is saved no more than
    `worth` products of a query and a key are added, which a mask then hides."""
    count = len(trie.nodes)
    last, cost, calls = list(range(count)), [0] * count, [1] * count  # of the subtree of each node
    for n in reversed(range(count)):  # children come after their parent: theirs are known, and stand here as sums
        node = trie.nodes[n]
        tokens, all_tokens = node.end - node.begin, trie.nodes[last[n]].end - node.begin
        cost[n] += tokens * (node.position + tokens)
        together = all_tokens * (node.position + all_tokens)
        if calls[n] > 1 and together <= min(SMALL, cost[n] + worth * (calls[n] - 1)):
            cost[n], calls[n] = together, 1
        if node.parent >= 0:
            last[node.parent] = max(last[node.parent], last[n])
            cost[node.parent] += cost[n]
            calls[node.parent] += calls[n]
    found: list[range] = []
    n = 0
    while n < count:
        found.append(range(n, last[n] + 1 if calls[n] == 1 else n + 1))
        n = found[-1].stop
    return found


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """softmax(scaling * q k^T) v of every token over its ancestors and itself.

    Args:
        query: [1, heads, T, d]; key, value: [1, key-value heads, T, d].
        sliding_window: a key is seen if it is fewer positions back. A token's ancestors are its positions, so this is exact.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [heads] logits of sinks, which take part in the softmax and have no value.

    Returns:
        [1, T, heads, d]
    """
    layout.windows.append(sliding_window)
    how: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
    if layout.compare:
        return _compared(query, key, value, layout, how)
    if layout.blocks is not None and not dropout:  # FlexAttention has none
        return flex.attend(query, key, value, layout.blocks, **how)
    return _node_by_node(query, key, value, layout, dropout=dropout, **how)


def _compared(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: dict[str, Any]) -> Tensor:
    """Attention in one call, after it and its gradients were compared with those node by node: on random numbers, since of a
    model's own the gradients may be little but rounding, and layer by layer, in the memory of one.

    Raises:
        ValueError: they differ.
    """
    assert layout.blocks is not None
    draw = torch.Generator(query.device).manual_seed(0)  # its own: a run's random numbers do not depend on this
    with torch.enable_grad():
        q, k, v = (torch.empty_like(x).normal_(generator=draw).requires_grad_() for x in (query, key, value))
        ours, theirs = flex.attend(q, k, v, layout.blocks, **how), _node_by_node(q, k, v, layout, **how)
        slope = torch.empty_like(theirs).normal_(generator=draw)
        found, expected = ([x, *torch.autograd.grad(x, (q, k, v), slope)] for x in (ours, theirs))
    for name, a, b in zip(("output", "gradient of q", "gradient of k", "gradient of v"), found, expected, strict=True):
        if (differs := apart(a, b)) > bound(b.dtype):
            raise ValueError(f"its {name} differs by {differs:.2g}")
    return flex.attend(query, key, value, layout.blocks, **how)


def apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, infinite where that is no number."""
    return float(((a - b).norm() / b.norm()).nan_to_num(nan=float("inf")))


def bound(dtype: torch.dtype) -> float:
    """How far `apart` two ways to the same tensor may lie: rounding costs less, and anything wrong far more."""
    return 1e-4 if dtype == torch.float32 else 5e-2


def _node_by_node(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """A call or two of attention for each node, with its path for keys."""
    # split once: the gradient of many slices of one tensor would be as many tensors of its whole size
    queries, keys, values = (x.split(layout.lengths, dim=2) for x in (query, key, value))
    plain = softcap is None and s_aux is None
    outputs: list[Tensor] = []
    for call, path in enumerate(layout.paths):
        k, v = _join([keys[n] for n in path]), _join([values[n] for n in path])
        q, first = queries[call], 0
        if sliding_window is not None:  # keys that no token of this node sees
            first = max(0, k.shape[2] - q.shape[2] - sliding_window + 1)
            k, v = k[:, :, first:], v[:, :, first:]
        wide = k.shape[2]
        window = None if sliding_window is None or wide <= sliding_window else sliding_window
        if plain and _small(q, wide) and not dropout:
            out = _products(q, k, v, layout.added(call, wide, window, q.shape[1] // k.shape[1], q), scaling)
        elif plain:
            causal = q.shape[2] == wide and wide > 1 and window is None and len(layout.calls[call]) == 1
            mask = None if causal else layout.mask(call, wide, window)
            out = scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            out = _eager(q, k, v, layout.mask(call, wide, window), scaling, dropout, softcap, s_aux)
        outputs.append(out.transpose(1, 2))
    # contiguous, as from transformers' own functions: some models take a view of it
    return torch.cat(outputs, dim=1)


def _small(q: Tensor, keys: int) -> bool:
    """Where two batched products beat torch's fused attention: in bfloat16 on the CPU, three to five times at these sizes. They
    keep their probabilities for the backward pass, which bounds the size."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] * keys <= SMALL


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """The heads that share keys stand below each other as rows of one product."""
    heads, queries, groups = q.shape[1], q.shape[2], k.shape[1]
    rows = q.reshape(groups, -1, q.shape[3])
    alpha = q.shape[3] ** -0.5 if scaling is None else scaling
    scores = torch.baddbmm(mask.expand(groups, -1, -1), rows, k[0].transpose(1, 2), alpha=alpha)
    return (torch.softmax(scores, -1) @ v[0]).reshape(1, heads, queries, v.shape[3])


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """For what scaled-dot-product attention has no words: soft-capping and sinks; float32 softmax."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    return torch.nn.functional.dropout(weights, dropout) @ v


def forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers calls in every attention layer."""
    layout: Layout | None = keywords.pop(KEYWORD, None)
    if layout is None:
        return _original(module)(module, query, key, value, attention_mask, **keywords)
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ValueError("its attention has a mask of its own")  # it is not read: found when the model is asked
    if layout.kept is not None:
        keys, values = layout.kept[module.layer_idx]
        key, value = in_place(key, keys, layout.root), in_place(value, values, layout.root)
    known = {name: keywords.get(name) for name in ("scaling", "sliding_window", "softcap", "s_aux")}
    return attend(query, key, value, layout, dropout=keywords.get("dropout") or 0.0, **known), None


def _original(module: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation.removeprefix(PREFIX)
    if name == "eager":  # every modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def install(model: Any) -> str:
    """Lets the model attend along tries; returns the name of the implementation that it had."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before: str = model.config._attn_implementation
    if not before.startswith(PREFIX):
        ALL_ATTENTION_FUNCTIONS.register(PREFIX + before, forward)
        if before in ALL_MASK_ATTENTION_FUNCTIONS:
            ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + before, ALL_MASK_ATTENTION_FUNCTIONS[before])
        model.set_attn_implementation(PREFIX + before)
    return before
