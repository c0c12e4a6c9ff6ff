"""Activation checkpointing: the same step with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from command import repeated

from preftune.errors import Refusal
from preftune.models.adapters import add_adapter, checkpointing_on
from preftune.models.options import AdapterOptions
from preftune.runs.fit import fit
from preftune.scoring import product
from preftune.scoring.scorer import Scorer
from preftune.training.estimate import Estimate

pytestmark = pytest.mark.usefixtures("short_answers")


def run(checkpointing: bool, **keys: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    model = tiny.model()
    keys = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "train": {"checkpointing": checkpointing}, **keys}
    found = fit(model, tiny.tokenizer(), tiny.pairs(8), **keys)
    return repeated(found.metrics), tiny.state(found.model)


@pytest.mark.parametrize("keys", [{}, {"adapter": {"type": "lora", "dropout": 0.2}}, {"method": "orpo"}], ids=str)
def test_a_run_is_the_same_with_it(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, where the head keeps nothing in both; dropout too falls as it did the first time."""
    monkeypatch.setattr(product, "KEPT", 0)
    (lines, state), (expected, plain) = run(True, **keys), run(False, **keys)
    assert lines == expected
    assert tiny.same(state, plain)


def test_layers_run_twice_and_only_where_there_is_a_gradient() -> None:
    model, calls = tiny.model(), 0
    right = model.model.layers[0].mlp.forward

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return right(*arguments)

    model.model.layers[0].mlp.forward = counted
    checkpointing_on(model)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model(input_ids=ids)
    assert calls == 1
    model(input_ids=ids).logits.sum().backward()
    assert calls == 3


def test_the_head_computes_its_softmax_again_too() -> None:
    for model in (tiny.model(), add_adapter(tiny.model(), AdapterOptions(type="lora"), seed=0)):
        assert Scorer(model).head.kept == product.KEPT
        assert Scorer(checkpointing_on(model.eval())).head.kept == 0


def test_it_takes_less_memory_and_more_time() -> None:
    model = tiny.model(num_hidden_layers=8)
    plain, less = (Estimate.of(model, torch.float32, best=False, reference=True, checkpointing=c) for c in (False, True))
    assert plain.scored_bytes == 4 * tiny.VOCABULARY and less.scored_bytes == 0  # of the head's softmax
    assert less.token_bytes and plain.token_bytes and less.token_bytes < plain.token_bytes / 2
    assert less.operations / plain.operations == pytest.approx(5 / 4)


def test_a_model_that_cannot_is_refused() -> None:
    model = tiny.model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(Refusal, match=r"train\.checkpointing"):
        checkpointing_on(model)
