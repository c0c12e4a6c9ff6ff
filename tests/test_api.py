"""The Python surface: names and signatures of the contract, with a model and rows in hand and no files."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command import PAIRS, tree, write_rows

import preftune
from preftune.errors import Refusal
from preftune.models.load import check_same_vocabulary
from preftune.records import Comparison, Demonstration, Group, Message

CHATS = [
    {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "chosen": [{"role": "assistant", "content": pair["chosen"]}],
        "rejected": [{"role": "assistant", "content": pair["rejected"]}],
    }
    for pair in PAIRS[:8]
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEYS: dict[str, Any] = {"dtype": "float32", "steps": 2, "batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_answers: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model() -> Any:
    return tiny.model(positions=128)


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter -> default; `*` before those that are given by name only."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            found.setdefault("*", ...)
        found["**" + name if parameter.kind is parameter.VAR_KEYWORD else name] = parameter.default
    return found


def test_signatures_of_the_contract() -> None:
    needed = inspect.Parameter.empty
    fit, score, render = parameters(preftune.fit), parameters(preftune.score), parameters(preftune.render)
    assert list(fit)[:4] == ["model", "tokenizer", "groups", "*"]
    assert {name: fit[name] for name in ("method", "reference", "eval_groups", "out")} == {
        "method": "dpo", "reference": None, "eval_groups": None, "out": None,
    }  # fmt: skip
    assert list(fit)[-1] == "**keys"
    assert list(score)[:5] == ["model", "batch", "*", "head", "want"]
    assert (score["head"], score["want"], score["batch"]) == ("logp", (), needed)
    assert list(render)[:4] == ["groups", "tokenizer", "*", "max_length"]
    assert render["max_length"] is None
    assert parameters(preftune.read) == {"source": needed}
    assert list(parameters(preftune.evaluate))[:3] == ["model", "tokenizer", "groups"]


def test_names() -> None:
    assert issubclass(preftune.Refusal, preftune.PreftuneError)
    assert issubclass(preftune.RunFailed, preftune.PreftuneError)
    assert issubclass(preftune.Interrupted, preftune.PreftuneError)
    assert set(preftune.__all__) == set(dir(preftune)) - {"__version__"}
    assert all(hasattr(preftune, name) for name in preftune.__all__)
    assert callable(preftune.losses.dpo)
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        preftune.nosuch  # noqa: B018


# -- read -------------------------------------------------------------------------------------------------------------------


def same_groups(a: list[Group], b: list[Group]) -> bool:
    return [(g.prompt, [r.content for r in g.responses], g.id) for g in a] == [
        (g.prompt, [r.content for r in g.responses], g.id) for g in b
    ]


def test_read_takes_whatever_holds_rows() -> None:
    import datasets

    expected = preftune.read(PAIRS[:4])
    assert [g.prompt for g in expected] == [p["prompt"] for p in PAIRS[:4]]
    path = write_rows(Path("pairs.jsonl"), PAIRS[:4])
    table = datasets.Dataset.from_list(PAIRS[:4])
    for source in (str(path), path, table, [path], [table], datasets.DatasetDict(train=table), expected):
        assert same_groups(preftune.read(source), expected), type(source)
    mixed = preftune.read([table.select([0, 1]), str(write_rows(Path("rest.jsonl"), PAIRS[2:4]))])
    assert same_groups(mixed, expected)


def test_groups_hold_marks() -> None:
    (group,) = preftune.read([{**PAIRS[0], "preference": 0.8, "weight": 2.0}])
    (mark,) = group.marks
    assert isinstance(mark, Comparison)
    assert (mark.a, mark.b, mark.preference, mark.weight) == (0, 1, 0.8, 2.0)
    (shown,) = preftune.read([{"prompt": "a", "completion": "b"}])
    assert isinstance(shown.marks[0], Demonstration)
    (chat,) = preftune.read(CHATS[:1])
    assert chat.prompt == (Message("user", PAIRS[0]["prompt"]),)


# -- render and score -------------------------------------------------------------------------------------------------------


def test_score_is_the_models_own_log_softmax(model: Any, tokenizer: Any) -> None:
    batch = preftune.render(preftune.read(PAIRS[:2]), tokenizer)
    scores = preftune.score(model, batch, want=("token_logp", "entropy"))
    assert scores.logp.shape == scores.length.shape == (4,)
    assert scores.logp.requires_grad
    texts = [PAIRS[n]["prompt"] + PAIRS[n][side] for n in range(2) for side in ("chosen", "rejected")]
    for n, text in enumerate(texts):
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        start = len(tokenizer(PAIRS[n // 2]["prompt"]).input_ids)
        logp = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        expected = logp.gather(-1, ids[0, 1:, None])[start - 1 :, 0]
        assert scores.logp[n].item() == pytest.approx(expected.sum().item(), abs=1e-4)
        assert scores.length[n] == len(expected)
        assert scores.token_logp is not None
        assert torch.allclose(scores.token_logp[n], expected, atol=1e-5)
        assert scores.entropy is not None
        assert torch.allclose(scores.entropy[n], -(logp.exp() * logp).sum(-1)[start - 1 :], atol=1e-4)
    assert preftune.score(model, batch).token_logp is None


def test_render_drops_what_is_too_long(tokenizer: Any) -> None:
    groups = preftune.read([PAIRS[0], {**PAIRS[1], "chosen": " very" * 30}])
    batch = preftune.render(groups, tokenizer, max_length=60)
    assert (len(groups), len(batch.groups), [f.code for f in batch.findings]) == (2, 1, ["too_long"])


def test_unknown_heads_and_wants_are_refused(model: Any, tokenizer: Any) -> None:
    batch = preftune.render(preftune.read(PAIRS[:1]), tokenizer)
    for keys in ({"head": "reward"}, {"want": ("logits",)}):
        with pytest.raises(Refusal, match="known: "):
            preftune.score(model, batch, **keys)  # type: ignore[arg-type]


# -- fit and evaluate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "template"), [(PAIRS[:8], None), (CHATS, TEMPLATE), (CHATS, None)])
def test_fit_trains_the_model_in_hand(rows: list[dict[str, Any]], template: str | None, model: Any) -> None:
    tokenizer = tiny.tokenizer(template=template)
    before = tiny.state(model)
    groups = preftune.read(rows)
    run = preftune.fit(model, tokenizer, groups, eval_groups=groups[:2], **KEYS)
    assert run.model is model
    assert not tiny.same(before, tiny.state(model))
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (run.method, run.out) == ("dpo", None)
    assert run.before is not None
    assert run.after is not None
    assert run.before["comparisons"] == 2
    assert run.after["loss"] != run.before["loss"]
    assert len(run.samples) == 2
    assert tree(Path()) == {}, "without out nothing is written"


def test_fit_takes_a_method_a_reference_and_keys(model: Any, tokenizer: Any) -> None:
    groups = preftune.read(PAIRS[:8])
    run = preftune.fit(model, tokenizer, groups, method="sft", eval_groups=groups[:2], **KEYS)
    assert run.method == "sft"
    assert "margin" not in run.metrics[0]
    other = tiny.model(seed=5, positions=128)
    kept = tiny.state(other)
    seen: list[str] = []
    with_other = preftune.fit(
        model,
        tokenizer,
        groups,
        reference=other,
        eval_groups=groups[:2],
        beta=0.5,
        train={"eval_every": 1},
        progress=lambda phase, done, total, line: seen.append(phase),
        **KEYS,
    )
    assert abs(with_other.metrics[0]["loss"] - math.log(2)) > 1e-3, "another reference"
    assert all("eval/loss" in line for line in with_other.metrics)
    assert {"reference", "train", "evaluate"} <= set(seen)
    assert tiny.same(kept, tiny.state(other)), "the reference is left as it is"


def test_fit_writes_a_run_where_it_is_told_to(model: Any, tokenizer: Any, no_report: None) -> None:
    run = preftune.fit(model, tokenizer, preftune.read(PAIRS[:8]), out="run", adapter="lora", **KEYS)
    assert run.out == Path("run")
    assert {"config.yaml", "metrics.jsonl", "model", "samples.jsonl"} <= {p.name for p in Path("run").iterdir()}
    assert "model: ''" in Path("run/config.yaml").read_text(), "a model that was never saved has no place"


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"lerning_rate": 1e-6}, "lerning_rate"),
        ({"beta": -1.0}, "beta"),
        ({"train": {"eval_evry": 1}}, "train.eval_evry"),
        ({"method": "sigmoid"}, "method"),
        ({"reference": "other"}, "reference"),
    ],
)
def test_fit_refuses_before_it_touches_the_model(keys: dict[str, Any], key: str, model: Any, tokenizer: Any) -> None:
    if keys.get("reference"):
        smaller = tiny.model()
        smaller.resize_token_embeddings(tiny.VOCABULARY - 1)
        keys = {"reference": smaller}
    before = tiny.state(model)
    with pytest.raises(Refusal) as refused:
        preftune.fit(model, tokenizer, preftune.read(PAIRS[:4]), **keys)
    assert refused.value.key == key
    assert tiny.same(before, tiny.state(model))


def test_evaluate_before_and_after(model: Any, tokenizer: Any) -> None:
    groups = preftune.read(PAIRS[:8])
    start = tiny.model(positions=128)
    assert preftune.evaluate(start, tokenizer, groups)["accuracy"] is None
    same = preftune.evaluate(model, tokenizer, groups, reference=start, kl_samples=2, max_new_tokens=3)
    assert (same["accuracy"], same["margin"]) == (0.5, pytest.approx(0, abs=1e-4))
    assert same["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert same["kl"] == pytest.approx(0, abs=1e-5)
    preftune.fit(model, tokenizer, groups, **{**KEYS, "steps": 6, "learning_rate": 1e-2})
    after = preftune.evaluate(model, tokenizer, groups, reference=start, kl_samples=2, max_new_tokens=3)
    assert after["accuracy"] > 0.7
    assert after["margin"] > 0.1
    assert after["loss"] < math.log(2)
    assert after["kl"] > 1e-3
    assert after["comparisons"] == after["prompts"] == 8


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"dry_run": True}, "dry_run"),
        ({"eval_data": "pairs.jsonl"}, "eval_data"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"data": "pairs.jsonl"}, "data.sources"),
        ({"data": {"sources": ["pairs.jsonl"]}}, "data.sources"),
    ],
)
def test_fit_refuses_what_it_would_not_read(keys: dict[str, Any], key: str, model: Any, tokenizer: Any) -> None:
    with pytest.raises(Refusal) as refused:
        preftune.fit(model, tokenizer, preftune.read(PAIRS[:4]), **keys)
    assert (refused.value.code, refused.value.key) == ("not_in_fit", key)


@pytest.mark.parametrize("given", ["runs/sft/model", {"store": "off"}])
def test_fit_takes_loaded_models(given: Any, model: Any, tokenizer: Any) -> None:
    groups = preftune.read(PAIRS[:4])
    with pytest.raises(Refusal, match="a loaded model of transformers, not ") as refused:
        preftune.fit(model, tokenizer, groups, reference=given)
    assert (refused.value.code, refused.value.key) == ("not_a_model", "reference")
    assert ("reference_store=" in refused.value.message) == isinstance(given, dict)
    with pytest.raises(Refusal) as refused:
        preftune.fit(given, tokenizer, groups)
    assert refused.value.key == "model"


def test_the_base_of_an_adapter_scores_with_it_and_is_not_trained_on(model: Any, tokenizer: Any) -> None:
    groups = preftune.read(PAIRS[:4])
    adapted = preftune.fit(model, tokenizer, groups, adapter="lora", **KEYS).model
    batch = preftune.render(groups, tokenizer)
    torch.testing.assert_close(preftune.score(model, batch).logp, preftune.score(adapted, batch).logp)
    with pytest.raises(Refusal, match=r"an adapter was put into this model: .* run\.model"):
        preftune.fit(model, tokenizer, groups, **KEYS)


def test_fit_refuses_an_adapter_on_an_adapter(model: Any, tokenizer: Any) -> None:
    groups = preftune.read(PAIRS[:4])
    adapted = preftune.fit(model, tokenizer, groups, adapter="lora", **KEYS).model
    with pytest.raises(Refusal, match="an adapter already"):
        preftune.fit(adapted, tokenizer, groups, adapter="lora", **KEYS)


def test_tokens_with_other_ids_are_another_vocabulary(tokenizer: Any) -> None:
    check_same_vocabulary(tokenizer, tiny.tokenizer(template="{{ messages }}"))
    other = tiny.tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(Refusal, match=f"'zebra' is absent in one and {tiny.VOCABULARY} in the other"):
        check_same_vocabulary(tokenizer, other)


def test_the_step_whose_weights_are_kept_is_said(model: Any, tokenizer: Any, no_report: None) -> None:
    """Held-out people want the opposite: every step makes it worse, so that the first evaluation is the best."""
    opposite = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS[:8]]
    keys = {**KEYS, "steps": 6, "learning_rate": 1e-2, "train": {"eval_every": 2}}
    run = preftune.fit(model, tokenizer, preftune.read(PAIRS[:8]), eval_groups=preftune.read(opposite), out="run", **keys)
    losses = {line["step"]: line["eval/loss"] for line in run.metrics if "eval/loss" in line}
    assert run.kept_step == min(losses, key=losses.__getitem__) == 2
    assert json.loads(Path("run/evaluation.json").read_text())["kept_step"] == run.kept_step


def test_marks_without_use_are_counted(model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "preftune")
    rows = [*PAIRS[:6], {"prompt": "Q: ", "response": "shown"}]
    groups = [*preftune.read(rows[:6]), *preftune.read(rows[6:]), tiny.pair("T: ", "a", "b", preference=0.5)]
    preftune.fit(model, tokenizer, groups, method="dpo", eval_groups=preftune.read(PAIRS[6:8]), **KEYS)
    assert "7 examples to train on and 2 held out" in caplog.text
    assert "dpo makes no example of 1 demonstrations" in caplog.text
    preftune.fit(model, tokenizer, groups, method="sft", eval_groups=preftune.read(PAIRS[6:8]), **KEYS)
    assert "sft makes no example of 1 ties, weights of 0 or answers shown before" in caplog.text
