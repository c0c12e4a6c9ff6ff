"""What scores must be before anything is built on them: finite, the same by the path that was chosen and by the model's own
forward pass one by one, and at step 0 equal to those of a reference that is the starting policy."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from preftune.data.render import Batch, Rendered
from preftune.errors import RunFailed
from preftune.models.adapters import gives_scalars
from preftune.models.randomness import evaluation_mode
from preftune.models.weights import name_of
from preftune.scoring import exact
from preftune.scoring.rope import Rope
from preftune.scoring.scorer import Scorer
from preftune.scoring.sharing import Wrong, cannot_share

log = logging.getLogger("preftune")

# nats per token; bfloat16 keeps 8 bits, so two paths may differ in the third digit of a token's logp
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# nats of one token: values kept by a run that cut its passes elsewhere differ by a step or two of bfloat16 logits of 16 and
# more, those of n tokens by about as much times the root of n
STEP = {torch.float32: 0.0, torch.bfloat16: 0.25}
# of another order of the same sums: nats per token, and the gradient's distance as a share of its length
VALUES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
GRADIENTS = {torch.float32: 1e-3, torch.bfloat16: 0.25}
FARTHER = 2.0  # times as far from float32's gradient as the model's own in the same precision, that is rounding as well
WATCHED = 2**22  # most entries of the parameters whose gradients are compared
WORK = {"cpu": 2e11, "cuda": 1e14}  # multiplications and additions that a few seconds hold


def check_finite(logp: Tensor, batch: Batch, rows: Sequence[int]) -> None:
    """Refuses to go on with a log-probability that is not a number.

    Args:
        logp: [len(rows)] nats, of these rows of the batch.

    Raises:
        RunFailed: names the data rows.
    """
    wrong = (~torch.isfinite(logp)).nonzero().flatten().tolist()
    if wrong:
        raise RunFailed(
            f"the model gives no finite log-probability to {len(wrong):,} of {len(rows):,} responses "
            f"({_places(batch, [rows[n] for n in wrong[:5]])}): are its weights sound?",
            code="not_finite",
        )


def check_start(policy_logp: Tensor, reference_logp: Tensor, batch: Batch, rows: list[int], *, dtype: torch.dtype) -> float:
    """Largest |log-ratio| per token over `rows`; a run that starts elsewhere than at its reference must not go on.

    Args:
        policy_logp, reference_logp: [len(batch)] nats, summed; read at `rows`.
        dtype: the compute precision, which sets the tolerance.

    Raises:
        RunFailed: names the data rows that differ most.
    """
    length = torch.tensor([batch.sequences[r].length for r in rows], dtype=torch.float32)
    differs = (policy_logp[rows] - reference_logp[rows]).abs() / length
    worst, allowed = float(differs.max()), (STEP[dtype] / length.sqrt()).clamp_min(TOLERANCE[dtype])
    if bool((differs <= allowed).all()):  # False for NaN too
        return worst
    order = torch.argsort((differs / allowed).nan_to_num(float("inf")), descending=True)[:5].tolist()
    raise RunFailed(
        f"the policy and its reference differ before the first step, by up to {worst:.3g} nats per token (tolerance "
        f"{float(allowed[order[0]]):.2g}), worst at {_places(batch, [rows[n] for n in order])}. They should be the same model "
        "here: is dropout on, the adapter not at zero, or the model not deterministic?",
        code="start_check",
    )


# -- one path against another ---------------------------------------------------------------------------------------------

Path = Callable[[Sequence[Rendered]], Tensor]  # [R] nats, with a graph


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one path from the model's own forward pass, response by response.

    values: largest difference, nats per token; of a reward model's numbers as they are. gradients: of a weighted sum of all of
    them with respect to the smallest trained parameters, as a share of its length. rounded: what it was in the model's own
    precision, where that was beyond the tolerance and the same was done in float32; farther: how many times as far from
    float32's gradient the path lay there as the model's own forward pass, or as GRADIENTS where that is more. untried: why
    float32 could not be tried; gradients decide then.
    """

    values: float
    gradients: float
    dtype: torch.dtype
    rounded: Difference | None = None
    farther: float = 0.0
    untried: str | None = None

    @classmethod
    def of(cls, ours: _Scored, plain: _Scored, dtype: torch.dtype) -> Difference:
        """Of one way to score the same rows from another one."""
        return cls(float((ours.values - plain.values).abs().max()), _apart(ours, plain), dtype)

    @property
    def small(self) -> bool:
        """Whether it is that of sums in another order; False for NaN too. What float32 does not show may be a fault all the
        same, of code that runs in the lower precision alone."""
        values = math.isfinite(self.values) if self.untried else self.values <= VALUES[self.dtype]
        return values and self.gradients <= GRADIENTS[self.dtype] and self.farther <= FARTHER

    def __str__(self) -> str:
        line = (
            f"{self.values:.2g} nats per token (tolerance {VALUES[self.dtype]:g}), "
            f"gradients by {self.gradients:.2g} of their length ({GRADIENTS[self.dtype]:g})"
        )
        if self.untried:
            return f"{line}; gradients decide whether that is rounding: {self.untried}"
        if self.rounded is None:
            return line
        low = f"{line} in float32, where in {name_of(self.rounded.dtype)} by {self.rounded}"
        own = f"the model's own, or {GRADIENTS[self.rounded.dtype]:g}"
        return f"{low}; its gradient is {self.farther:.2g} times as far from float32's as {own} (tolerance {FARTHER:g})"


@dataclass(frozen=True, slots=True)
class _Scored:
    """values: [R] nats per token. slopes: the gradient of their weighted sum, of each parameter that is watched."""

    values: Tensor
    slopes: list[Tensor]


def difference(model: Any, sequences: Sequence[Rendered], path: Path, *, dtype: torch.dtype) -> Difference:
    """How far a path's values and gradients lie from `one_by_one`. Gradients that are there already stay as they are.

    In bfloat16 the logits of one token are off by a tenth of a nat, and layers that choose their experts choose others: where
    a sound model can be beyond the tolerance the same is done in float32, which decides, and the path in bfloat16 may not lie
    much farther from that than the model's own forward pass in bfloat16.
    """
    ours, plain = _both(model, sequences, path)
    found = Difference.of(ours, plain, dtype)
    if found.small or dtype == torch.float32 or not math.isfinite(found.values):
        return found
    try:
        with exact.in_float32(model):
            path_itself, true = _both(model, sequences, path)
    except exact.Untried as cannot:
        return replace(found, untried=str(cannot))
    farther = _apart(ours, true) / max(_apart(plain, true), GRADIENTS[dtype])
    return replace(Difference.of(path_itself, true, torch.float32), rounded=found, farther=farther)


def _both(model: Any, sequences: Sequence[Rendered], path: Path) -> tuple[_Scored, _Scored]:
    """By the path, and one by one."""
    watched = _watched(model)
    length = torch.tensor([1.0 if gives_scalars(model) else float(s.length) for s in sequences])
    signs = torch.tensor([1.0, -1.0]).repeat(len(sequences))[: len(sequences)]
    factor = signs * torch.linspace(0.5, 1.0, len(sequences)) / length  # all different: none stands for another

    def scored(way: Path, rows: Sequence[Rendered], factors: Tensor) -> tuple[Tensor, list[Tensor]]:
        logp = way(rows)
        total = (factors.to(logp) * logp).sum()
        slopes = torch.autograd.grad(total, watched, allow_unused=True, materialize_grads=True) if watched else ()
        return logp.detach().float().cpu(), [g.float() for g in slopes]

    with torch.enable_grad(), evaluation_mode(model):
        values, slopes = scored(path, sequences, factor)
        ours = _Scored(values / length, slopes)
        # response by response: all logits of one are held at once, and the gradients of a sum add
        each: list[Tensor] = []
        sums = [torch.zeros_like(g) for g in slopes]
        for n, s in enumerate(sequences):
            logp, slopes = scored(lambda rows: one_by_one(model, rows), [s], factor[n : n + 1])
            each.append(logp)
            sums = [total + g for total, g in zip(sums, slopes, strict=True)]
    return ours, _Scored(torch.cat(each) / length, sums)


def _apart(a: _Scored, b: _Scored) -> float:
    """The distance of two gradients, as a share of the length of the second; 0 where nothing is watched."""
    if not b.slopes:
        return 0.0
    off, size = (
        float(torch.stack([g.norm().cpu() for g in gs]).norm())
        for gs in ([x - y for x, y in zip(a.slopes, b.slopes, strict=True)], b.slopes)
    )
    return off / max(size, 1e-12)


def one_by_one(model: Any, sequences: Sequence[Rendered]) -> Tensor:
    """[R] nats by the model's own forward pass and a log-softmax in float32 over all its logits: nothing of ours. Of a sequence
    classifier its number."""
    device = next(model.parameters()).device
    found: list[Tensor] = []
    rope = Rope.of(model)
    for s in sequences:
        rope.restart()
        ids = torch.tensor([s.ids], device=device)
        if gives_scalars(model):
            found.append(model(input_ids=ids, use_cache=False).logits[0, 0].float())
            continue
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(s.ids) :]  # virtual tokens have some too
        logp = torch.log_softmax(logits[:-1].float(), -1)
        each = logp.gather(-1, ids[0, 1:, None])[s.start - 1 :, 0]
        found.append(each.sum() if s.mask is None else each[torch.tensor(s.mask, device=device)].sum())
    return torch.stack(found)


def _watched(model: Any) -> list[Tensor]:
    """The smallest trained parameters, those of every layer's norms or adapters first: what is wrong anywhere reaches them."""
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel())
    chosen: list[Tensor] = []
    for parameter in trained:
        if chosen and sum(p.numel() for p in chosen) + parameter.numel() > WATCHED:
            break
        chosen.append(parameter)
    return chosen


def few(model: Any, batch: Batch, rows: Sequence[int], budget: int | None = None) -> list[int]:
    """Whole groups of these rows from the first on, at least one, as many as a few seconds and the budget of one pass hold; see
    `shortened`."""
    chosen: list[int] = []
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(batch.sequences[row].group, []).append(row)
    for own in groups.values():
        if chosen and sum(len(batch.sequences[row].ids) for row in [*chosen, *own]) > _room(model, budget):
            break
        chosen += own
    return chosen


def shortened(model: Any, sequences: Sequence[Rendered], budget: int | None = None) -> list[Rendered]:
    """The same rows with no more tokens than a few seconds hold: the end of the prompts, the beginning of the answers."""
    room = _room(model, budget)
    if sum(len(s.ids) for s in sequences) <= room:
        return list(sequences)
    half = max(4, room // (2 * len(sequences)))
    cut: list[Rendered] = []
    for s in sequences:
        first, last = max(0, s.start - half), min(len(s.ids), s.start + half)
        mask = None if s.mask is None else s.mask[: last - s.start]
        whole = mask is None or any(mask)
        held = tuple((place - first, digest) for place, digest in s.attachments if first <= place < last)
        start, mask = s.start - first, mask if whole else None
        cut.append(replace(s, ids=s.ids[first:last], start=start, mask=mask, attachments=held))
    return cut


def _room(model: Any, budget: int | None) -> int:
    """Tokens that go forward and back, together and one by one, in a few seconds; no more than one pass of the run takes."""
    parameters = sum(p.numel() for p in model.parameters())
    work = WORK.get(next(model.parameters()).device.type, WORK["cpu"])
    return min(max(64, min(4096, int(work / (12 * parameters)))), budget or 4096)


# models that passed, and by which path: in this process only, since a few seconds cost less than a cache that hides a fault
_PASSED: weakref.WeakKeyDictionary[Any, set[bool]] = weakref.WeakKeyDictionary()


def check_path(scorer: Scorer, batch: Batch, rows: Sequence[int], *, dtype: torch.dtype, budget: int | None = None) -> None:
    """A few of the user's own rows by the path that the run will take against `one_by_one`, once per model and path.

    Args:
        budget: tokens of one pass of the run, where that is known.

    Raises:
        RunFailed: they differ, or are not finite, or the model reads a trie and comes to other numbers, or it does not repeat
            its own.
    """
    name, model = type(scorer.inner).__name__, scorer.model
    if scorer.shares in _PASSED.setdefault(model, set()):
        return
    chosen = few(model, batch, rows, budget)
    sequences = shortened(model, [batch.sequences[row] for row in chosen], budget)

    def alone(rows: Sequence[Rendered]) -> Tensor:
        return one_by_one(model, rows)

    fault = cannot_share(scorer.inner) if scorer.wanted and not scorer.shares else None
    if not isinstance(fault, Wrong):
        found = difference(model, sequences, lambda rows: scorer(rows).logp, dtype=dtype)
        if found.small:
            log.info(f"self-check: {len(chosen)} responses scored together and one by one differ by {found}")
            _PASSED[model].add(scorer.shares)
            return
        if not math.isfinite(found.values):
            with torch.no_grad(), evaluation_mode(model):
                check_finite(torch.cat([alone([s]).cpu() for s in sequences]), batch, chosen)
        fault = f"scored together and one by one, the same rows differ by {found}, at {_places(batch, chosen[:5])}"
    again = difference(model, sequences, alone, dtype=dtype)
    if not again.small:
        raise RunFailed(
            f"{name} does not give the same numbers twice: they differ by {again}. Is there dropout that evaluation mode does "
            "not switch off?",
            code="not_deterministic",
        )
    hint = "; train.sharing=off gives every answer its own copy of the prompt" if scorer.wanted else ""
    raise RunFailed(f"{name}: {fault}. Nothing trained on such numbers would be right{hint}", code="self_check")


def _places(batch: Batch, rows: Sequence[int]) -> str:
    """Where these responses stand in the data."""
    places: list[str] = []
    for row in rows:
        s = batch.sequences[row]
        origins = batch.groups[s.group].responses[s.response].origins
        places.append(f"{origins[0].file} row {origins[0].row}" if origins else f"group {s.group} response {s.response}")
    return ", ".join(dict.fromkeys(places))
