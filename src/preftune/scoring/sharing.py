"""Which models can share: asked of each on a few tokens, before anything of the user's is scored."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from preftune.errors import Refusal
from preftune.models.adapters import inside
from preftune.models.load import max_positions
from preftune.models.randomness import evaluation_mode
from preftune.models.weights import name_of
from preftune.scoring import attention, exact, flex
from preftune.scoring.backbone import along, backbone, padded
from preftune.scoring.head import Head
from preftune.scoring.layout import Layout
from preftune.scoring.rope import Rope
from preftune.scoring.trie import grow

log = logging.getLogger("preftune")

_ASKED: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
_FUSED: weakref.WeakSet[Any] = weakref.WeakSet()  # of those that can, the ones whose attention is one call a layer


class Wrong(str):
    """Why a model cannot share that reads the trie and comes to other numbers: no kind of model, but a fault."""


def cannot_share(model: Any) -> str | None:
    """Why a model cannot score a trie, or None where it can: asked once per model, on a trie of a few tokens.

    A model that does not attend through transformers' interface, or drops the keyword on the way, would be wrong in silence.
    So the calls of attention are counted, the windows they are given are compared with the config's, a mask of the model's own
    is refused, and the hidden states are compared with those of the sequences one by one. Where FlexAttention may run it is
    tried first, forward and backward, and attention node by node where it fails or is wrong.
    """
    if model not in _ASKED:
        before = model.config._attn_implementation
        _ASKED[model] = why = _ask(model)
        if why:
            model.set_attn_implementation(before)
    return _ASKED[model]


def is_fused(model: Any, device: torch.device) -> bool:
    """Whether attention of a model that can share is one call a layer on this device."""
    return model in _FUSED and flex.usable(device)


def require_sharing(model: Any) -> None:
    """Refuses a model, or a peft model around one, whose answers cannot share their prompt."""
    why = cannot_share(inside(model))
    if why:
        line = f"the model's answers cannot share their prompt: {why}; train.sharing=auto gives each its own copy"
        raise Refusal(line, code="cannot_share", key="train.sharing")


def _layers(config: Any) -> list[str]:
    """The kind of each layer."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def _windows(config: Any) -> list[int | None]:
    """The window of each layer as the config has it."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "layer_types", None):
        used = getattr(config, "use_sliding_window", None) is not False
        return [window if used else None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in _layers(config)]


def _ask(model: Any) -> str | None:
    # a classifier has no head of this kind
    if backbone(model) is None or (not hasattr(model, "score") and Head(model).body is None):
        return "its backbone cannot be told from its head"
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' interface"
    kinds = _layers(model.config.get_text_config())
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange:
        return f"it has layers of {', '.join(strange)}"
    slower = None
    if flex.usable(next(model.parameters()).device):
        slower = _probe(model, kinds, fused=True)
        if slower is None:
            _FUSED.add(model)
            return None
    why = _probe(model, kinds, fused=False)
    if slower and not why:
        log.warning(f"{type(model).__name__}: attention runs node by node: {slower}")
    return why


def _probe(model: Any, kinds: list[str], *, fused: bool) -> str | None:
    """What goes wrong along a trie of three sequences; None where nothing does. Rounding is nothing wrong: where layers
    choose their experts it can make a large difference, which is none in float32."""
    dtype = next(model.parameters()).dtype
    differs = _distance(model, kinds, fused=fused)
    if isinstance(differs, str) or differs <= attention.bound(dtype):
        return differs if isinstance(differs, str) else None
    line = f"its hidden states along a trie differ by {differs:.2g} from those of plain sequences"
    if dtype == torch.float32:
        return Wrong(line)
    name, kind = type(model).__name__, name_of(dtype)
    try:
        with exact.in_float32(model):
            again = _distance(model, kinds, fused=fused)
            if isinstance(again, str):
                raise RuntimeError(again)
    except exact.Untried as cannot:
        log.warning(f"{name}: {line} in {kind}. Whether that is rounding is not known: {cannot}")
        return None
    if again > attention.bound(torch.float32):
        return Wrong(f"{line}, and by {again:.2g} in float32")
    log.info(f"{name}: {line} in {kind}: by rounding, since by {again:.2g} in float32")
    return None


def _distance(model: Any, kinds: list[str], *, fused: bool) -> float | str:
    """Of hidden states along a trie from those of its three sequences one by one; or why the model cannot run along it."""
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    # one call of attention is tried on keys of several blocks, of those that all their queries see and of others
    positions, rope = max_positions(model), Rope.of(model)
    limits = [limit - 6 for limit in (positions, *rope.limits) if limit is not None]
    length = max(9, min([300, *limits])) if fused else 9
    prompt = [(7 * n + 3) % vocabulary for n in range(length)]
    sequences = [(*prompt, *((5 * n + k) % vocabulary for n in range(4 + k))) for k in range(3)]
    trie = grow(sequences, 1)
    layout = Layout.of(trie, device, model.dtype, fused=fused, compare=fused)
    try:
        with torch.no_grad(), evaluation_mode(model):
            rope.restart()
            shared = along(model, layout)
            alone = [padded(model, [s], device) for s in sequences]
        windows = _windows(model.config.get_text_config())
    except torch.OutOfMemoryError:  # it says nothing of the model
        raise
    except Exception as error:  # whatever a model's own code says of a trie, it cannot be used
        what = "FlexAttention fails" if fused else "its code does not take a trie"
        return f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    if len(layout.windows) != len(kinds):
        return f"{len(layout.windows)} of its {len(kinds)} attention layers read the trie"
    # a window may live in the mask alone, which is not read here, and be wider than these sequences are long
    for layer, (said, window) in enumerate(zip(layout.windows, windows, strict=True)):
        if said != window:
            return f"layer {layer} does not say its window"
    if not all(bool(torch.isfinite(states).all()) for states in alone):
        return "its hidden states are not finite"
    together = [shared[trie.places(n)] for n in range(len(sequences))]
    return max(attention.apart(a, b) for a, b in zip(together, alone, strict=True))
