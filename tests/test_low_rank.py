"""A LoRA layer as one operation: peft's values and gradients, and its own forward pass wherever there is more to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import tolerances
import torch

from preftune.models import low_rank
from preftune.models.adapters import add_adapter
from preftune.models.low_rank import fused
from preftune.models.options import AdapterOptions


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """With an update that is not zero."""
    model = add_adapter(tiny.model(name).to(dtype), AdapterOptions(**{"type": "lora", "r": 3, **options}), seed=0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def logits_and_gradients(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = torch.arange(14).view(2, 7)
    found = model(input_ids=ids, use_cache=False).logits
    (found.float() * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    return found, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["llama", "phi", "gemma2"])  # phi's layers have a bias
def test_it_gives_pefts_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name, rslora=True)
    other, calls, right = copy.deepcopy(model), 0, low_rank._Sum.apply

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return right(*arguments)

    monkeypatch.setattr(low_rank._Sum, "apply", counted)
    expected, theirs = logits_and_gradients(other)
    with fused(model):
        found, ours = logits_and_gradients(model)
    assert calls == sum(type(m) is low_rank.Linear for m in model.modules()) > 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(ours) == len(theirs)
    for one, another in zip(ours, theirs, strict=True):
        assert (one - another).norm() <= tolerances.GRADIENT * another.norm()


def test_in_bfloat16_it_is_as_near_to_the_exact_gradient_as_peft() -> None:
    model = adapted()
    _, exact = logits_and_gradients(copy.deepcopy(model))
    halves = model.bfloat16(), copy.deepcopy(model).bfloat16()
    with fused(halves[0]):
        ours = logits_and_gradients(halves[0])[1]
    theirs = logits_and_gradients(halves[1])[1]
    off = [
        torch.stack([(one.float() - true).norm() for one, true in zip(found, exact, strict=True)]).norm()
        for found in (ours, theirs)
    ]
    assert 0 < off[0] < 1.5 * off[1]


def test_gradients_by_finite_differences() -> None:
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (2, 5), (4, 2)))
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: low_rank._Sum.apply(x, weight, bias, a, b, 0.7), (x, a, b))


@pytest.mark.parametrize(
    "what", ["disabled", "dropout", "merged", "dora", "two", "mixed precision", "base trains", "hooks", "bias"]
)
def test_what_is_more_than_one_update_is_left_to_peft(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dropout": {"dropout": 0.5}, "dora": {"type": "dora"}}.get(what, {})
    model = adapted(**options)
    if what == "two":
        model.add_adapter("other", model.peft_config["default"])
        model.base_model.set_adapter(["default", "other"])
    if what == "merged":
        model.merge_adapter()
    if what == "dropout":
        model.train()
    if what == "mixed precision":
        model.base_model.model.bfloat16()
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.float()
    if what == "base trains":
        model.requires_grad_(True)
    for module in (module for key, module in model.named_modules() if key.endswith("lora_B.default")):
        if what == "hooks":
            module.register_forward_hook(lambda module, given, out: 2 * out)
        if what == "bias":
            module.bias = torch.nn.Parameter(torch.ones(module.out_features))
    monkeypatch.setattr(low_rank._Sum, "apply", lambda *arguments: pytest.fail("it is not one update"))
    ids = torch.arange(7).view(1, 7)
    with fused(model):
        torch.manual_seed(0)
        if what == "disabled":
            with model.disable_adapter():
                found = model(input_ids=ids).logits
        else:
            found = model(input_ids=ids).logits
    torch.manual_seed(0)
    if what == "disabled":
        with model.disable_adapter():
            assert torch.equal(found, model(input_ids=ids).logits)
    else:
        assert torch.equal(found, model(input_ids=ids).logits)


def test_copies_compute_like_it_and_afterwards_the_model_is_pefts() -> None:
    model = adapted()
    with fused(model):
        made = copy.deepcopy(model)
        assert any(type(m) is low_rank._FusedLinear for m in made.modules())
    assert not any(type(m) is low_rank._FusedLinear for m in model.modules())
    before = {name: p.clone() for name, p in made.named_parameters()}
    merged = made.merge_and_unload()
    expected = model.merge_and_unload()
    assert before and tiny.same(tiny.state(merged), tiny.state(expected))
