"""A reference that follows the policy: where it stands after each step, what it leaves alone, and that a run repeats."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import tolerances
import torch

import preftune
from preftune.config import build, dump, resolve
from preftune.data.render import render
from preftune.errors import Refusal
from preftune.keys import TrainKeys
from preftune.models.adapters import add_adapter
from preftune.models.options import AdapterOptions
from preftune.scoring.score import score
from preftune.training.moving import Moving
from preftune.training.precision import Weights

pytestmark = pytest.mark.usefixtures("short_answers", "no_report")


def fit(model: Any, **keys: Any) -> Any:
    given = {"dtype": "float32", "eval_groups": [], "learning_rate": 1e-3, "batch_size": 4, "train": {"warmup": 0.0}}
    return preftune.fit(model, tiny.tokenizer(), tiny.pairs(4), **(given | keys))


def at_zero(run: Any) -> list[bool]:
    return [abs(line["margin"]) < tolerances.LOGP for line in run.metrics]


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_whole_way_every_two_steps(adapter: str) -> None:
    """Every batch holds all pairs: right after an update every log-ratio is 0, and dpo's loss ln 2."""
    run = fit(tiny.model(), steps=6, reference_sync_steps=2, reference_sync_alpha=1.0, adapter=adapter)
    assert at_zero(run) == [True, False] * 3
    assert [line["loss"] for line in run.metrics[::2]] == pytest.approx([math.log(2)] * 3, abs=tolerances.LOGP)


def test_a_part_of_the_way_by_hand() -> None:
    """The log-ratios of the last step against the mixed weights, kept by hand; the update counts from the step after."""
    model, batch = tiny.model(), render(tiny.pairs(4), tiny.tokenizer())
    after = [tiny.state(model)]

    def keep(phase: str, done: int, total: int, line: Any) -> None:
        if phase == "train":
            after.append(tiny.state(model))

    run = fit(model, steps=4, reference_sync_steps=1, reference_sync_alpha=0.3, progress=keep)
    mixed = after[0]
    policy, reference = tiny.model(), tiny.model()
    for n, line in enumerate(run.metrics):
        with torch.no_grad():
            policy.load_state_dict(after[n], strict=False)
            reference.load_state_dict(mixed, strict=False)
            ratio = score(policy, batch).logp - score(reference, batch).logp
        expected = (float(ratio[0::2].mean()), float(ratio[1::2].mean()))
        assert (line["log_ratio/chosen"], line["log_ratio/rejected"]) == pytest.approx(expected, abs=tolerances.LOGP)
        mixed = {key: 0.3 * after[n + 1][key] + 0.7 * mixed[key] for key in mixed}
    assert abs(run.metrics[-1]["margin"]) > 1e-3


def test_it_moves_by_every_so_many_steps_and_in_float32() -> None:
    model = tiny.model()
    weights = Weights(model, torch.bfloat16)
    moving = Moving(weights, every=3, alpha=0.25)
    start = [m.detach().clone() for m in weights.masters]
    with torch.no_grad():
        for master in weights.masters:
            master.add_(1e-3)  # less than a digit of most bfloat16 weights, four times over more
    for step in range(1, 13):
        moving.follow(step, weights)
    share = 1 - 0.75**4
    for own, used, first in zip(moving.masters, moving._used, start, strict=True):
        torch.testing.assert_close(own, first.bfloat16().float() + share * (first + 1e-3 - first.bfloat16().float()))
        assert used.dtype == torch.bfloat16 and torch.equal(used, own.bfloat16()) and not used.requires_grad


def test_of_an_adapter_the_adapter_alone_is_copied() -> None:
    model = add_adapter(tiny.model(), AdapterOptions(type="lora", r=2, target_modules=["q_proj"]), seed=0)
    moving = Moving(Weights(model, torch.float32), every=1, alpha=0.5)
    shared = {id(p) for p in model.parameters() if not p.requires_grad}
    own = [p for p in moving.model.parameters() if id(p) not in shared]
    assert len(own) == len(moving._used) == 4 and not any(p.requires_grad for p in moving.model.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name), "the policy still trains"


def test_neither_the_users_store_nor_the_runs_own_is_touched(tmp_path: Path, cache: Path) -> None:
    fit(tiny.model(), steps=2, reference_sync_steps=1, out=tmp_path / "run")
    assert not list(cache.rglob("*.sqlite")) and not list((tmp_path / "run").rglob("*.sqlite"))
    assert "sync_steps: 1\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert "sync_alpha: 0.6\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_held_out_figures_are_against_the_start() -> None:
    """Of the same pairs as training: right after the reference came the whole way, its margin is 0, and theirs is not."""
    keys = {"steps": 4, "eval_groups": tiny.pairs(4), "train": {"eval_every": 1, "keep_best": False, "warmup": 0.0}}
    moved = fit(tiny.model(), reference_sync_steps=1, reference_sync_alpha=1.0, **keys)
    assert at_zero(moved) == [True] * 4
    margins = [line["eval/margin"] for line in moved.metrics]
    assert margins == sorted(margins) and margins[0] > 0.1
    assert moved.after["margin"] == pytest.approx(margins[-1], abs=tolerances.LOGP)


def test_ktos_baseline_follows_too() -> None:
    from test_methods import ratings

    given = {"dtype": "float32", "eval_groups": [], "learning_rate": 1e-2, "batch_size": 32, "train": {"warmup": 0.0}}
    run = preftune.fit(
        tiny.model(),
        tiny.tokenizer(),
        ratings(),
        method="kto",
        steps=3,
        reference_sync_steps=1,
        reference_sync_alpha=1.0,
        **given,
    )
    assert [line["baseline"] for line in run.metrics] == pytest.approx([0.0] * 3, abs=tolerances.LOGP)
    assert [line["loss"] for line in run.metrics] == pytest.approx([0.5] * 3, abs=tolerances.LOGP)
    still = preftune.fit(tiny.model(), tiny.tokenizer(), ratings(), method="kto", steps=3, **given)
    assert still.metrics[-1]["baseline"] > 0.01 or abs(still.metrics[-1]["loss"] - 0.5) > 1e-3


def test_it_does_not_depend_on_the_cut() -> None:
    ends = []
    for budget in (1, 10**6):
        fit(model := tiny.model(), steps=3, reference_sync_steps=1, train={"tokens_per_microbatch": budget, "warmup": 0.0})
        ends.append(tiny.state(model))
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], atol=tolerances.WEIGHTS, rtol=0)


def test_a_reference_in_hand_does_not_move() -> None:
    with pytest.raises(Refusal, match="starts as the policy"):
        fit(tiny.model(), steps=1, reference=tiny.model(seed=1), reference_sync_steps=1)
    with pytest.raises(Refusal, match="has no reference"):
        fit(tiny.model(), method="simpo", steps=1, reference_sync_steps=1)


def test_what_is_written_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = build(TrainKeys, {"model": "m", "data": "d", "reference": {"sync_steps": 7, "sync_alpha": 0.25}})
    Path("config.yaml").write_text(dump(keys))
    assert resolve(TrainKeys, ["config.yaml"]).reference == keys.reference


def test_memory_of_the_copy_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from command import PAIRS, write_model, write_rows
    from test_preview import shown

    monkeypatch.chdir(tmp_path)
    write_model(Path("m"), positions=128)
    write_rows(Path("pairs.jsonl"), PAIRS[:10])
    for dtype, each in (("float32", 4), ("bfloat16", 6)):
        still, moving = (
            shown(eval_data="pairs.jsonl", dtype=dtype, reference={"sync_steps": steps})["fixed_gb"] for steps in (None, 5)
        )
        assert (moving - still) * 1e9 == pytest.approx(each * 8192)
    assert json.dumps(shown(eval_data="pairs.jsonl", reference={"sync_steps": 5}))
