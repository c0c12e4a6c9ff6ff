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
from preftune.scoring import attention, exact, flex
from preftune.scoring.head import Head, Kind, ScalarHead, Value, backbone
from preftune.scoring.rope import Rope
from preftune.scoring.trie import SHORTEST, grow
from preftune.scoring.virtual import Virtual

log = logging.getLogger("preftune")


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
        self.fused = self.shares and self.inner in _FUSED and flex.usable(self.device)
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
            hidden = along(self.inner, attention.Layout.of(trie, self.device, virtual=virtual, fused=self.fused), virtual)
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


def along(model: Any, layout: attention.Layout, virtual: Virtual | None = None) -> Tensor:
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


@contextmanager
def evaluation_mode(model: Any) -> Generator[None]:
    """Every dropout off for the time of the call, and afterwards each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


# -- which models can share -------------------------------------------------------------------------------------------------

_ASKED: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
_SAID: weakref.WeakSet[Any] = weakref.WeakSet()  # of those that cannot, the ones that were scored, which was said
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


def require_sharing(model: Any) -> None:
    """Refuses a model, or a peft model around one, whose answers cannot share their prompt."""
    why = cannot_share(inside(model))
    if why:
        line = f"the model's answers cannot share their prompt: {why}; train.sharing=auto gives each its own copy"
        raise Refusal(line, code="cannot_share", key="train.sharing")


def check_recomputed(model: Any, *, share: bool) -> None:
    """Refuses activation checkpointing of a model that would lose a prefix by it: where prompts are not shared its keys and
    values are a cache, and a layer that computes again is given none by transformers."""
    virtual = Virtual.of(model)
    if virtual and not virtual.embedded and not Scorer(model, share=share).shares:
        line = "adapter=prefix needs answers that share their prompt for it: leave one of the two away, or adapter=prompt"
        raise Refusal(line, code="no_checkpointing", key="train.checkpointing")


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
    name, kind = type(model).__name__, str(dtype).removeprefix("torch.")
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
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    rope = Rope.of(model)
    length = max(9, min(300, positions - 6, *(limit - 6 for limit in rope.limits))) if fused else 9
    prompt = [(7 * n + 3) % vocabulary for n in range(length)]
    sequences = [(*prompt, *((5 * n + k) % vocabulary for n in range(4 + k))) for k in range(3)]
    trie = grow(sequences, 1)
    layout = attention.Layout.of(trie, device, fused=fused, compare=fused)
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
