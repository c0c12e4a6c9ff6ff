"""Samples through transformers' own `generate`, in batches of like length, seeded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch

from preftune.models.adapters import inside, virtual_tokens
from preftune.models.load import max_positions
from preftune.models.randomness import evaluation_mode, random_state_kept
from preftune.scoring.scorer import callable_itself

log = logging.getLogger("preftune")

_TOKENS = 2**14  # prompt and new tokens of one batch


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    samples: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    max_new_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation. `ids` are the new tokens, the end token included where the model gave one."""

    prompt_index: int
    sample: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish: Literal["stop", "length"]


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    progress: Callable[[int], None] | None = None,
    streamer: Any = None,
) -> list[Sample]:
    """Continues every prompt `sampling.samples` times; in the order prompt, then sample. A `streamer` of transformers gets
    the tokens as they come (one prompt at a time).

    A prompt near the end of the model's positions gets as many new tokens as it leaves room for; one that leaves none is
    the caller's to leave out (`with_room`). The result depends on the seed and on the prompts together, not on the state
    of torch's generator, which is left as it was.
    """
    limit = max_positions(model)
    room = [sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - len(p)) for p in prompts]
    jobs = sorted(
        ((p, k) for p in range(len(prompts)) for k in range(sampling.samples)),
        key=lambda job: (-len(prompts[job[0]]), job),  # the longest of a batch is its first, and sets its size
    )
    ends = end_tokens(model, tokenizer)
    # peft puts virtual tokens before the padding, and counts positions through it: only prompts of one length are right
    alone = virtual_tokens(model) > 0
    found: dict[tuple[int, int], Sample] = {}
    device = next(model.parameters()).device
    with random_state_kept(device), evaluation_mode(model), callable_itself(model):
        torch.manual_seed(sampling.seed)
        while jobs:
            count = max(1, _TOKENS // ((len(prompts[jobs[0][0]]) + sampling.max_new_tokens) * sampling.beams))
            kind = next(groupby(jobs[:count], key=lambda job: (room[job[0]], len(prompts[job[0]]) if alone else 0)))
            rows, how = list(kind[1]), replace(sampling, max_new_tokens=kind[0][0])
            jobs = jobs[len(rows) :]
            for job, ids in zip(rows, _generate(model, [prompts[p] for p, _ in rows], how, ends, streamer), strict=True):
                finish = "stop" if ids and ids[-1] in ends else "length"
                text = continuation_text(tokenizer, prompts[job[0]], ids)
                found[job] = Sample(job[0], job[1], tuple(prompts[job[0]]), tuple(ids), text, finish)
            if progress:
                progress(len(rows))
    return [found[key] for key in sorted(found)]


def with_room(model: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The prompts, by index, that leave room for a response; how many do not is said."""
    limit = max_positions(model)
    fitting = [n for n, p in enumerate(prompts) if limit is None or len(p) < limit]
    if len(fitting) < len(prompts):
        left_out = f"{len(prompts) - len(fitting):,} of {len(prompts):,} prompts"
        log.warning(f"{left_out} fill the model's {limit:,} positions: no response to them is sampled")
    return fitting


def continuation_text(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that the new tokens add to the prompt's. Decoded alone, many tokenizers would lose its first space."""
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(ids), skip_special_tokens=True)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a turn: the tokenizer's end token and those of the model's generation config."""
    own = getattr(model, "generation_config", None)
    listed = getattr(own, "eos_token_id", None)
    ends = [listed] if isinstance(listed, int) else list(listed or [])
    return list(dict.fromkeys([*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))


def _generate(model: Any, prompts: Sequence[Sequence[int]], how: Sampling, ends: list[int], streamer: Any) -> list[list[int]]:
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampled = how.temperature > 0 and how.beams == 1
    drawing = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p} if sampled else {}
    config = GenerationConfig(
        do_sample=sampled,
        num_beams=how.beams,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **drawing,
    )
    with torch.no_grad(), _own_settings_aside(model), warnings.catch_warnings():
        # with virtual tokens peft leaves positions to the model, which counts them right where nothing is padded
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        out = model.generate(input_ids=ids, attention_mask=real, generation_config=config, streamer=streamer)
    return [_until_end(row, ends) for row in out[:, longest:].tolist()]


@contextmanager
def _own_settings_aside(model: Any) -> Generator[None]:
    """What a call leaves open, transformers takes from the model's generation config: a repetition penalty, min_p,
    suppressed tokens. Samples would not be the model's own then, so its config is empty for the time of the call."""
    from transformers import GenerationConfig

    owner = inside(model)
    own, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = own


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    for n, token in enumerate(ids):
        if token in ends:
            return ids[: n + 1]
    return ids
