"""Where metrics go besides metrics.jsonl. Each is an extra, imported when asked for; nothing leaves the machine unasked."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from preftune.aside import written_aside

WANDB_RUN = "wandb.json"  # in the run folder: which run of Weights & Biases it is, and the last step that is logged there
# no crash reports, no hand on the terminal, no banner
QUIET = {"WANDB_ERROR_REPORTING": "false", "WANDB_CONSOLE": "off", "WANDB_SILENT": "true"}


class Tracker(Protocol):
    def log(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def start(names: Sequence[str], folder: Path, config: Mapping[str, Any], *, after: int = 0) -> list[Tracker]:
    """The trackers of a run. config: its keys. after: the step that it goes on after."""
    made: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB}
    return [made[name](folder, config, after) for name in dict.fromkeys(names)]


class TensorBoard:
    """Under tensorboard/; of a run that goes on, or begins again, what was logged of later steps is taken back."""

    def __init__(self, folder: Path, config: Mapping[str, Any], after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def log(self, line: Mapping[str, Any]) -> None:
        for name, value in _figures(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases, under wandb/, offline where WANDB_MODE does not say otherwise. It takes nothing back: steps that are
    logged already, with the same figures, a run that goes on does not log again."""

    def __init__(self, folder: Path, config: Mapping[str, Any], after: int) -> None:
        for name, value in QUIET.items():  # read as it is imported
            os.environ.setdefault(name, value)
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        self.place = folder / WANDB_RUN
        known = json.loads(self.place.read_text(encoding="utf-8")) if after and self.place.is_file() else {}
        self.id, self.logged = known.get("id") or secrets.token_hex(4), known.get("step", 0)
        self.run: Any = wandb.init(
            id=self.id,
            resume="allow" if known else None,
            project=os.environ.get("WANDB_PROJECT", "preftune"),
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            mode=None if os.environ.get("WANDB_MODE") else "offline",
        )

    def log(self, line: Mapping[str, Any]) -> None:
        if line["step"] <= self.logged:
            return
        self.run.log(_figures(line), step=line["step"])
        self.logged = line["step"]
        with written_aside(self.place) as aside:
            aside.write_text(json.dumps({"id": self.id, "step": self.logged}), encoding="utf-8")

    def close(self) -> None:
        self.run.finish()


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
