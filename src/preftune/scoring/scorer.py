"""The scorer: a model's backbone over a token trie, and its head at the positions that predict scored tokens."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor, nn

from preftune.data.render import Rendered
from preftune.errors import Refusal
from preftune.models.adapters import gives_scalars, inside, virtual_tokens
from preftune.scoring.backbone import along, padded, whole
from preftune.scoring.head import Head, Kind, ScalarHead, Value
from preftune.scoring.layout import Layout
from preftune.scoring.rope import Rope
from preftune.scoring.sharing import cannot_share, is_fused
from preftune.scoring.trie import SHORTEST, grow
from preftune.scoring.virtual import Virtual

log = logging.getLogger("preftune")

_SAID: weakref.WeakSet[Any] = weakref.WeakSet()  # models that cannot share and were scored, which was said


@dataclass(frozen=True, slots=True)
class PassScores:
    """Of R sequences: their scored tokens one after the other, N in all.

    token_logp: [N] nats, float32. lengths: scored tokens of the sequences. tokens: that went through the model, padding left
    out. values: what else was wanted, [N].
    """

    token_logp: Tensor
    lengths: list[int]
    tokens: int
    values: dict[Value, Tensor]

    @property
    def logp(self) -> Tensor:
        """[R] nats, summed over the scored tokens."""
        return torch.stack([each.sum() for each in self.token_logp.split(self.lengths)])


class Scorer(nn.Module):
    """Backbone and head of one model, run by one forward.

    Args:
        model: of transformers, or a peft model around one: a causal language model, or for the scalar head a sequence
            classifier with one label.
        share: False gives every sequence its own copy of its prompt even where the model could share it.
        head: `logp`, or `scalar`: then `token_logp` is one number per sequence, of its last token, and `logp` that number;
            None: what the model gives.
    """

    def __init__(self, model: Any, *, share: bool = True, head: Kind | None = None) -> None:
        super().__init__()
        self.model = model
        self.inner: Any = inside(model)
        scalar = gives_scalars(self.inner) if head is None else head == "scalar"
        self.head = ScalarHead(self.inner) if scalar else Head(self.inner)
        self.before = virtual_tokens(model)
        self.wanted = share
        self.shares = share and cannot_share(self.inner) is None
        self.fused = self.shares and is_fused(self.inner, self.device)
        self.rope = Rope.of(self.inner)
        self.in_parts = False
        self.at_once = 1  # passes whose graphs stand at the same time: one, where each is followed by its backward pass

    @property
    def device(self) -> torch.device:
        return next(self.inner.parameters()).device

    def forward(self, sequences: Sequence[Rendered], want: tuple[Value, ...] = ()) -> PassScores:
        """Scores the sequences, in one pass where their rotary frequencies are the same; with a graph where gradients are
        enabled."""
        virtual = Virtual.of(self.model)
        in_front = virtual.count if virtual else 0
        runs = self.rope.runs([in_front + len(s.ids) for s in sequences])
        at_once = self.at_once * len(runs)
        if len(runs) == 1:
            return self._run(sequences, want, virtual, at_once)
        parts = [self._run([sequences[n] for n in run], want, virtual, at_once) for run in runs]
        order = sorted(range(len(sequences)), key=[n for run in runs for n in run].__getitem__)
        lengths = [length for part in parts for length in part.lengths]

        def joined(values: list[Tensor]) -> Tensor:
            each = torch.cat(values).split(lengths)
            return torch.cat([each[n] for n in order])

        return PassScores(
            token_logp=joined([part.token_logp for part in parts]),
            lengths=[lengths[n] for n in order],
            tokens=sum(part.tokens for part in parts),
            values={name: joined([part.values[name] for part in parts]) for name in want},
        )

    def _run(self, sequences: Sequence[Rendered], want: tuple[Value, ...], virtual: Virtual | None, at_once: int) -> PassScores:
        """One pass, of so many whose graphs stand at the same time."""
        if self.wanted and not self.shares and self.inner not in _SAID:
            _SAID.add(self.inner)
            why = cannot_share(self.inner)
            log.warning(f"{type(self.inner).__name__}: every response is scored with its own copy of the prompt: {why}")
        self.rope.restart()
        if self.shares:
            trie = grow([s.ids for s in sequences], SHORTEST, [s.attachments for s in sequences])
            layout = Layout.of(trie, self.device, self.inner.dtype, virtual=virtual, fused=self.fused)
            hidden = along(self.inner, layout, virtual)
            places = [trie.places(n) for n in range(len(sequences))]
            tokens = len(trie.ids) + (virtual.count if virtual else 0)
        else:
            ids = [s.ids for s in sequences]
            alone = self.head.body is None
            hidden = (whole if alone else padded)(self.inner, ids, self.device, virtual)
            begins = accumulate(map(len, ids), initial=0) if alone else count(0, max(map(len, ids)))
            places = [[begin + i for i in range(len(row))] for begin, row in zip(begins, ids, strict=False)]
            tokens = sum(map(len, ids)) + len(ids) * (virtual.count if virtual else 0)
        asked = [self.head.asked(s) for s in sequences]
        # a token that several sequences share, with the same tokens before it, is predicted once
        unique: dict[tuple[int, int], int] = {}
        index: list[int] = []
        for place, ours in zip(places, asked, strict=True):
            index += [unique.setdefault((place[at], target), len(unique)) for at, target in ours]
        at, targets = (torch.tensor(column, device=self.device) for column in zip(*unique, strict=True))
        states = hidden[at]
        which = torch.tensor(index, device=self.device)
        return PassScores(
            token_logp=self.head(states, targets, at_once)[which],
            lengths=[len(ours) for ours in asked],
            tokens=tokens,
            values={name: v[which] for name, v in self.head.values(states, want).items()} if want else {},
        )


_OWN = "_preftune_scorer"  # in the model's own dictionary, where no module is registered and nothing outlives the model


def give(model: Any, scorer: Scorer) -> None:
    """From here on this is the model's only scorer."""
    model.__dict__[_OWN] = scorer


def scorer_of(model: Any, *, share: bool = True) -> Scorer:
    """The model's own scorer where it has been given one, else a new one."""
    return model.__dict__.get(_OWN) or Scorer(model, share=share)


@contextmanager
def callable_itself(model: Any) -> Generator[None]:
    """Inside, the model may be called without its scorer, to generate or for the logits of all tokens: of one in parts the root
    is gathered."""
    scorer: Any = model.__dict__.get(_OWN) if model is not None else None
    if scorer is not None:
        scorer.unshard()
    try:
        yield
    finally:
        if scorer is not None:
            scorer.reshard()


def check_recomputed(model: Any, *, share: bool) -> None:
    """Refuses activation checkpointing of a model that would lose a prefix by it: where prompts are not shared its keys and
    values are a cache, and a layer that computes again is given none by transformers."""
    virtual = Virtual.of(model)
    if virtual and not virtual.embedded and not Scorer(model, share=share).shares:
        line = "adapter=prefix needs answers that share their prompt for it: leave one of the two away, or adapter=prompt"
        raise Refusal(line, code="no_checkpointing", key="train.checkpointing")
