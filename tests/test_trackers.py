"""Where metrics go besides metrics.jsonl: what is logged, once, and that nothing leaves the machine unasked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from command import PAIRS, write_model, write_rows
from test_resume import Killed, at, go_on

from preftune.config import resolve
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.runs.train import train
from preftune.training import extras
from preftune.training.options import TrainOptions
from preftune.training.trackers import QUIET, start

pytestmark = pytest.mark.usefixtures("short_answers", "no_report")

# what a run calls of wandb, written down
FAKE = """
import json, os
class Run:
    def __init__(self, given):
        self.given = given
        self.write("init", **{k: v for k, v in given.items() if k != "config"}, beta=given["config"]["beta"],
                   reporting=os.environ.get("WANDB_ERROR_REPORTING"))
    def write(self, call, **what):
        with open(os.environ["CALLS"], "a") as file:
            file.write(json.dumps({"call": call, **what}) + chr(10))
    def log(self, figures, step):
        self.write("log", step=step, figures=figures)
    def finish(self):
        self.write("finish")
def init(**given):
    return Run(given)
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    for name in ("WANDB_MODE", "WANDB_PROJECT", *QUIET):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m", positions=128)
    write_rows(tmp_path / "pairs.jsonl", PAIRS[:16])
    yield lambda: [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    sys.modules.pop("wandb", None)


WORDS = ["model=m", "data=pairs.jsonl", "batch_size=8", "steps=5", "train.save_every=2", "reference.store=off", "out=run"]


def test_a_run_is_logged_offline_and_a_resumed_one_logs_no_step_twice(calls: Any) -> None:
    keys = resolve(TrainKeys, [*WORDS, "train.trackers=[wandb]", "train.eval_every=2", "beta=0.2"])
    with pytest.raises(Killed):
        train(keys, progress=at("train", 4))
    go_on(Path("run"))
    found = calls()
    begun, again = (c for c in found if c["call"] == "init")
    assert (begun["mode"], begun["dir"], begun["name"], begun["project"]) == ("offline", "run", "run", "preftune")
    assert (begun["resume"], again["resume"]) == (None, "allow") and begun["id"] == again["id"]
    assert (begun["beta"], begun["reporting"]) == (0.2, "false")
    logged = [c for c in found if c["call"] == "log"]
    assert [c["step"] for c in logged] == [1, 2, 3, 4, 5], "the checkpoint was that of step 2"
    lines = [json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()]
    for line, call in zip(lines, logged, strict=True):
        own = {k: v for k, v in line.items() if k != "step"}
        assert call["figures"].keys() == own.keys() and call["figures"]["loss"] == own["loss"]
    assert found[-1]["call"] == "finish"


def test_the_users_own_mode_counts(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    Path("run").mkdir()
    for tracker in start(["wandb"], Path("run"), {"beta": 0.1}):
        tracker.close()
    assert calls()[0]["mode"] is None, "it reads the environment itself"


def test_a_tracker_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wandb").mkdir()  # what it leaves in a working folder, and no package
    sys.modules.pop("wandb", None)
    right = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: right(name) if (tmp_path / name).exists() else None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(Refusal, match=rf"{name} is not installed: pip install 'preftune\[{name}\]'") as refused:
            extras.check(TrainOptions(trackers=[name]))
        assert (refused.value.code, refused.value.key) == ("missing_extra", "train.trackers")


@pytest.mark.parametrize("step", [1, 4])
def test_tensorboard_takes_back_what_comes_later(step: int, calls: Any) -> None:
    """After the checkpoint of step 2, and before there was one."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = resolve(TrainKeys, [*WORDS, "train.trackers=[tensorboard]"])
    with pytest.raises(Killed):
        train(keys, progress=at("train", step))
    go_on(Path("run"))
    events = EventAccumulator(os.path.join("run", "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
