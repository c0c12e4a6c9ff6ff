"""From hidden states to log-probabilities of given tokens, without the logits of all positions at once.

Whatever a model does after its backbone (bias, scale, soft-cap, an adapter on the head) is done by the model's own forward: it
is called with a stand-in for the backbone that hands the hidden states through. Where that turns out to be one plain matrix
product, which is asked and not assumed, a function of our own computes it and its gradient in blocks. A model that cannot be
called like that is run as a whole, and its logits are read in blocks.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from preftune.data.render import Rendered
from preftune.errors import Refusal
from preftune.models.adapters import gives_scalars

# float32 entries of logits held at once, in each of at most three tensors: 128 MiB, and on the CPU what its caches hold
BLOCK, CPU_BLOCK = 2**25, 2**20
PART = 2**23  # entries of a product that is added to a tensor of another precision
KEPT = 2**26  # entries of a softmax that a trained head keeps for its backward pass: 256 MiB
FEWEST = 64  # rows, or columns, of one product: with fewer, reading the weights is all it does

log = logging.getLogger("preftune")

Value = Literal["entropy", "top1"]
Kind = Literal["logp", "scalar"]


_SAID: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose head was said not to be plain


class Head:
    """The head of one model. One that is more than a matrix product is said, once.

    Args:
        model: a causal language model of transformers; its adapters, if any, are inside its modules.

    Raises:
        Refusal: a model that predicts no tokens.
    """

    def __init__(self, model: Any) -> None:
        self.output: Any = model.get_output_embeddings()
        if gives_scalars(model) or (self.output is None and not model.can_generate()):
            hint = 'head="scalar" gives its number' if gives_scalars(model) else "load it with AutoModelForCausalLM"
            raise Refusal(f"{type(model).__name__} predicts no tokens: {hint}", code="no_logp_head", key="head")
        self.body = backbone(model)
        self.shell = _without(model, self.body) if self.body is not None else None
        self.plain = self._is_plain()
        if not self.plain and not self._runs(model):
            self.body = self.shell = None
        weight = getattr(self.output, "weight", None)
        device = next(model.parameters()).device if weight is None else weight.device
        self.entries, self.kept = CPU_BLOCK if device.type == "cpu" else BLOCK, KEPT
        # gives the tensor that a plain head's weight gradient is added to in the backward pass; None: autograd gets it
        self.into: Callable[[], Tensor] | None = None
        if not self.plain and model not in _SAID:
            _SAID.add(model)
            how = "the head cannot be run by itself: the logits of all tokens are computed, response by response"
            own = "the head is more than one matrix product: it is run by the model's own code, a chunk at a time"
            log.info(f"{type(model).__name__}: {how if self.shell is None else own}")

    @staticmethod
    def asked(sequence: Rendered) -> list[tuple[int, int]]:
        """(place of the state, token to predict there) for each scored token: its state is that of the token before it."""
        places = range(sequence.start, len(sequence.ids))
        mask = sequence.mask or [True] * len(places)
        return [(place - 1, sequence.ids[place]) for place, scored in zip(places, mask, strict=True) if scored]

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p(target | hidden) of each row.

        Args:
            hidden: [N, D].
            targets: [N] token ids.

        Returns:
            [N] nats, float32; the log-softmax is taken in float32 whatever the model's precision.
        """
        if self.plain:
            return self._of_product(hidden.to(self.output.weight.dtype), targets)  # they may be float32 beside a bfloat16 head
        parts: list[Tensor] = []
        rows = self._rows(hidden)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            graph = torch.is_grad_enabled()
            parts.append(checkpoint(self._logp, h, t, use_reentrant=False) if graph else self._logp(h, t))  # pyright: ignore
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

    def values(self, hidden: Tensor, want: tuple[Value, ...]) -> dict[Value, Tensor]:
        """[N] each, without a graph: `entropy` in nats; `top1`, the likeliest token."""
        found: dict[Value, list[Tensor]] = {name: [] for name in want}
        with torch.no_grad():
            for h in hidden.split(self._rows(hidden)):
                log_p = torch.log_softmax(self.logits(h).float(), -1)
                if "entropy" in found:
                    found["entropy"].append(-(log_p.exp() * log_p).sum(-1))
                if "top1" in found:
                    found["top1"].append(log_p.argmax(-1))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V], by the model's own forward. Of a model whose backbone cannot be told apart, `hidden` are its logits."""
        return hidden if self.shell is None else self.shell(inputs_embeds=hidden[None], use_cache=False).logits[0]

    def _of_product(self, hidden: Tensor, targets: Tensor) -> Tensor:
        weight, bias, graph = self.output.weight, self.output.bias, torch.is_grad_enabled()
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if graph and hidden.requires_grad and not trained:
            return _FrozenLogp.apply(hidden, weight, bias, targets, self.entries)  # pyright: ignore
        keeps = graph and trained and len(hidden) * len(weight) <= self.kept
        return _LinearLogp.apply(hidden, weight, bias, targets, self.entries, keeps, self.into)  # pyright: ignore

    def _logp(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden).float()
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    def _rows(self, hidden: Tensor) -> int:
        """How many positions at once."""
        weight = getattr(self.output, "weight", None)
        return _block(hidden.shape[-1] if self.shell is None or weight is None else weight.shape[0], self.entries)

    def _runs(self, model: Any) -> bool:
        """Whether the model's own forward takes hidden states. They may be of another width than those of its last product."""
        some = next(model.parameters())
        for width in (getattr(self.output, "in_features", None), getattr(model.config.get_text_config(), "hidden_size", None)):
            rows = torch.zeros(3, width or 0, device=some.device, dtype=some.dtype)
            if width and (logits := self._tried(rows)) is not None and logits.shape[0] == len(rows):
                return True
        return False

    def _is_plain(self) -> bool:
        """Whether the model's own forward gives W h + b: it hands the output layer just what it was given, and returns just
        what that gave back, here of sizes at which a cap or a scale would show whatever the weights are."""
        if type(self.output) is not nn.Linear:
            return False
        weight = self.output.weight
        sizes = torch.tensor([[0.1], [1.0], [60.0]], device=weight.device, dtype=weight.dtype)
        given, back = (sizes * torch.linspace(-1, 1, n, device=weight.device, dtype=weight.dtype) for n in weight.shape[::-1])
        taken: list[Tensor] = []

        def instead(module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> Tensor:
            taken.append(arguments[0])
            return back.reshape(result.shape)

        with self.output.register_forward_hook(instead):
            returned = self._tried(given)
        if returned is None or len(taken) != 1:
            return False
        # float32 of the same numbers is the same
        return torch.equal(taken[0].reshape(given.shape), given) and torch.equal(returned.float(), back.float())

    def _tried(self, rows: Tensor) -> Tensor | None:
        """Logits of hidden states, None where the model's own forward does not take them, whatever it says."""
        if self.shell is None:
            return None
        try:
            with torch.no_grad():
                return self.logits(rows)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None


class ScalarHead:
    """The head of a reward model: one number per response, at its last token.

    Args:
        model: a sequence classifier of transformers over a decoder, with one label.

    Raises:
        Refusal: a model without such a head.
    """

    plain = False

    def __init__(self, model: Any) -> None:
        self.body = backbone(model)
        self.output: Any = getattr(model, "score", None)
        told = callable(self.output) and self.body is not None
        if not told or not gives_scalars(model):
            what = f"gives {model.config.num_labels} numbers" if told else "has no head named score"
            line = f"{type(model).__name__} {what}; a scalar head is that of a sequence classifier with num_labels=1"
            raise Refusal(line, code="no_scalar_head", key="head")

    @staticmethod
    def asked(sequence: Rendered) -> list[tuple[int, int]]:
        """The last token's state; nothing is predicted there."""
        return [(len(sequence.ids) - 1, -1)]

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[N] numbers of hidden states [N, D], float32."""
        return self.output(hidden).float().squeeze(-1)

    def values(self, hidden: Tensor, want: tuple[Value, ...]) -> dict[Value, Tensor]:
        raise Refusal(f"a scalar head has no {', '.join(want)}: there is no next token", code="unknown_want", key="want")


def _block(others: int, entries: int) -> int:
    """How many rows (columns) of logits at once, where there are so many columns (rows)."""
    return max(FEWEST, entries // others)


class _FrozenLogp(Function):
    """log softmax(W h + b)[target], one row per token, of a W and b that take no gradient.

    d logp / d h = W[target] - p W [D] does not depend on the gradient of logp: it is made in the forward pass, where the logits
    are at hand, and is all that is kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, entries: int) -> Tensor:
        logp, slope = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
        for rows, logits, log_p in _blocks(hidden, weight, bias, entries):
            at = targets[rows, None]
            logp[rows] = log_p.gather(-1, at).squeeze(-1)
            gradient = torch.exp(log_p, out=logits).neg_()
            gradient.scatter_add_(-1, at, torch.ones_like(at, dtype=gradient.dtype))
            torch.mm(gradient.to(weight.dtype), weight, out=slope[rows])
        ctx.save_for_backward(slope)
        return logp

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradients[0][:, None].float() * slope).to(slope.dtype), None, None, None, None


class _LinearLogp(Function):
    """log softmax(W h + b)[target], one row per token. Saved for the backward pass: log p [N, V] where that is little enough,
    else one float per row, and the logits are computed again.

    d logp / d logits = onehot(target) - p, so with the gradient g [N] of logp and G = g * (onehot - p) [N, V]:
    d h = G W, d W = G^T h, d b = sum(G).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        entries: int,
        keeps: bool,
        into: Callable[[], Tensor] | None,
    ) -> Tensor:
        logp, log_z = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        kept = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32) if keeps else None
        for rows, logits, log_p in _blocks(hidden, weight, bias, entries, kept):
            at = targets[rows, None]
            logp[rows] = log_p.gather(-1, at).squeeze(-1)
            log_z[rows] = logits.gather(-1, at).squeeze(-1) - logp[rows]
        ctx.entries, ctx.into = entries, into
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, kept)
        return logp

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, kept = ctx.saved_tensors
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        g = gradients[0][:, None].float()
        # blocks of the vocabulary, each with all rows: a row of W then gets its whole gradient in one product
        columns = _block(max(1, len(hidden)), ctx.entries)
        whole = columns >= len(weight)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if for_hidden and not whole else None
        into = ctx.into() if for_weight and ctx.into else None
        d_weight = torch.empty_like(weight) if for_weight and into is None else None
        d_bias = torch.empty_like(bias) if for_bias else None
        space = _Space(len(hidden) * min(columns, len(weight)), hidden)
        for first in range(0, len(weight), columns):
            block = slice(first, first + columns)
            w, b = weight[block], None if bias is None else bias[block]
            if kept is not None:
                log_p = kept[:, block]
                gradient = torch.exp(log_p, out=space.of(log_p.shape)).mul_(-g)
            else:
                logits = space.product(hidden, w, b)
                gradient = (torch.softmax(logits, -1) if whole else logits.sub_(log_z[:, None]).exp_()).mul_(-g)
            inside = (targets >= first) & (targets < first + columns)
            places = inside.nonzero().flatten()
            gradient[places, targets[places] - first] += g[places, 0]
            if d_bias is not None:
                d_bias[block] = gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if for_hidden and whole:
                d_hidden = gradient @ w
            elif d_hidden is not None:
                _add_product(d_hidden, gradient, w)
            if d_weight is not None:
                torch.mm(gradient.T, hidden, out=d_weight[block])
            if into is not None:
                _add_product(into[block], gradient.T, hidden)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None, None


def _blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, entries: int, into: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Block after block: which rows, their logits, the logarithm of their softmax. Both have their place until the next block;
    `into` [N, V]: a place for the logarithms of all rows."""
    rows = min(_block(len(weight), entries), max(1, len(hidden)))
    space, other = (_Space(size, hidden) for size in (rows * len(weight), rows * len(weight) * (into is None)))
    for first in range(0, len(hidden), rows):
        block = slice(first, first + rows)
        logits = space.product(hidden[block], weight, bias)
        # one pass over each row; logsumexp takes four, with a copy of all rows
        yield block, logits, torch.log_softmax(logits, -1, out=other.of(logits.shape) if into is None else into[block])


class _Space:
    """The place of a block of logits, made once: of blocks made one after the other, glibc would not use the place again.

    Args:
        entries: of the largest block; held in float32.
        like: a tensor on the device.
    """

    def __init__(self, entries: int, like: Tensor) -> None:
        self.held = like.new_empty(entries, dtype=torch.float32)

    def of(self, shape: torch.Size) -> Tensor:
        return self.held[: shape.numel()].view(shape)

    def product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """W h + b of each row, here; taken in their precision, given in float32."""
        out = self.of(torch.Size((len(hidden), len(weight))))
        if hidden.dtype != out.dtype:
            return out.copy_(linear(hidden, weight, bias))
        if bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(bias, hidden, weight.T, out=out)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into [M, D] += a [M, N] b [N, D]; where it has another precision, in parts, so that no product is large."""
    if into.dtype == b.dtype:
        into.addmm_(a, b)
        return
    rows = _block(into.shape[1], PART)
    for part, own in zip(into.split(rows), a.split(rows), strict=True):
        part.add_(own @ b)


class _Handed:
    """What a backbone returns, as far as a head reads it: everything but the hidden states is absent."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: Any) -> Tensor:
        return (self.last_hidden_state,)[place]


class _HandThrough(nn.Module):
    """A backbone that returns the embeddings it is given as hidden states; its own decoder, where a head asks for that."""

    @property
    def decoder(self) -> nn.Module:
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Handed:
        return _Handed(inputs_embeds)


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


def _without(model: Any, body: nn.Module) -> Any:
    """The model with its backbone replaced; all its other modules are the same objects."""
    name = next(name for name, child in model.named_children() if any(inner is body for inner in child.modules()))
    shell = copy.copy(model)
    shell._modules = {**model._modules, name: _HandThrough()}
    return shell
