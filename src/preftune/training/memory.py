"""Memory of a run: how much it took, whether it will do, and an allocator that does not give it back after every tensor."""

from __future__ import annotations

import ctypes
import logging
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from preftune import processes
from preftune.data.render import Batch
from preftune.errors import RunFailed
from preftune.models.randomness import random_state_kept
from preftune.scoring.scorer import Scorer
from preftune.training.estimate import largest_example, pass_tokens
from preftune.training.gradient import Step
from preftune.training.method import Example, Method
from preftune.training.optimizers import forget, step_at

log = logging.getLogger("preftune")

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def memory_gb() -> float:
    """Peak memory so far: of the accelerator where there is one, else of the process. 1 GB = 10^9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks for the next tensor of the same size. On the CPU every large tensor is otherwise
    mapped, zeroed by the kernel and unmapped again: up to half of a small model's step. Nothing happens elsewhere."""
    if torch.cuda.is_available():
        return
    # older versions take no more than half of a heap; to set the other alone would end what glibc does by itself
    if any(_of_glibc("mallopt", _M_MMAP_THRESHOLD, size) for size in (2**31 - 1, 2**25)):
        _of_glibc("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)


def give_freed_back() -> None:
    """Gives back what was kept. For after an evaluation or a checkpoint, which take more than the next steps will use."""
    _of_glibc("malloc_trim", 0)


def _of_glibc(name: str, *given: int) -> int:
    """What it gives back: 0 where it did nothing, or is not there (musl has none)."""
    call = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    return 0 if call is None else call(*given)


def fits(
    scorer: Scorer,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    method: Method,
    batches: Sequence[Sequence[Example]],
    budget: int,
) -> int:
    """One forward and backward pass of the largest micro-batch of the whole run, with the optimizer's state in its place: what
    does not fit is known before the first step. Weights, state and random numbers stay what they were.

    Returns:
        The token budget, lowered where it had to be.

    Raises:
        RunFailed: the largest micro-batch cannot be cut, and does not fit.
    """

    def largest(budget: int) -> tuple[int, list[int]]:
        cuts = (Step.of(scorer, batch, method, examples, None, budget) for examples in batches)
        all_rows = (cut.rows(places) for cut in cuts for own in cut.cuts for places in own if places)  # some: see `Step.of`
        return max((pass_tokens(batch.sequences, rows, shares=scorer.shares, before=scorer.before), rows) for rows in all_rows)

    def attempt(budget: int) -> None:
        scores = scorer([batch.sequences[row] for row in largest(budget)[1]])
        (0.0 * scores.logp.sum()).backward()

    with random_state_kept(scorer.device):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        step_at(optimizer, 0.0)  # makes the state
        forget(optimizer)
        optimizer.zero_grad(set_to_none=True)
        least = indivisible(scorer, batch, (e for examples in batches for e in examples))
        try:
            _, budget = finer_if_needed(attempt, budget, least, lambda: optimizer.zero_grad(set_to_none=True))
        except Exception as error:
            if not is_out_of_memory(error) or (budget > least and processes.size() > 1):  # a smaller one was not tried
                raise
        else:
            optimizer.zero_grad(set_to_none=True)
            return budget
    raise RunFailed(
        f"a micro-batch of {least:,} tokens does not fit into memory, and it is one example that cannot be cut: lower "
        "max_length, or train an adapter (adapter=lora)",
        code="out_of_memory",
    )


def finer_if_needed(work: Callable[[int], T], budget: int, least: int, clear: Callable[[], None]) -> tuple[T, int]:
    """The work, and the token budget that it fitted with: where the memory does not hold it, what is half done is
    cleared away and the work done again with half the budget, down to one example at a time."""
    while True:
        try:
            return work(budget), budget
        except Exception as error:
            if not is_out_of_memory(error) or budget <= least or processes.size() > 1:  # the others do not know of it
                raise
        # only here: the exception's traceback held the tensors of the pass that failed
        clear()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        budget = max(least, budget // 2)
        log.warning(f"out of memory: going on with train.tokens_per_microbatch={budget}, which gives the same gradient")


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has an error of its own; of Apple's GPU and of the CPU's allocator one knows only the words."""
    words = ("MPS backend out of memory", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in str(error) for said in words)


def indivisible(scorer: Scorer, batch: Batch, examples: Iterable[Example]) -> int:
    """Tokens of the largest example, as this scorer takes it."""
    return largest_example(batch, examples, shares=scorer.shares, before=scorer.before)
