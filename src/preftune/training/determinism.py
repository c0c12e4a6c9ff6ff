"""The same bits from the same run on CUDA, where several kernels add up in whatever order they come."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager

import torch

log = logging.getLogger("preftune")

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(device: torch.device) -> Generator[None]:
    """Inside, CUDA takes kernels that give the same bits each time, and refuses to compute where it has none. The CPU's do
    anyway, which is said. Source: PyTorch, notes on reproducibility; cuBLAS needs a workspace of its own for each stream."""
    if device.type != "cuda":
        log.info(
            f"train.deterministic changes nothing on the {device.type}: with one number of threads a run repeats itself there"
        )
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    of_cudnn, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(CUBLAS)
    os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = of_cudnn
        if workspace is None:
            os.environ.pop(CUBLAS, None)
