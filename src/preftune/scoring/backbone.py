"""A model without its head, and its ways through rows: along a trie, padded beside each other, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from preftune.scoring import attention
from preftune.scoring.layout import Layout
from preftune.scoring.virtual import Virtual


def backbone(model: Any) -> Any:
    """The model without its head: the module that holds the input embeddings; None where there is none."""
    candidates = (model.get_decoder(), *(getattr(model, name, None) for name in (model.base_model_prefix, "model")))
    table, inside = model.get_input_embeddings(), _inside(model)

    def is_body(candidate: Any) -> bool:
        within = any(candidate is inner for inner in inside)
        return within and any(table is inner for inner in candidate.modules())

    return next((candidate for candidate in candidates if is_body(candidate)), None)


def _inside(model: Any) -> list[nn.Module]:
    return [inner for child in model.children() for inner in child.modules()]


def along(model: Any, layout: Layout, virtual: Virtual | None = None) -> Tensor:
    """[T, D] hidden states of the flat row of a trie, and after them those of what the layout fills it up with; of virtual
    tokens, which stand before it in the layout, none."""
    attention.install(model)
    ids = torch.tensor([layout.trie.ids[layout.root :]], device=layout.device)
    return backbone(model)(
        **(virtual.before(ids) if virtual else {"input_ids": ids}),
        position_ids=torch.tensor([layout.trie.positions], device=layout.device),
        # four dimensions tell transformers that the mask is made already; attention reads the trie instead
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.device),
        use_cache=False,
        **{attention.KEYWORD: layout},
    ).last_hidden_state[0, layout.root :]


def padded(model: Any, sequences: Sequence[Sequence[int]], device: torch.device, virtual: Virtual | None = None) -> Tensor:
    """[R * longest, D] hidden states of one row per sequence, padded at the end."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=device)
    real = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    given: dict[str, Any] = {"input_ids": ids}
    if virtual:
        real = torch.cat([real.new_ones(len(ids), virtual.count), real], 1)
        given = virtual.before(ids) if virtual.embedded else given | {"past_key_values": virtual.cache(len(ids))}
    return backbone(model)(**given, attention_mask=real, use_cache=False).last_hidden_state[:, -width:].flatten(0, 1)


def whole(model: Any, sequences: Sequence[Sequence[int]], device: torch.device, virtual: Virtual | None = None) -> Tensor:
    """[T, V] logits of sequences one after the other, each by itself: of a model without a backbone, of which nothing is known,
    nor what it makes of padding."""
    run = virtual.model if virtual else model
    rows = (torch.tensor([s], device=device) for s in sequences)
    return torch.cat([run(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :] for ids in rows])
