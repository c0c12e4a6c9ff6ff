"""Reward models: made of a language model, saved as transformers' classifiers, and how far their probabilities hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tolerances
import torch
from command import call

from preftune import evaluate, fit, losses
from preftune.data.render import render
from preftune.errors import Refusal
from preftune.evaluation.calibration import calibration
from preftune.models.load import load_model, save_model
from preftune.models.reward import is_reward, load_reward, name_padding
from preftune.records import By, Group, Ranking, Response
from preftune.scoring.score import score
from preftune.scoring.selfcheck import one_by_one


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a language model and its tokenizer."""
    folder = tmp_path / "base"
    save_model(tiny.model(), tiny.tokenizer(), folder)
    return folder


def test_made_of_a_language_model_and_loaded_again(base: Path, tmp_path: Path) -> None:
    tok = tiny.tokenizer()
    made, again = load_reward(str(base)), load_reward(str(base))
    assert torch.equal(made.score.weight, again.score.weight)  # seeded
    assert not torch.equal(made.score.weight, load_reward(str(base), seed=1).score.weight)
    drawn = torch.cat([load_reward(str(base), seed=n).score.weight for n in range(50)])
    assert float(drawn.detach().std()) == pytest.approx((drawn.shape[1] + 1) ** -0.5, rel=0.1)
    body = dict(tiny.model().model.named_parameters())
    assert all(torch.equal(p, body[name]) for name, p in made.model.named_parameters())
    assert (is_reward(str(base), "model"), made.training) == (False, False)
    save_model(made, tok, tmp_path / "reward")
    assert is_reward(str(tmp_path / "reward"), "model")
    batch = render(tiny.pairs(3), tok)
    first, second = (score(m, batch, head="scalar").scalar for m in (made, load_reward(str(tmp_path / "reward"), seed=7)))
    assert first is not None and second is not None and torch.equal(first, second)


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 300}
    save_model(BertForSequenceClassification(BertConfig(**small, num_labels=1)), tiny.tokenizer(), tmp_path / "bert")
    with pytest.raises(Refusal, match="BertForSequenceClassification is no decoder with a head named score"):
        load_reward(str(tmp_path / "bert"))


def test_transformers_reads_the_saved_classifier_as_we_do(base: Path, tmp_path: Path) -> None:
    """Padded, in its own pipeline of tokens: the number is that of the end token, not of the token before it."""
    from transformers import AutoModelForSequenceClassification

    tok = tiny.tokenizer()
    tok.pad_token = tok.eos_token  # as many are published
    model = load_reward(str(base))
    name_padding(model, tok)
    assert model.config.pad_token_id not in (None, tok.eos_token_id)
    save_model(model, tok, tmp_path / "reward")
    batch = render(tiny.pairs(4), tok)
    ours = score(model, batch, head="scalar").scalar
    assert ours is not None
    width = max(len(s.ids) for s in batch.sequences)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    ids = torch.tensor([[*s.ids, *[model.config.pad_token_id] * (width - len(s.ids))] for s in batch.sequences])
    real = torch.tensor([[1] * len(s.ids) + [0] * (width - len(s.ids)) for s in batch.sequences])
    with torch.no_grad():
        found = theirs(input_ids=ids, attention_mask=real).logits[:, 0]
    torch.testing.assert_close(found, ours.detach(), atol=tolerances.LOGP, rtol=0)
    torch.testing.assert_close(one_by_one(model, batch.sequences).detach(), ours.detach(), atol=tolerances.LOGP, rtol=0)


def test_no_token_to_pad_with_is_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = SimpleNamespace(
        bos_token_id=1, eos_token_id=1, pad_token_id=1, unk_token_id=None, added_tokens_decoder={}
    )  # GPT-2's
    model = load_reward(str(base))
    name_padding(model, bare)
    assert model.config.pad_token_id is None and "one row at a time" in caplog.text


# -- calibration


def test_calibration_by_hand() -> None:
    """Two pairs said at 0.9, one of them wrong; one at 0.6 the other way, right; a tie said at one half."""
    margin = torch.tensor([math.log(9), math.log(9), math.log(4 / 6), 0.0])
    found = calibration(margin, torch.tensor([1.0, 0.0, 0.0, 0.5]))
    assert found["log_loss"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.6) + math.log(0.5)) / 4)
    assert found["brier"] == pytest.approx((0.01 + 0.81 + 0.16 + 0) / 4)
    assert found["ece"] == pytest.approx((2 * 0.4 + 0.4 + 0) / 4)
    assert [(row["count"], round(row["accuracy"], 3), round(row["confidence"], 3)) for row in found["calibration"]] == [
        (1, 0.5, 0.5),
        (1, 1.0, 0.6),
        (2, 0.5, 0.9),
    ]
    assert calibration(torch.zeros(0), torch.zeros(0)) == {}


def test_the_true_probabilities_are_calibrated_and_best() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = 2 * torch.randn(20_000, generator=generator)
    label = (torch.rand(20_000, generator=generator) < torch.sigmoid(margin)).float()
    true, bold, shy = (calibration(scale * margin, label) for scale in (1.0, 2.0, 0.5))
    assert true["ece"] < 0.01 < 0.05 < min(bold["ece"], shy["ece"])
    assert true["log_loss"] < min(bold["log_loss"], shy["log_loss"]) and true["brier"] < min(bold["brier"], shy["brier"])


def test_swapping_the_sides_changes_nothing() -> None:
    margin, preference = torch.tensor([0.3, -2.0, 4.0]), torch.tensor([0.2, 0.9, 1.0])
    one, other = calibration(margin, preference), calibration(-margin, 1 - preference)
    assert [one[name] for name in ("log_loss", "brier", "ece")] == pytest.approx(
        [other[name] for name in ("log_loss", "brier", "ece")]
    )


# -- training


def judged() -> list[Group]:
    """Answers with a z are worse: what a reward model can learn."""
    return [tiny.pair(f"question {n}", f"answer {n} is fine", f"answer {n} is zzzz") for n in range(24)]


def test_training_learns_the_judgements_and_leaves_a_classifier(base: Path, tmp_path: Path) -> None:
    model = load_reward(str(base))
    keys = {"learning_rate": 3e-3, "epochs": 4, "batch_size": 8, "dtype": "float32"}
    run = fit(model, tiny.tokenizer(), judged(), method="reward", out=tmp_path / "run", **keys)
    assert run.before is not None and run.after is not None
    assert run.after["accuracy"] > 0.9 and run.after["loss"] < 0.5 * run.before["loss"]
    assert {"log_loss", "brier", "ece", "calibration"} <= set(run.after) and run.after["logp_accuracy"] is None
    assert run.samples == [] and run.after["kl"] is None
    line = run.metrics[-1]
    assert {"loss", "margin", "accuracy", "reward/chosen", "reward/rejected", "length/chosen"} <= set(line)
    assert not any(name.startswith(("logp", "log_ratio")) for name in line)
    assert is_reward(str(tmp_path / "run"), "model") and (tmp_path / "run" / "report.html").is_file()
    again = evaluate(load_reward(str(tmp_path / "run")), tiny.tokenizer(), judged())
    assert again["method"] == "reward" and again["accuracy"] > 0.9


@pytest.mark.parametrize("pairs", ["all", "best_vs_rest"])
def test_a_rankings_pairs(base: Path, pairs: Any) -> None:
    group = Group("a long question", (Response("one"), Response("two"), Response("three")), (Ranking(((1,), (0, 2))),))
    keys = {"learning_rate": 1e-3, "steps": 1, "dtype": "float32", "eval_groups": []}
    model = load_reward(str(base))
    rewards = score(model, render([group], tiny.tokenizer()), head="scalar").scalar
    assert rewards is not None
    run = fit(model, tiny.tokenizer(), [group], method={"name": "reward", "pairs": pairs, "centering": 0.1}, **keys)
    p = [(1, 0, 1.0), (1, 2, 1.0), (0, 2, 0.5)][: 3 if pairs == "all" else 2]
    index = torch.tensor([(a, b) for a, b, _ in p])
    by_hand = losses.reward(
        rewards, index[:, 0], index[:, 1], preference=torch.tensor([x for *_, x in p]), centering=0.1
    ).mean()
    assert run.metrics[0]["loss"] == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_a_rankings_whole_order_at_once(base: Path) -> None:
    group = Group("a long question", (Response("one"), Response("two"), Response("three")), (Ranking(((1,), (0,), (2,))),))
    model = load_reward(str(base))
    found = score(model, render([group], tiny.tokenizer()), head="scalar").scalar
    assert found is not None
    r = found.detach()[[1, 0, 2]]
    run = fit(
        model,
        tiny.tokenizer(),
        [group],
        method={"name": "reward", "listwise": True},
        learning_rate=1e-3,
        steps=1,
        dtype="float32",
        eval_groups=[],
    )
    by_hand = -sum(r[n] - r[n:].logsumexp(0) for n in range(3))  # Plackett-Luce
    assert run.metrics[0]["loss"] == pytest.approx(float(by_hand), rel=1e-5)


def test_a_strength_asks_for_a_lead(base: Path) -> None:
    pair = tiny.pair("a long question", "good", "bad")
    strong = replace(pair, marks=(replace(pair.marks[0], by=By("me", strength=3.0)),))
    first: list[float] = []
    for scale in (0.0, 0.5):
        model, keys = load_reward(str(base)), {"learning_rate": 1e-3, "steps": 1, "dtype": "float32", "eval_groups": []}
        run = fit(model, tiny.tokenizer(), [strong], method={"name": "reward", "margin_scale": scale}, **keys)
        first.append(run.metrics[0]["loss"])
        margin = run.metrics[0]["margin"]
        assert first[-1] == pytest.approx(math.log1p(math.exp(3 * scale - margin)), rel=1e-5)
    assert first[1] > first[0]


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    tok = tiny.tokenizer()
    with pytest.raises(Refusal, match="this is a language model, and method=reward takes a reward model"):
        fit(tiny.model(), tok, judged(), method="reward")
    model = load_reward(str(base))
    with pytest.raises(Refusal, match="this is a reward model"):
        fit(model, tok, judged(), method="dpo")
    with pytest.raises(Refusal, match="reward takes other examples"):
        fit(model, tok, judged(), method={"mix": {"reward": 1.0, "dpo": 1.0}})
    with pytest.raises(Refusal, match="reward does not read it"):
        fit(model, tok, judged(), method={"name": "reward", "weighting": "wpo"})
    save_model(model, tok, tmp_path / "reward")
    with pytest.raises(Refusal, match="holds a reward model, which gives a number and writes no text"):
        load_model(str(tmp_path / "reward"))


def test_by_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": g.prompt, "chosen": g.responses[0].content, "rejected": g.responses[1].content} for g in judged()]
    data, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model={base}", f"data={data}", "method=reward", f"out={out}", "learning_rate=0.003", "steps=6", "batch_size=8"]
    assert call(capsys, "train", *words, "dry_run=true").code == 0
    assert call(capsys, "train", *words, "dtype=float32", "adapter=lora").code == 0
    answer = call(capsys, "evaluate", f"model={out}", f"data={data}", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["method"] == "reward" and 0 <= found["ece"] <= 1 and found["calibration"]
    assert call(capsys, "chat", f"model={out}").code == 2
