"""Where metrics go besides metrics.jsonl. Each is an extra, imported when asked for; nothing leaves the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune.errors import Refusal


def check(names: Sequence[str]) -> None:
    """Refuses a tracker that is not installed, before anything heavy is done."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise Refusal(
                f"{name} is not installed: pip install 'preftune[{name}]'", code="missing_extra", key="train.trackers"
            )


class TensorBoard:
    def __init__(self, folder: Path, after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def log(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


def start(names: Sequence[str], folder: Path, *, after: int = 0) -> list[TensorBoard]:
    """after: the step that a run goes on after; what was logged of later ones is taken back."""
    return [TensorBoard(folder / "tensorboard", after) for _ in names]
