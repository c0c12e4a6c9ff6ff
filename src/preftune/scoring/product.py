"""Log-probabilities of given tokens in blocks: where a head is one matrix product W h + b, and where it is more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from preftune.models.randomness import random_state, random_state_kept, set_random_state

# float32 entries of logits held at once, in each of at most three tensors: 128 MiB, and on the CPU what its caches hold
BLOCK, CPU_BLOCK = 2**25, 2**20
PART = 2**23  # entries of a product that is added to a tensor of another precision
ROWS = 2**12  # positions of a head that trains whose gradient in float32 is held at once; of a frozen one WIDE are
KEPT = 2**26  # entries of a softmax that a trained head keeps for its backward pass: 256 MiB
FEWEST = 64  # rows, or columns, of one product: with fewer, reading the weights is all it does
OWN = 2**22  # entries of logits at once on the CPU in a head's own code, which holds some twenty tensors of them: 16 MiB each
WIDE = 256  # rows of logits made at once in a forward pass, caches or not: of 64 nearly half the time is reading the weights


def logp_of_product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    rows: int,
    entries: int,
    kept: int,
    into: Callable[[], Tensor] | None = None,
) -> Tensor:
    """log softmax(W h + b)[target] of each row.

    Args:
        hidden: [N, D], in the precision of the weight.
        weight: [V, D]. bias: [V].
        targets: [N] token ids.
        rows: of logits that are held at once in the forward pass. entries: of logits held at once in the backward pass.
        kept: entries of the softmax that may be kept for the backward pass of a weight or bias that trains.
        into: gives the tensor that the weight's gradient is added to in the backward pass; None: autograd gets it.

    Returns:
        [N] nats, float32.
    """
    graph, trained = torch.is_grad_enabled(), weight.requires_grad or (bias is not None and bias.requires_grad)
    if graph and hidden.requires_grad and not trained:
        return FrozenLogp.apply(hidden, weight, bias, targets, rows)  # pyright: ignore
    keep = min(len(hidden), kept // len(weight)) if graph and trained else 0  # of the first rows
    return LinearLogp.apply(hidden, weight, bias, targets, rows, entries, keep, into)  # pyright: ignore


def entries_on(device: torch.device) -> int:
    """Entries of logits that are held at once."""
    return CPU_BLOCK if device.type == "cpu" else BLOCK


def rows_at_once(others: int, entries: int) -> int:
    """How many rows (columns) of logits at once, where there are so many columns (rows)."""
    return max(FEWEST, entries // others)


def rows_of_logits(vocabulary: int, entries: int, wide: int, most: int = BLOCK) -> int:
    """How many rows of a vocabulary's logits at once: `wide` if `most` entries have room, or all that `entries` hold."""
    return max(1, entries // vocabulary, min(wide, most // vocabulary))


class FrozenLogp(Function):
    """log softmax(W h + b)[target], one row per token, of a W and b that take no gradient.

    d logp / d h = W[target] - p W [D] does not depend on the gradient of logp: it is made in the forward pass, where the logits
    are at hand, and is all that is kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int) -> Tensor:
        logp, slope = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
        for own, logits, log_p in _blocks(hidden, weight, bias, rows, _part(_space(0, hidden), 0, len(weight))):
            at = targets[own, None]
            logp[own] = log_p.gather(-1, at).squeeze(-1)
            gradient = torch.exp(log_p, out=logits).neg_()
            gradient.scatter_add_(-1, at, torch.ones_like(at, dtype=gradient.dtype))
            torch.mm(gradient.to(weight.dtype), weight, out=slope[own])
        ctx.save_for_backward(slope)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        d_hidden = torch.empty_like(slope)
        for part, g, own in zip(d_hidden.split(WIDE), gradients[0].split(WIDE), slope.split(WIDE), strict=True):
            part.copy_(g[:, None].float() * own)
        return d_hidden, None, None, None, None


class LinearLogp(Function):
    """log softmax(W h + b)[target], one row per token. Saved for the backward pass: log p [K, V] of the first K rows, and one
    float for each of the others, whose logits are computed again.

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
        rows: int,
        entries: int,
        keep: int,
        into: Callable[[], Tensor] | None,
    ) -> Tensor:
        logp, log_z = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        kept = hidden.new_empty(keep, len(weight), dtype=torch.float32)
        for own, logits, log_p in _blocks(hidden, weight, bias, rows, kept):
            at = targets[own, None]
            logp[own] = log_p.gather(-1, at).squeeze(-1)
            log_z[own] = logits.gather(-1, at).squeeze(-1) - logp[own]
        ctx.entries, ctx.into = entries, into
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, kept)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, log_z, kept = ctx.saved_tensors
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        g = gradients[0][:, None].float()
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        into = ctx.into() if for_weight and ctx.into else None
        d_weight = torch.zeros_like(weight) if for_weight and into is None else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if for_bias else None
        # blocks of the vocabulary, each with up to ROWS positions: a row of W then gets its gradient in one product, or few
        most = min(ROWS, len(hidden))
        columns = min(rows_at_once(max(1, most), ctx.entries), len(weight))
        space, sums = _space(most * columns, hidden), _space(most * hidden.shape[1], hidden)
        for own in _slices(len(hidden), ROWS):
            h, t, slope, saved = hidden[own], targets[own], g[own], kept[own]
            keep, total = len(saved), _part(sums, *h.shape).zero_()
            for block in _slices(len(weight), columns):
                w, b = weight[block], None if bias is None else bias[block]
                p = _part(space, len(h), len(w))
                torch.exp(saved[:, block], out=p[:keep])
                _product(h[keep:], w, b, out=p[keep:]).sub_(log_z[own][keep:, None]).exp_()
                gradient = p.mul_(-slope)
                places = ((t >= block.start) & (t < block.stop)).nonzero().flatten()
                gradient[places, t[places] - block.start] += slope[places, 0]
                if d_bias is not None:
                    d_bias[block] += gradient.sum(0)
                gradient = gradient.to(hidden.dtype)
                if for_hidden:
                    _add_product(total, gradient, w)
                if d_weight is not None:
                    _add_product(d_weight[block], gradient.T, h)
                if into is not None:
                    _add_product(into[block], gradient.T, h)
            if d_hidden is not None:
                d_hidden[own] = total
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(hidden.dtype), None, None, None, None, None


class AddedProduct(Function):
    """W x + b of each row, inside a head that is more than that. With the gradient g [..., V] of it, g^T x is added to the
    tensor that `into` gives, and autograd has none of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, into: Callable[[], Tensor]) -> Tensor:
        ctx.into = into
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        (g,) = gradients
        rows = g.flatten(0, -2)
        _add_product(ctx.into(), rows.T, x.flatten(0, -2))
        return g @ weight, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class ChunkedLogp(Function):
    """log-probabilities by code that is not known, `run(hidden, targets)`, a chunk at a time, and again in the backward pass.

    Results are made before the chunks (see `_space`): checkpoints one after the other would leave small ones between them, and
    memory would grow with every chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, run: Callable[[Tensor, Tensor], Tensor], rows: int, *parameters: Tensor
    ) -> Tensor:
        logp = hidden.new_empty(len(hidden), dtype=torch.float32)
        ctx.run, ctx.rows, ctx.state = run, rows, random_state(hidden.device)
        for part, h, t in zip(logp.split(rows), hidden.split(rows), targets.split(rows), strict=True):
            part.copy_(run(h, t))
        ctx.save_for_backward(hidden, targets, *parameters)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, targets, *parameters = ctx.saved_tensors
        rows, d_hidden = ctx.rows, torch.empty_like(hidden)
        sums: list[Tensor | None] = [None] * len(parameters)
        chunks = (x.split(rows) for x in (hidden, targets, gradients[0], d_hidden))
        with random_state_kept(hidden.device), torch.enable_grad():
            set_random_state(hidden.device, ctx.state)  # an adapter's dropout falls as it did
            for h, t, g, into in zip(*chunks, strict=True):
                h = h.detach().requires_grad_()
                own, *others = torch.autograd.grad(ctx.run(h, t), (h, *parameters), g, allow_unused=True)
                into.copy_(own)
                sums = [_added(total, other) for total, other in zip(sums, others, strict=True)]
        return d_hidden, None, None, None, *sums


def _added(total: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if total is None else total if other is None else total.add_(other)


def _blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int, kept: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Block after block: which rows, their logits, the logarithm of their softmax. Both have their place until the next block;
    `kept` [K, V]: the logarithms of the first K rows have it there."""
    count, keep = len(hidden), len(kept)
    rows = min(rows, max(1, count))
    space = _space(rows * len(weight), hidden)
    other = _space(rows * len(weight) if keep < count else 0, hidden)
    for first in (*range(0, keep, rows), *range(keep, count, rows)):
        own = slice(first, min(first + rows, keep if first < keep else count))
        h = hidden[own]
        logits = _product(h, weight, bias, out=_part(space, len(h), len(weight)))
        place = kept[own] if first < keep else _part(other, len(h), len(weight))
        # one pass over each row; logsumexp takes four, with a copy of all rows
        yield own, logits, torch.log_softmax(logits, -1, out=place)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def _space(entries: int, like: Tensor) -> Tensor:
    """The place of a block of logits, in float32, made once: of blocks made one after the other, glibc would not use the place
    again."""
    return like.new_empty(entries, dtype=torch.float32)


def _part(space: Tensor, rows: int, columns: int) -> Tensor:
    return space[: rows * columns].view(rows, columns)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """W h + b of each row; taken in their precision, given in float32."""
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
    rows = rows_at_once(into.shape[1], PART)
    for part, own in zip(into.split(rows), a.split(rows), strict=True):
        part.add_(own @ b)
