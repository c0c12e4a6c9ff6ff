"""A run with each kind of adapter: where it starts, what trains, what it leaves, and what goes on from there."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tolerances
import torch
from command import PAIRS, call, write_model, write_rows
from test_adapter_scoring import KINDS, adapted
from test_trie import build
from torch import Tensor

import preftune
from preftune.config import resolve
from preftune.data.render import render, render_prompts
from preftune.errors import Refusal
from preftune.evaluation.kl import kl_per_response
from preftune.generation.sample import Sampling, sample
from preftune.keys import TrainKeys
from preftune.models import adapters
from preftune.models.adapters import adapter_dropout_on, adapter_off, add_adapter, merged, trainable_adapter
from preftune.models.inspect import facts
from preftune.models.load import load_model, save_model
from preftune.models.options import AdapterOptions
from preftune.scoring.score import score

pytestmark = [
    pytest.mark.usefixtures("short_answers", "no_report"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

VIRTUAL, LOW_RANK = ("prompt", "prefix"), ("lora", "rslora", "dora")
TRAINED = {
    "lora": {"lora_A", "lora_B"},
    "rslora": {"lora_A", "lora_B"},
    "dora": {"lora_A", "lora_B", "lora_magnitude_vector"},
    "prompt": {"prompt_encoder"},
    "prefix": {"prompt_encoder"},
}


def fit(model: Any, tokenizer: Any, **keys: Any) -> Any:
    given = {"dtype": "float32", "eval_groups": tiny.pairs(2), "learning_rate": 1e-2, "steps": 3, "batch_size": 6}
    return preftune.fit(model, tokenizer, tiny.pairs(6), **(given | keys))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 70, 71, 72, 9, 30]])).logits


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def parts(names: set[str]) -> set[str]:
    """Which part of an adapter each belongs to."""
    known = {part for found in TRAINED.values() for part in found}
    return {next((part for part in known if part in name), name) for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_adapter_trains(kind: str, tokenizer: Any) -> None:
    """Of a new one, of one that was off and on again, of one that is loaded; and a run moves that and nothing else."""
    made = add_adapter(tiny.model(), AdapterOptions(**KINDS[kind]), seed=0)
    asked = trained(made)
    assert parts(asked) == TRAINED[kind] and {n for n, _ in made.named_parameters() if parts({n}) <= TRAINED[kind]} == asked
    with adapter_off(made):
        assert not trained(made) or kind in VIRTUAL
    assert trained(made) == asked
    assert trained(trainable_adapter(made.requires_grad_(True))) == asked
    before = tiny.state(made)
    after = tiny.state(fit(tiny.model(), tokenizer, adapter=KINDS[kind]).model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == asked


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in LOW_RANK), ("dora", "bfloat16")])
def test_a_low_rank_adapter_starts_at_its_base(kind: str, dtype: str, tokenizer: Any) -> None:
    first = fit(tiny.model(), tokenizer, adapter=KINDS[kind], dtype=dtype, steps=1).metrics[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=tolerances.FIRST_LOSS)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_move_the_policy_and_the_reference_is_its_base(
    kind: str, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "preftune"):
        run = fit(tiny.model(), tokenizer, adapter=KINDS[kind])
    (line,) = [r.message for r in caplog.records if "virtual tokens: log-ratios" in r.message]
    (check,) = [r.message for r in caplog.records if r.message.startswith("start check")]
    assert "policy without its virtual tokens and reference agree to" in check
    batch = render(tiny.pairs(6), tokenizer)
    start = add_adapter(tiny.model(), AdapterOptions(**KINDS[kind]), seed=0, tokenizer=tokenizer)
    with torch.no_grad():
        base, policy = score(tiny.model(), batch).logp, score(start, batch).logp
    assert abs(run.metrics[0]["margin"] - float((policy - base)[0::2].mean() - (policy - base)[1::2].mean())) < tolerances.LOGP
    assert f"{(policy - base).mean():.3g} +- {(policy - base).std():.3g} nats" in line
    assert run.after["kl"] > 0.01


@pytest.mark.parametrize("kind", VIRTUAL)
def test_a_base_that_is_not_its_reference_is_noticed(
    kind: str, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference values are those of an earlier run, and the adapter bends the base: which is asked without its virtual
    tokens, and scored anew."""
    store = tmp_path / "reference.sqlite"
    fit(tiny.model(), tokenizer, steps=1, reference_store=store)
    right = adapters.add_adapter

    def bent(model: Any, *given: Any, **keys: Any) -> Any:
        made = right(model, *given, **keys)
        model.model.norm.weight.data.mul_(1.01)
        return made

    monkeypatch.setattr(adapters, "add_adapter", bent)
    fit(tiny.model(), tokenizer, adapter=KINDS[kind], steps=1, reference_store=store)
    (line,) = [r.message for r in caplog.records if "values differ" in r.message]
    assert "more than rounding" in line


def test_doras_dropout_is_on_in_steps(tokenizer: Any) -> None:
    made = add_adapter(tiny.model(), AdapterOptions(type="dora", r=4, dropout=0.5), seed=0).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert torch.equal(logits(made), logits(made))
    adapter_dropout_on(made)
    assert not torch.equal(logits(made), logits(made))


def test_rslora_counts_alpha_by_the_root_of_the_rank() -> None:
    keys = {"type": "lora", "r": 16, "alpha": 8.0, "target_modules": ["q_proj"]}
    plain, root = (add_adapter(tiny.model(), AdapterOptions(**keys, rslora=rs), seed=0) for rs in (False, True))
    scales = [m.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] for m in (plain, root)]
    assert scales == [0.5, 2.0]


@pytest.mark.parametrize("kind", LOW_RANK)
def test_merged_it_is_a_plain_model_with_the_same_logits(kind: str) -> None:
    made = adapted(tiny.model("untied"), kind)
    expected = logits(made)
    assert (expected - logits(tiny.model("untied"))).abs().max() > 0.01
    torch.testing.assert_close(logits(merged(made)), expected, atol=tolerances.MERGED, rtol=0)


# -- a run folder, and what goes on from it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("adapters") / "m", positions=96)


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return write_rows(base.parent / "pairs.jsonl", PAIRS[:12])


def asked(kind: str) -> list[str]:
    """The adapter, in words of the command line."""
    return [f"adapter.{name}={str(value).lower()}" for name, value in KINDS[kind].items()]


def train(model: Path, data: Path, out: Path, *words: str) -> list[str]:
    keys = ["dtype=float32", "steps=2", "batch_size=4", "learning_rate=1e-2", "--quiet"]
    return ["train", f"model={model}", f"data={data}", f"out={out}", *keys, *words]


@pytest.mark.parametrize("kind", ["dora", "prompt", "prefix"])
def test_every_verb_takes_it(
    kind: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = tmp_path / "run", {"model": f"model={tmp_path / 'run'}", "data": f"data={data}"}
    assert call(capsys, *train(base, data, run, *asked(kind))).code == 0
    loaded = load_model(str(run))
    written = resolve(TrainKeys, [str(run / "config.yaml")]).adapter
    assert {name: getattr(written, name) for name in KINDS[kind]} == KINDS[kind]

    verb = ("evaluate", told["model"], f"reference={base}", told["data"], "kl_samples=2", "max_new_tokens=3", "--json")
    assert call(capsys, *verb).json["kl"] > 0
    out = tmp_path / "out.jsonl"
    assert call(capsys, "score", told["model"], told["data"], f"out={out}", "--quiet").code == 0
    with torch.no_grad():
        expected = score(loaded, render(preftune.read(str(data)), tiny.tokenizer())).logp
    found = [json.loads(line)["logp"] for line in out.read_text().splitlines()]
    assert sorted(found) == pytest.approx(sorted(expected.tolist()), abs=tolerances.LOGP)
    verb = ("generate", told["model"], f"prompts={data}", f"out={out}", "max_new_tokens=2", "overwrite=true", "--quiet")
    assert call(capsys, *verb).code == 0 and len(out.read_text().splitlines()) == 12
    said = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda *_: next(said, "/quit"))
    assert call(capsys, "chat", told["model"], "max_new_tokens=2").code == 0
    for which in ([f"model={base}", *asked(kind)], [told["model"]]):
        assert call(capsys, "doctor", *which, told["data"], "dtype=float32", "batch_size=4", "--json").json["healthy"]
    plan = call(capsys, *train(base, data, run, *asked(kind), "dry_run=true", "overwrite=true", "--json")).json
    assert plan["fixed_gb"] > 0 and plan["steps"] == 2

    merged_ = call(capsys, "merge", str(run), f"out={tmp_path / 'merged'}", "--json")
    if kind in VIRTUAL:
        assert (merged_.code, merged_.error["code"]) == (2, "cannot_merge")
    else:
        torch.testing.assert_close(logits(load_model(merged_.json["out"])), logits(loaded), atol=tolerances.MERGED, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", "prefix"])
def test_a_run_is_a_peft_folder_and_the_start_of_the_next_run(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """Of few-shot transfer: preferences of another kind, from a model that was tuned on preferences before. Its reference is a
    frozen copy of it."""
    from peft import PeftModel

    write_model(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    first = fit(model, tokenizer, adapter=KINDS[kind], out=tmp_path / "first")
    base, loaded = load_model(str(tmp_path / "base")), load_model(str(tmp_path / "first"))
    assert torch.equal(logits(loaded), logits(first.model))
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path / "first" / "model")).eval()), logits(loaded))

    fresh = [tiny.pair("When? ", "at noon", "never"), tiny.pair("Where? ", "in town", "no")]
    before = tiny.state(loaded)
    keys: dict[str, Any] = {"dtype": "float32", "learning_rate": 1e-2, "steps": 3, "eval_groups": tiny.pairs(2)}
    run = preftune.fit(loaded, tokenizer, fresh, out=tmp_path / "second", **keys)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=tolerances.FIRST_LOSS)
    batch = render(fresh, tokenizer)
    with torch.no_grad():
        start, now = score(load_model(str(tmp_path / "first")), batch).logp, score(run.model, batch).logp
        again = score(load_model(str(tmp_path / "second")), batch).logp
    assert torch.equal(again, now)
    gained = (now - start)[0::2] - (now - start)[1::2]
    assert gained.min() > 0, "it learned nothing of the few rows"
    moved = {name for name, value in tiny.state(run.model).items() if not torch.equal(value, before[name])}
    assert parts(moved) == TRAINED[kind]
    reference = load_model(str(tmp_path / "first"))
    held = preftune.evaluate(run.model, tokenizer, tiny.pairs(2), reference=reference, kl_samples=0)
    assert held["margin"] == pytest.approx(run.after["margin"], abs=tolerances.LOGP)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_the_kl_of_an_adapter_that_is_trained_on_is_that_to_its_start(kind: str, tokenizer: Any) -> None:
    """Also in `fit`, where there is no folder to load the start from again."""
    made = adapted(tiny.model(), kind)
    start = copy.deepcopy(made)
    run = fit(made, tokenizer, learning_rate=3e-2)
    samples = sample(run.model, tokenizer, render_prompts(tiny.pairs(2), tokenizer), Sampling(max_new_tokens=3))
    kl, from_base = (sum(kl_per_response(run.model, other, samples)) / 2 for other in (start, tiny.model()))
    assert run.after["kl"] == pytest.approx(kl, abs=tolerances.KL) and abs(kl - from_base) > 0.01


def test_a_merged_run_can_take_a_new_adapter(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter on an adapter is refused, and says so."""
    run = tmp_path / "run"
    assert call(capsys, *train(base, data, run, *asked("lora"), "adapter.merge=true")).code == 0
    assert call(capsys, *train(run, data, tmp_path / "next", *asked("dora"))).code == 0
    answer = call(capsys, *train(tmp_path / "next", data, tmp_path / "third", *asked("lora")), "--json")
    assert (answer.code, answer.error["code"]) == (2, "two_adapters") and "(merge)" in answer.error["message"]


# -- samples and KL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VIRTUAL)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_of_different_lengths_are_continued_as_each_alone(name: str, kind: str, tokenizer: Any) -> None:
    """peft itself would put the padding of the shorter ones between them and the virtual tokens."""
    made = adapted(tiny.model(name), kind)
    prompts = [(3, 70, 71, 9), (30,), (9, 30, 31), (40, 41, 42, 43, 44)]
    found = sample(made, tokenizer, prompts, Sampling(temperature=0, max_new_tokens=6))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in answer.ids:
            with torch.no_grad():
                ids.append(int(made(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(answer.ids) == ids[len(prompt) :]


@pytest.mark.parametrize("kind", VIRTUAL)
def test_kl_without_the_virtual_tokens_is_that_to_the_base(kind: str, tokenizer: Any) -> None:
    made = adapted(tiny.model(), kind)
    samples = sample(made, tokenizer, [(3, 70), (9, 30, 31)], Sampling(max_new_tokens=5))
    off = kl_per_response(made, None, samples, without_adapter=True)
    assert off == pytest.approx(kl_per_response(made, tiny.model(), samples), abs=tolerances.KL)
    by_hand = 0.0
    for at in range(len(samples[0].ids)):
        ids = torch.tensor([[*samples[0].prompt_ids, *samples[0].ids[:at]]])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, -1].log_softmax(-1) for m in (made, tiny.model()))
        by_hand += float((p.exp() * (p - q)).sum())
    assert off[0] == pytest.approx(by_hand, abs=tolerances.KL)


# -- refusals -----------------------------------------------------------------------------------------------------------------


def test_an_adapter_for_another_base_is_refused_by_its_files(tmp_path: Path, tokenizer: Any) -> None:
    """By the shapes, and by the names; before its base is loaded."""
    write_model(tmp_path / "base")
    save_model(adapted(load_model(str(tmp_path / "base")), "lora"), tokenizer, tmp_path / "adapter")
    assert facts(str(tmp_path / "adapter"), "model").adapter
    other = tiny.model(hidden_size=24, intermediate_size=40)
    save_model(other, tokenizer, tmp_path / "base")
    with pytest.raises(Refusal, match=r"another model than .*base: .*lora_[AB].weight is for a layer 16 wide") as refused:
        facts(str(tmp_path / "adapter"), "model")
    assert refused.value.code == "other_base"
    save_model(tiny.model("gpt2"), tokenizer, tmp_path / "base")
    with pytest.raises(Refusal, match=r"that has no layer 0\.\w+\.\w+_proj"):
        facts(str(tmp_path / "adapter"), "reference")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(Refusal, match=r"for the model in .*base, which is not there"):
        facts(str(tmp_path / "adapter"), "model")


def test_an_adapter_with_more_layers_than_its_base_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    save_model(tiny.model(num_hidden_layers=3), tokenizer, tmp_path / "base")
    save_model(adapted(load_model(str(tmp_path / "base")), "lora"), tokenizer, tmp_path / "adapter")
    save_model(tiny.model(), tokenizer, tmp_path / "base")
    with pytest.raises(Refusal, match=r"has no place for .*layers\.2\.") as refused:
        load_model(str(tmp_path / "adapter"))
    assert refused.value.code == "other_base"


def test_layers_that_are_not_there_are_refused_before_weights_are_loaded(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from preftune.models import load

    monkeypatch.setattr(load, "load_model", None)  # would fail if it were called
    words = ["adapter=lora", "adapter.target_modules=[query, q_proj2]", "--json"]
    for verb in (train(base, data, tmp_path / "run", *words), ["doctor", f"model={base}", f"data={data}", *words]):
        answer = call(capsys, *verb)
        assert (answer.code, answer.error["code"]) == (2, "no_target_modules")
        assert "query, q_proj2" in answer.error["message"] and "down_proj, gate_proj, k_proj" in answer.error["message"]


def test_a_model_that_keeps_no_keys_and_values_takes_no_prefix() -> None:
    model = build("Mamba", {})
    with pytest.raises(Refusal, match="adapter=prefix does not fit MambaForCausalLM") as refused:
        add_adapter(model, AdapterOptions(type="prefix", tokens=3), seed=0)
    assert refused.value.code == "no_virtual_tokens"


def test_an_adapter_of_another_kind_is_not_trained_on(tokenizer: Any) -> None:
    from peft import IA3Config, get_peft_model

    made = get_peft_model(tiny.model(), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(Refusal, match="type IA3 cannot be trained on here"):
        fit(made, tokenizer)


def test_of_two_adapters_the_active_one_trains() -> None:
    made = add_adapter(tiny.model(), AdapterOptions(type="lora", r=2), seed=0)
    made.add_adapter("default2", made.peft_config["default"])
    assert {name.split(".")[-2] for name in trained(trainable_adapter(made))} == {"default"}


def test_virtual_tokens_take_positions(tokenizer: Any) -> None:
    with pytest.raises(Refusal, match="63 virtual tokens leave no room in the model's 64 positions"):
        fit(tiny.model(), tokenizer, adapter={"type": "prompt", "tokens": 63})
    with pytest.raises(Refusal, match="over the model's 64 positions, less 20 virtual tokens"):
        fit(tiny.model(), tokenizer, adapter="prompt", max_length=45)
    made = adapted(tiny.model(), "prompt")
    with pytest.raises(Refusal, match="58 is over the model's 57 positions"):
        fit(made, tokenizer, max_length=58)


@pytest.mark.parametrize(("kind", "rate"), [("none", "1e-06"), ("lora", "1e-05"), ("prompt", "0.0001"), ("prefix", "0.0001")])
def test_the_default_rate_is_that_of_what_trains(kind: str, rate: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of a new adapter, and of one that is trained on."""
    caplog.set_level(logging.INFO, "preftune")
    first = fit(tiny.model(), tiny.tokenizer(), adapter=kind, learning_rate=None, steps=1)
    fit(first.model, tiny.tokenizer(), learning_rate=None, steps=1)
    said = [line for line in caplog.messages if line.startswith("learning_rate: ")]
    assert said == [f"learning_rate: {rate}, the default for dpo{'' if kind == 'none' else ' with this adapter'}"] * 2
