"""What a dry run shows: the plan, and three rows token by token with the scored span marked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from preftune import methods

if TYPE_CHECKING:
    from preftune.config import TrainKeys
    from preftune.data.render import Rendered as Sequence
    from preftune.runs.prepare import Rendered

log = logging.getLogger("preftune")


def show(keys: TrainKeys, rendered: Rendered, tokenizer: Any) -> None:
    """Says it through the log, like everything that is said."""
    from preftune.training.steps import count_steps

    method = methods.make(keys.method.name or "", beta=keys.beta)
    examples = len(method.examples(rendered.train.groups))
    steps = count_steps(examples, batch_size=keys.batch_size, epochs=keys.epochs, steps=keys.steps)
    lengths = [len(s.ids) for s in rendered.train.sequences]
    log.info(
        f"dry run: {keys.method.name} on {examples:,} examples in {len(rendered.train.groups):,} groups, "
        f"{len(rendered.held.groups):,} groups held out; {steps:,} steps of {keys.batch_size}; "
        f"{sum(lengths):,} tokens an epoch, longest {max(lengths):,} of {keys.max_length or 'no limit'}"
    )
    for sequence in rendered.train.sequences[:3]:
        log.info(draw(sequence, tokenizer))


def draw(sequence: Sequence, tokenizer: Any) -> str:
    """The tokens of one response under its prompt; what is scored stands between the marks ⟦ ⟧."""
    scored = [False] * sequence.start + list(sequence.mask or [True] * (len(sequence.ids) - sequence.start))
    text, inside = "", False
    for token, now in zip(tokenizer.convert_ids_to_tokens(list(sequence.ids)), scored, strict=True):
        text += ("⟦" if now else "⟧") if now != inside else ("·" if text else "")
        text, inside = text + str(token), now
    return f"group {sequence.group}, response {sequence.response}: {text}{'⟧' if inside else ''}"
