"""The processes that share one run, and what they tell each other. Nothing is asked of torch where there is one.

`torchrun --nproc-per-node N -m preftune train ...` starts N of them; each finds its number in its environment. They all read
the same data, make the same plan and take the same decisions at the same places; what is computed is shared out, and what came
of it is told to all. The first one writes and speaks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from preftune.errors import PreftuneError, Refusal, RunFailed

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # of a process that waits for another one, which is alive but does not come
_joined_others = False  # `joined` has been entered, whether left again or not


def asked() -> int:
    """How many processes were started for this run."""
    return _told("WORLD_SIZE", 1)


def number() -> int:
    """Which of them this one is, from 0, whether it has joined the others or not."""
    return _told("RANK", 0) if asked() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine."""
    return _told("LOCAL_RANK", 0) if asked() > 1 else 0


def on_this_machine() -> int:
    return _told("LOCAL_WORLD_SIZE", 1) if asked() > 1 else 1


def _told(name: str, otherwise: int) -> int:
    """A number that the one who started this process has put into its environment."""
    value = os.environ.get(name) or str(otherwise)
    if not value.isdecimal():
        line = f"of the environment is {value!r} and no number: unset it, or start with torchrun"
        raise Refusal(line, code="bad_environment", key=name)
    return int(value)


def size() -> int:
    """How many have joined."""
    if asked() == 1:
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of those this one is."""
    return number() if size() > 1 else 0


@contextmanager
def joined() -> Generator[None]:
    """Inside, the processes that were started know each other; where somebody else has joined them already, nothing is done."""
    if asked() == 1:
        yield
        return
    global _joined_others
    _joined_others = True
    if size() > 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: it waits for the others, which may be gone


def leave(code: int) -> NoReturn:
    """Ends this process, at once where it has joined others. torch's threads for them may still run: after an error, and after
    a good end too, since torch's caches hold the group of a model in parts. Where Python ends around them, they now and then
    abort the process, with a code of their own."""
    if _joined_others:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def gathered(value: T) -> list[T]:
    """The value of every process, in their order, given to each."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def of_first(value: T) -> T:
    """The first one's value, given to each."""
    if size() == 1:
        return value
    import torch.distributed as dist

    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Each becomes the sum over all processes, the same to the bit on each."""
    if size() == 1:
        return
    import torch.distributed as dist

    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        assert work is not None
        work.wait()


@contextmanager
def agreeing() -> Generator[None]:
    """Inside, nobody waits for anybody; at the end, an error of one is an error of all, and the first one can name it.

    Raises:
        PreftuneError: the own one; of a process without one that of the lowest that has one, which is named.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if size() == 1:
            raise
        own = error
    told = None
    if own is not None:
        told = (str(own) or type(own).__name__, isinstance(own, Refusal), getattr(own, "code", "internal"))
    try:
        failed = [(number, line) for number, line in enumerate(gathered(told)) if line is not None]
    except Exception:
        if own is None:
            raise
        failed = []  # the others know, and have ended before this one heard of it
    if own is not None:
        raise own
    if failed:
        number, (line, refused, code) = failed[0]
        kind: type[PreftuneError] = Refusal if refused else RunFailed
        raise kind(f"process {number} of {size()}: {line}", code=code)


def is_lost(error: Exception) -> bool:
    """Whether this process failed because another one had ended."""
    if size() == 1:
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))
