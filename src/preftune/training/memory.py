"""Memory of a run: how much it took, and an allocator that does not give it back after every tensor."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

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
    if sys.platform != "linux" or torch.cuda.is_available():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
