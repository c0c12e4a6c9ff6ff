"""The optimizers of a run: their steps, what they keep, and that a run goes on with each as if nothing had stopped it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import PAIRS, write_model, write_rows
from test_resume import Killed, at, go_on, same

from preftune import methods
from preftune.config import resolve
from preftune.data.render import render
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.runs.train import _check_processes, train
from preftune.scoring.scorer import Scorer
from preftune.training import extras, memory, optimizers
from preftune.training.determinism import CUBLAS, deterministic
from preftune.training.options import TrainOptions

pytestmark = [
    pytest.mark.usefixtures("short_answers", "no_report"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported:UserWarning"),
]
NAMES = ["adamw", "adafactor", "adamw_8bit"]


def needed(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra qlora)")


def weights() -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=draw)) for size in ((80, 60), (7, 5), (9,))]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_what_is_counted(name: Any) -> None:
    needed(name)
    own = weights()
    optimizer = optimizers.make(name, own, 1e-3, 0.0)
    for weight in own:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight in own:
        state = optimizer.state[weight]
        kept = [v for k, v in state.items() if isinstance(v, torch.Tensor) and k not in ("step", *optimizers.SHARED)]
        assert sum(v.nbytes for v in kept) == optimizers.state_bytes(name, weight.shape)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_and_the_decay_by_hand(name: Any) -> None:
    """AdamW's first step has the size of the rate in every entry; Adafactor's, of a gradient of ones, too, times the root mean
    square of the weight. The decay takes rate * decay of the weight besides, whatever the gradient."""
    needed(name)
    for decay in (0.0, 0.5):
        own = weights()
        before = [w.detach().clone() for w in own]
        optimizer = optimizers.make(name, own, 1e-3, decay)
        for weight in own:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        for weight, old in zip(own, before, strict=True):
            size = float(old.square().mean().sqrt()) if name == "adafactor" else 1.0
            torch.testing.assert_close(weight.detach(), old - 1e-3 * decay * old - 1e-3 * size, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"])
def test_the_trial_leaves_nothing_behind(name: Any, tokenizer: Any) -> None:
    """Steps after the trial of the largest micro-batch are those of an optimizer that never saw it, to the bit."""
    needed(name)
    ends: list[Any] = []
    batch, method = render(tiny.pairs(2), tokenizer), methods.make("dpo")
    for tried in (True, False):
        model = tiny.model()
        optimizer = optimizers.make(name, list(model.parameters()), 1e-2, 0.1)
        if tried:
            memory.fits(Scorer(model), optimizer, batch, method, [method.examples(batch.groups)], 100)
        for step in range(3):
            for n, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + n))
            optimizers.step_at(optimizer, 1e-2)
        ends.append(tiny.state(model))
    assert tiny.same(*ends)


@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"])
def test_a_run_goes_on_to_the_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed(name)
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m", positions=128)
    write_rows(tmp_path / "pairs.jsonl", PAIRS[:16])
    usual = ["model=m", "data=pairs.jsonl", "batch_size=8", "steps=4", "learning_rate=1e-2", "train.save_every=2"]
    usual += [f"train.optimizer={name}", "train.weight_decay=0.1", "reference.store=off"]
    train(resolve(TrainKeys, [*usual, "out=whole"]))
    with pytest.raises(Killed):
        train(resolve(TrainKeys, [*usual, "out=run"]), progress=at("train", 3))
    go_on(tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "whole")


def test_an_optimizer_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"bitsandbytes, is not installed: pip install 'preftune\[qlora\]'") as refused:
        extras.check(TrainOptions(optimizer="adamw_8bit"))
    assert (refused.value.code, refused.value.key) == ("missing_extra", "train.optimizer")
    extras.check(TrainOptions(optimizer="adafactor"))


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor"])
def test_a_state_that_is_no_part_of_a_weight_does_not_go_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preftune.processes.size", lambda: 2)
    keys = resolve(TrainKeys, ["model=m", "data=d.jsonl", "train.parallel=fsdp", f"train.optimizer={name}"])
    with pytest.raises(Refusal, match=f"fsdp does not go with train.optimizer={name}") as refused:
        _check_processes(keys)
    assert refused.value.key == "train.parallel"


# -- the same bits ------------------------------------------------------------------------------------------------------------


def test_on_the_cpu_it_is_said_that_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "preftune"), deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    assert "changes nothing on the cpu" in caplog.text


def test_on_cuda_everything_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set needs no GPU."""
    monkeypatch.delenv(CUBLAS, raising=False)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with pytest.raises(RuntimeError, match="odd"), deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled() and cudnn.deterministic and not cudnn.benchmark
        assert os.environ[CUBLAS] == ":4096:8"
        raise RuntimeError("odd")
    assert not torch.are_deterministic_algorithms_enabled() and CUBLAS not in os.environ
    assert (cudnn.deterministic, cudnn.benchmark) == before
