"""Adapters under every method, over reward models, and as the start of few-shot runs of another kind."""

from __future__ import annotations

import copy
import logging
import math
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import tiny
import tolerances
import torch
from command import call, write_rows
from test_adapter_runs import parts, trained
from test_adapter_scoring import KINDS, adapted, check_exact
from test_constraints import groups as asked_costs
from test_methods import ALL, BETA, NAMES, judged, options, same_gradient

import preftune
from preftune import methods
from preftune.data.render import render, render_prompts
from preftune.errors import Refusal
from preftune.evaluation.kl import kl_per_response
from preftune.generation.sample import Sampling, sample
from preftune.models.adapters import add_adapter, merged
from preftune.models.load import load_model, save_model
from preftune.models.options import AdapterOptions
from preftune.models.reward import load_reward
from preftune.scoring.score import score
from preftune.scoring.scorer import Scorer
from preftune.training.gradient import Step, backward

pytestmark = [
    pytest.mark.usefixtures("short_answers", "no_report"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

VIRTUAL = ("prompt", "prefix")
HEAD = "score.modules_to_save.default.weight"


# -- methods ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), list(zip(NAMES, cycle(KINDS), strict=False)))
def test_a_step_of_any_method_moves_the_adapter_alone_and_depends_on_no_cut(name: str, kind: str) -> None:
    """Prompts shared in one micro-batch, against a copy for every response in many."""
    method = methods.make(options(name), beta=BETA)
    batch = method.rows(render(judged(name), tiny.tokenizer()), lambda more: render(more, tiny.tokenizer()))
    reference = score(tiny.model(), batch).logp.detach()
    found: list[dict[str, Any]] = []
    for share, budget in ((True, ALL), (False, 60)):
        model = adapted(tiny.model(), kind)
        scorer = Scorer(model, share=share)
        backward(scorer, Step.of(scorer, batch, method, method.examples(batch.groups), reference, budget))
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert set(found[-1]) == trained(model)
    same_gradient(found[0], found[1], 2e-5)


LONG = {"short": {"cost": "test_constraints:length", "samples": 2, "max_new_tokens": 4}}
ASKED = [
    ("sft", "dora"),
    ("kto", "lora"),
    ({"name": "dpo", "constraints": LONG | {"phrases": {"phrases": ["bad"]}}}, "rslora"),
]


@pytest.mark.parametrize(("asked", "kind"), ASKED)
def test_a_run_with_a_low_rank_adapter_begins_as_one_of_all_weights(asked: Any, kind: str) -> None:
    given = judged(asked) if isinstance(asked, str) else asked_costs()
    keys: dict[str, Any] = {"method": asked, "steps": 1, "dtype": "float32", "eval_groups": [], "learning_rate": 1e-3}
    (plain,), (low,) = (
        preftune.fit(tiny.model(), tiny.tokenizer(), given, **keys, **more).metrics for more in ({}, {"adapter": KINDS[kind]})
    )
    same = [name for name in plain if name == "loss" or name.startswith(("logp", "reward", "constraint", "margin"))]
    assert {name: low[name] for name in same} == pytest.approx({name: plain[name] for name in same}, abs=1e-4)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_costs_are_of_what_the_policy_writes_after_its_virtual_tokens(kind: str) -> None:
    asked = {"name": "dpo", "constraints": LONG}
    keys: dict[str, Any] = {"steps": 2, "dtype": "float32", "eval_groups": [], "learning_rate": 1e-2}
    lines = preftune.fit(tiny.model(), tiny.tokenizer(), asked_costs(), method=asked, adapter=KINDS[kind], **keys).metrics
    assert all(math.isfinite(line["constraint/short"]) for line in lines)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_a_reference_that_follows_virtual_tokens_starts_as_the_policy(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """With its virtual tokens, so that every figure is 0 at the start; held-out figures and KL are against that start."""
    start = add_adapter(tiny.model(), AdapterOptions(**KINDS[kind]), seed=0, tokenizer=tiny.tokenizer())
    batch = render(tiny.pairs(2), tiny.tokenizer())
    keys: dict[str, Any] = {"dtype": "float32", "eval_groups": tiny.pairs(2), "learning_rate": 1e-2, "adapter": KINDS[kind]}
    with caplog.at_level(logging.INFO, "preftune"):
        run = preftune.fit(tiny.model(), tiny.tokenizer(), tiny.pairs(6), steps=3, reference_sync_steps=1, **keys)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=tolerances.FIRST_LOSS)
    assert run.before["margin"] == pytest.approx(0, abs=tolerances.LOGP)
    with torch.no_grad():
        gained = score(run.model, batch).logp - score(start, batch).logp
    assert run.after["margin"] == pytest.approx(float((gained[0::2] - gained[1::2]).mean()), abs=tolerances.LOGP)
    samples = sample(run.model, tiny.tokenizer(), render_prompts(tiny.pairs(2), tiny.tokenizer()), Sampling(max_new_tokens=3))
    assert run.after["kl"] == pytest.approx(sum(kl_per_response(run.model, start, samples)) / 2, abs=tolerances.KL)
    assert "virtual tokens: log-ratios" not in caplog.text


# -- reward models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards") / "base"
    save_model(tiny.model(), tiny.tokenizer(), folder)
    return folder


def reward_fit(model: Any, groups: Any, **keys: Any) -> Any:
    given = {"dtype": "float32", "eval_groups": tiny.pairs(2), "learning_rate": 1e-2, "steps": 3, "batch_size": 6}
    return preftune.fit(model, tiny.tokenizer(), groups, method="reward", **(given | keys))


def rewards(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = score(model, render(tiny.pairs(4), tiny.tokenizer()), head="scalar").scalar
    assert found is not None
    return found


def asked_of(kind: str) -> dict[str, Any]:
    if kind == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra qlora)")
    return {"type": "qlora", "r": 4} if kind == "qlora" else KINDS[kind]


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", "prefix", "qlora"])
def test_over_a_reward_model_the_adapter_and_the_head_train(kind: str, base: Path, tmp_path: Path) -> None:
    """They are saved together, and are the start of a run on a few rows of another kind."""
    keys, packed = asked_of(kind), kind == "qlora"
    made = add_adapter(load_reward(str(base), quantize=packed), AdapterOptions(**keys), seed=0, tokenizer=tiny.tokenizer())
    own = {"lora_A", "lora_B"} if packed else parts({n for n in trained(made) if HEAD not in n})
    assert {n for n in trained(made) if HEAD in n} and len(own) == (3 if kind == "dora" else 1 if kind in VIRTUAL else 2)
    check_exact(made, list(render(tiny.pairs(4), tiny.tokenizer()).sequences))

    first = reward_fit(load_reward(str(base), quantize=packed), tiny.pairs(6), adapter=keys, out=tmp_path / "first")
    losses = [line["loss"] for line in first.metrics]
    assert losses[-1] < losses[0]
    loaded = load_reward(str(tmp_path / "first"))
    assert torch.equal(rewards(loaded), rewards(first.model))
    before = copy.deepcopy(tiny.state(loaded))
    fresh = [tiny.pair("When? ", "at noon", "never"), tiny.pair("Where? ", "in town", "no")]
    start = reward_fit(loaded, fresh, steps=4)
    moved = {name for name, value in tiny.state(start.model).items() if not torch.equal(value, before[name])}
    assert moved == trained(start.model) and start.metrics[-1]["loss"] < start.metrics[0]["loss"]
    if kind not in VIRTUAL:
        expected = rewards(start.model)
        torch.testing.assert_close(rewards(merged(start.model)), expected, atol=tolerances.MERGED, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_every_verb_takes_a_reward_models_adapter(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"adapter.{name}={value}" for name, value in asked_of(kind).items()]
    rows = [{"prompt": g.prompt, "chosen": g.responses[0].content, "rejected": g.responses[1].content} for g in tiny.pairs(8)]
    data, run, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "run", tmp_path / "merged"
    words = [f"data={data}", "method=reward", "dtype=float32", "batch_size=4"]
    train = ["train", f"model={base}", *words, *keys, f"out={run}", "steps=2", "learning_rate=1e-2"]
    assert call(capsys, *train, "dry_run=true", "--json").json["fixed_gb"] > 0
    assert call(capsys, *train).code == 0
    assert call(capsys, "doctor", f"model={base}", *words, *keys, "--json").json["healthy"]
    found = call(capsys, "evaluate", f"model={run}", f"data={data}", "--json").json
    assert found["method"] == "reward"
    folded = call(capsys, "merge", str(run), f"out={out}", "--json")
    if kind in VIRTUAL:
        assert folded.error["code"] == "cannot_merge"
        return
    assert folded.code == 0, folded.err
    torch.testing.assert_close(rewards(load_reward(str(out))), rewards(load_reward(str(run))), atol=tolerances.MERGED, rtol=0)
    again = call(capsys, "evaluate", f"model={out}", f"data={data}", "--json").json
    assert again["log_loss"] == pytest.approx(found["log_loss"], abs=1e-4)


def test_a_tuned_model_is_the_start_of_a_reward_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an adapter it has no head for numbers; folded in it is a model like any."""
    keys: dict[str, Any] = {"dtype": "float32", "eval_groups": [], "steps": 1, "learning_rate": 1e-2}
    preftune.fit(load_model(str(base)), tiny.tokenizer(), tiny.pairs(6), adapter="lora", out=tmp_path / "tuned", **keys)
    with pytest.raises(Refusal, match=r"fold it in first, preftune merge .*tuned out=DIR") as refused:
        load_reward(str(tmp_path / "tuned"))
    assert refused.value.code == "no_scalar_head"
    assert call(capsys, "merge", str(tmp_path / "tuned"), f"out={tmp_path / 'merged'}").code == 0
    model = load_reward(str(tmp_path / "merged"))
    moved = load_model(str(tmp_path / "merged")).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, moved)
    assert len(reward_fit(model, tiny.pairs(6), adapter="lora", steps=1).metrics) == 1
