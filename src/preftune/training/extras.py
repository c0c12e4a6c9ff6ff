"""What a run asks for that is installed apart. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from preftune.errors import Refusal
from preftune.training.options import TrainOptions


def check(options: TrainOptions) -> None:
    """Refuses what is not installed, before anything heavy is done."""
    asked: list[tuple[str, str, str, str]] = [("train.trackers", name, name, name) for name in options.trackers]
    if options.optimizer == "adamw_8bit":
        asked.append(("train.optimizer", "adamw_8bit, which needs bitsandbytes,", "bitsandbytes", "qlora"))
    for key, what, package, extra in asked:
        found = find_spec(package)
        if found is None or found.origin is None:  # a folder of that name, such as wandb's own, is no package
            raise Refusal(f"{what} is not installed: pip install 'preftune[{extra}]'", code="missing_extra", key=key)
