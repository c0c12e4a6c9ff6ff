"""Attention over a token trie, as transformers' models call it.

A model's attention implementation is replaced by one of the same name with `preftune_` before it. Given a trie as a keyword of
the model's call it attends along the trie; without one it does exactly what the original does, so that generation and every
other use of the model stay as they are. The trie travels as a keyword, never through a global or a module: with gradient
checkpointing a layer runs again during the backward pass, and must find the trie of its own forward pass.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from preftune.scoring import flex
from preftune.scoring.layout import Layout, by_products
from preftune.scoring.virtual import in_place

KEYWORD = "preftune_trie"
PREFIX = "preftune_"


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
    return _call_by_call(query, key, value, layout, dropout=dropout, **how)


def _compared(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: dict[str, Any]) -> Tensor:
    """Attention in one call, after it and its gradients were compared with those call by call: on random numbers, since of a
    model's own the gradients may be little but rounding, and layer by layer, in the memory of one.

    Raises:
        ValueError: they differ.
    """
    assert layout.blocks is not None
    draw = torch.Generator(query.device).manual_seed(0)  # its own: a run's random numbers do not depend on this
    with torch.enable_grad():
        q, k, v = (torch.empty_like(x).normal_(generator=draw).requires_grad_() for x in (query, key, value))
        ours, theirs = flex.attend(q, k, v, layout.blocks, **how), _call_by_call(q, k, v, layout, **how)
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


def _call_by_call(
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
    """A call of attention for each node, or for one with all below it (`subtrees`), with its path for keys."""
    # split once: the gradient of many slices of one tensor would be as many tensors of its whole size
    queries, keys, values = (x.split(layout.lengths, dim=2) for x in (query, key, value))
    plain = softcap is None and s_aux is None
    outputs: list[Tensor] = []
    for call, path in enumerate(layout.paths):
        k, v = _join([keys[n] for n in path]), _join([values[n] for n in path])
        q, first = queries[call], 0
        if sliding_window is not None:  # keys that no token of this call sees
            first = max(0, k.shape[2] - q.shape[2] - sliding_window + 1)
            k, v = k[:, :, first:], v[:, :, first:]
        wide = k.shape[2]
        window = None if sliding_window is None or wide <= sliding_window else sliding_window
        if plain and by_products(q.dtype, q.device, q.shape[2] * wide) and not dropout:
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


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """The heads that share keys stand below each other as rows of one product, which is as large as its mask."""
    heads, queries, groups = q.shape[1], q.shape[2], k.shape[1]
    high, wide = len(mask) * groups // heads, mask.shape[1]
    rows = pad(q, (0, 0, 0, high - queries)).reshape(groups, -1, q.shape[3])
    k, v = (pad(x, (0, 0, 0, wide - x.shape[2])) for x in (k, v))
    alpha = q.shape[3] ** -0.5 if scaling is None else scaling
    scores = torch.baddbmm(mask.expand(groups, -1, -1), rows, k[0].transpose(1, 2), alpha=alpha)
    return (torch.softmax(scores, -1) @ v[0]).reshape(1, heads, high, v.shape[3])[:, :, :queries]


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
