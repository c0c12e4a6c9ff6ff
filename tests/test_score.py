"""score against transformers' plain log-softmax over the joined ids, one response at a time."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tolerances
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from preftune.data.render import Batch, Rendered, render
from preftune.errors import Refusal
from preftune.methods.cut import cut
from preftune.models.adapters import adapter_dropout_on, add_adapter, inside
from preftune.models.options import AdapterOptions
from preftune.records import Group
from preftune.scoring import plan, product
from preftune.scoring.head import Head
from preftune.scoring.plan import answer_tokens, pack, padded_batches, shared_batches
from preftune.scoring.score import passes, score, score_logp
from preftune.scoring.scorer import Scorer
from preftune.scoring.trie import grow

GROUPS = [*tiny.pairs(4), tiny.pair("a", "bc", "zz"), tiny.pair("", "one", "the other")]


def joined(model: Any, tok: Any, prompt: str, text: str, start: int) -> Tensor:
    """log p of every token from `start` on, by transformers alone: no padding, no mask, nothing of ours."""
    ids = torch.tensor([[*tok(prompt + text).input_ids, tok.eos_token_id]])
    logp = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return torch.stack([logp[t - 1, ids[0, t]] for t in range(start, ids.shape[1])])


def by_hand(model: Any, tok: Any, groups: list[Group]) -> list[Tensor]:
    found: list[Tensor] = []
    for group in groups:
        assert isinstance(group.prompt, str)
        prompt = tok(group.prompt).input_ids
        start = len(prompt) - (1 if group.prompt == "a" else 0)  # the group whose answer "bc" melts with "a"
        found += [joined(model, tok, group.prompt, str(r.content), start) for r in group.responses]
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_equals_log_softmax_over_the_joined_ids(name: str, tokenizer: Any) -> None:
    model = tiny.model(name)
    batch = render(GROUPS, tokenizer)
    scores = score(model, batch, want=("token_logp", "entropy"))
    expected = by_hand(model, tokenizer, GROUPS)
    assert scores.token_logp is not None and scores.logp.dtype == torch.float32
    assert scores.length.tolist() == [len(e) for e in expected]
    for n, each in enumerate(expected):
        assert abs(float(scores.logp[n].detach()) - float(each.sum().detach())) < tolerances.LOGP
        torch.testing.assert_close(scores.token_logp[n], each, atol=tolerances.LOGP, rtol=0)
        assert float((scores.token_logp[n].sum() - scores.logp[n]).detach().abs()) < tolerances.LOGP


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_values_and_gradients_do_not_depend_on_the_cut(name: str, share: bool, tokenizer: Any) -> None:
    """Along a trie, and padded beside each other."""
    model = tiny.model(name)
    scorer = Scorer(model, share=share)
    batch = render(GROUPS, tokenizer)
    weight = torch.linspace(-1, 1, len(batch))
    (torch.stack([e.sum() for e in by_hand(model, tokenizer, GROUPS)]) * weight).sum().backward()
    expected = gradients(model)
    size = max(float(g.abs().max()) for g in expected.values())
    values: list[Tensor] = []
    for budget in (1, 60, 10**6):
        cut = passes(scorer, batch, [[row] for row in range(len(batch))], budget)
        logp = torch.cat([scorer([batch.sequences[row] for row in rows]).logp for rows in cut])
        logp = logp[torch.tensor([row for rows in cut for row in rows]).argsort()]
        (logp * weight).sum().backward()
        values.append(logp.detach())
        for key, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[key], atol=tolerances.GRADIENT * size, rtol=0)
    torch.testing.assert_close(values[1], values[0], atol=tolerances.LOGP, rtol=0)
    torch.testing.assert_close(values[2], values[0], atol=tolerances.LOGP, rtol=0)


def test_a_mask_leaves_out_what_it_masks(model: Any, tokenizer: Any) -> None:
    whole = render(tiny.pairs(1), tokenizer)
    mask = tuple(n % 3 != 1 for n in range(whole.sequences[0].length))
    masked = replace(whole, sequences=(replace(whole.sequences[0], mask=mask), whole.sequences[1]))
    with torch.no_grad():
        full, part = (score(model, b, want=("token_logp", "entropy")) for b in (whole, masked))
    assert full.token_logp and part.token_logp and full.entropy and part.entropy
    assert part.length.tolist() == [sum(mask), whole.sequences[1].length]
    keep = torch.tensor(mask)
    torch.testing.assert_close(part.token_logp[0], full.token_logp[0][keep])
    torch.testing.assert_close(part.entropy[0], full.entropy[0][keep])
    torch.testing.assert_close(part.logp[0], full.token_logp[0][keep].sum())
    torch.testing.assert_close(part.logp[1], full.logp[1])


def test_entropy_is_that_of_the_next_token_distribution(model: Any, tokenizer: Any) -> None:
    batch = render([tiny.pair("Q: ", "yes", "no")], tokenizer)
    entropy = score(model, batch, want=("entropy",)).entropy
    assert entropy is not None
    s = batch.sequences[0]
    p = model(input_ids=torch.tensor([s.ids])).logits[0, s.start - 1 : -1].double().softmax(-1)
    torch.testing.assert_close(entropy[0].double(), -(p * p.log()).sum(-1), atol=tolerances.LOGP, rtol=0)


def test_a_model_in_training_mode_is_scored_without_dropout_and_stays_in_it(tokenizer: Any) -> None:
    model = tiny.model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    batch = render(GROUPS, tokenizer)
    with torch.no_grad():
        still = score(model, batch).logp
        model.train()
        noisy = model(input_ids=torch.tensor([batch.sequences[0].ids])).logits
        again = model(input_ids=torch.tensor([batch.sequences[0].ids])).logits
        assert not torch.equal(noisy, again), "the model has no dropout to switch off"
        assert torch.equal(score(model, batch).logp, still)
        assert torch.equal(score_logp(model, batch, range(len(batch))), still)
    assert model.training and all(m.training for m in model.modules())


def test_an_adapters_dropout_that_training_switched_on_is_off_while_scoring(tokenizer: Any) -> None:
    """In a callback of a run: the model is in evaluation mode, its dropout is not."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    model: Any = get_peft_model(tiny.model(), lora).eval()
    batch = render(GROUPS, tokenizer)
    still = score(model, batch).logp.detach()
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    for module in dropouts:
        module.train()
    assert torch.equal(score(model, batch).logp.detach(), still)
    assert dropouts and all(m.training for m in dropouts) and not model.training


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bf16_logits_are_summed_in_float32(name: str, tokenizer: Any) -> None:
    """The log-softmax of bfloat16 logits in bfloat16 is off by up to 0.02 nats a token; ours adds nothing to the logits' own
    rounding."""
    model = tiny.model(name).bfloat16()
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(50)
    with torch.no_grad():
        head = Head(model)
        expected = head.logits(hidden).float().log_softmax(-1)
        found = head(hidden, targets)
        entropy = head.values(hidden, ("entropy",))["entropy"]
    assert found.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(found, expected[targets, targets], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=0)


def test_score_logp_gives_the_rows_that_were_asked_and_no_graph(model: Any, tokenizer: Any) -> None:
    batch = render(GROUPS, tokenizer)
    told: list[int] = []
    values = score_logp(model, batch, [5, 1, 5], tokens_per_microbatch=1, progress=told.append)
    assert not values.requires_grad and sum(told) == 2
    assert values.isnan().tolist() == [n not in (1, 5) for n in range(len(batch))]
    torch.testing.assert_close(values[[1, 5]], score(model, batch).logp.detach()[[1, 5]], atol=tolerances.LOGP, rtol=0)


def test_nothing_to_score_gives_nothing_and_unknown_wishes_are_refused(model: Any, tokenizer: Any) -> None:
    empty = Batch((), ())
    assert score(model, empty, want=("entropy",)).logp.shape == (0,)
    batch = render(tiny.pairs(1), tokenizer)
    with pytest.raises(Refusal) as head:
        score(model, batch, head="value")
    with pytest.raises(Refusal) as want:
        score(model, batch, want=("entropi",))  # type: ignore[arg-type]
    assert (head.value.code, want.value.code) == ("unknown_head", "unknown_want")
    with pytest.raises(Refusal, match=re.escape('want=("entropy",)')) as letters:
        score(model, batch, want="entropy")  # type: ignore[arg-type]
    assert (letters.value.code, letters.value.key) == ("bad_value", "want")


@pytest.mark.parametrize(
    ("kind", "labels", "hint"),
    [
        (AutoModelForSequenceClassification, 1, 'head="scalar" gives its number'),
        (AutoModelForSequenceClassification, 3, "AutoModelForCausalLM"),
        (AutoModel, 1, "AutoModelForCausalLM"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_predicts_no_tokens_has_no_logp(name: str, kind: Any, labels: int, hint: str, tokenizer: Any) -> None:
    config = tiny.CONFIGS[name](64)
    config.num_labels = labels
    with pytest.raises(Refusal, match=hint) as refused:
        score(kind.from_config(config), render(tiny.pairs(1), tokenizer))
    assert (refused.value.code, refused.value.key) == ("no_logp_head", "head")


def test_a_pretrained_model_scores_as_transformers_does(shared: Any) -> None:
    from preftune.models.load import load_model, load_tokenizer

    folder = str(shared("models/stories260k"))
    model, tok = load_model(folder), load_tokenizer(folder)
    group = tiny.pair("Once upon a time,", " there was a little girl named Lily.", " the the the the")
    batch = render([group], tok)
    with torch.no_grad():
        logp = score(model, batch).logp
        start = len(tok("Once upon a time,").input_ids)
        for n, response in enumerate(group.responses):
            expected = joined(model, tok, "Once upon a time,", str(response.content), start).sum()
            assert abs(float(logp[n]) - float(expected.detach())) < tolerances.LOGP
    assert logp[0] > logp[1] + 20, "a pretrained model prefers a sentence"


def test_plans_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 9, 1, 9, 3, 12, 2]
    for budget in (1, 12, 20, 1000):
        batches = pack(lengths, budget)
        assert sorted(i for b in batches for i in b) == list(range(7))
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)


def sequences(*groups: tuple[int, list[int]]) -> list[Rendered]:
    """Groups as (prompt tokens, tokens of each response); ids do not matter."""
    made: list[Rendered] = []
    for g, (prompt, tails) in enumerate(groups):
        made += [Rendered(g, r, (g,) * prompt + (r,) * tail, prompt) for r, tail in enumerate(tails)]
    return made


def test_shared_passes_count_a_prompt_and_a_response_once() -> None:
    rows = sequences((10, [5, 5, 5]), (4, [1]))
    pairs = [(0, 1), (1, 2), (0, 2)]
    assert shared_batches(rows, pairs, 25) == [[0, 1, 2]]
    assert shared_batches(rows, pairs, 24) == [[0], [1], [2]]  # any two of them need all three responses
    assert shared_batches(rows, [(0,), (1,), (2,), (3,)], 20) == [[0, 1], [2, 3]]
    assert shared_batches(rows, [(0,), (1,), (2,), (3,)], 19) == [[0], [1], [2], [3]]


def test_shared_passes_are_about_equally_large() -> None:
    rows = sequences(*((3, [n, n + 1]) for n in range(1, 40)))
    needs = [(2 * g, 2 * g + 1) for g in range(39)]
    total = sum(3 + 2 * n + 1 for n in range(1, 40))
    cut = shared_batches(rows, needs, 200)
    sizes = [sum(3 + 2 * (g + 1) + 1 for g in batch) for batch in cut]
    assert sorted(g for batch in cut for g in batch) == list(range(39))
    assert max(sizes) <= 200 and max(sizes) - min(sizes) <= 3 + 2 * 39 and len(cut) <= total // 200 + 2
    assert shared_batches(rows, needs, 200) == cut and shared_batches(rows, needs, 1) == [[g] for g in range(38, -1, -1)]


def test_what_is_over_the_budget_stands_alone_and_changes_nothing_for_the_others() -> None:
    rows = sequences(*((3, [5, 5]) for _ in range(8)), (3, [40, 5]))
    needs = [(2 * g, 2 * g + 1) for g in range(9)]
    assert shared_batches(rows, needs[:8], 26) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert shared_batches(rows, needs, 26) == [[8], [0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("tail", [300, 340, 600, 1100])
def test_many_rows_are_cut_in_a_few_tries(tail: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three, two or one of them in a pass, and with each a longer one than the budget."""
    tries, right = list[int](), plan._balanced
    monkeypatch.setattr(plan, "_balanced", lambda pieces, count: tries.append(count) or right(pieces, count))
    rows = sequences(*((0, [tail + n % 7]) for n in range(600)), (0, [3000]))
    cut = shared_batches(rows, [(n,) for n in range(601)], 1024)
    assert sorted(n for own in cut for n in own) == list(range(601)) and cut[0] == [600]
    least = 1 + 600 // max(1, 1024 // (tail + 6))
    assert least <= len(cut) <= 1.05 * least + 1 and len(tries) < 20


def test_the_beginning_of_another_answer_costs_nothing(tokenizer: Any) -> None:
    """As ld_dpo has it: each answer of a pair, and the longer one cut to the length of the shorter."""
    whole = [replace(s, group=0) for s in render(tiny.pairs(1), tokenizer).sequences]
    both = [*whole, *(cut(s, min(w.length for w in whole)) for s in whole)]
    assert len({s.ids for s in both}) == 3, "one of them is as it was"
    tokens = len(grow([s.ids for s in both], 1).ids) - whole[0].start
    assert answer_tokens(both, range(4)) == tokens == sum(s.length for s in whole)
    assert answer_tokens(both, range(4), {0}) == whole[1].length and answer_tokens(both, range(4), {0, 1}) == 0
    other = [replace(s, group=1) for s in both]
    assert answer_tokens([*both, *other], range(8)) == 2 * tokens, "under another prompt nothing is shared"


def test_padded_passes_keep_rows_of_like_length_together() -> None:
    rows = sequences((0, [5, 5]), (0, [20, 4]), (0, [6, 6]))
    needs = [(0, 1), (2, 3), (4, 5)]
    assert padded_batches(rows, needs, 40) == [[1], [2, 0]]
    assert padded_batches(rows, needs, 80) == [[1, 2], [0]]
    assert padded_batches(rows, needs, 1) == [[1], [2], [0]]


# -- what a graph over several passes holds --------------------------------------------------------------------------------


def test_passes_of_one_graph_share_what_may_be_kept(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    right = product.LinearLogp.forward

    def watched(ctx: Any, *given: Any) -> Tensor:
        kept.append(given[6] * len(given[1]))
        return right(ctx, *given)

    batch = render(GROUPS, tokenizer)
    longest = max(s.length for s in batch.sequences) * tiny.VOCABULARY
    monkeypatch.setattr(product, "KEPT", 2 * longest)
    monkeypatch.setattr(product, "CPU_BLOCK", tiny.VOCABULARY)
    monkeypatch.setattr(product, "FEWEST", 1)
    monkeypatch.setattr(product, "WIDE", 1)
    monkeypatch.setattr(product.LinearLogp, "forward", staticmethod(watched))
    for budget in (1, 10**6):
        kept.clear()
        score(model, batch, tokens_per_microbatch=budget).logp.sum().backward()
        assert 0 < sum(kept) <= 2 * longest and (len(kept) > 3) == (budget == 1)


def test_a_head_that_computes_again_has_no_dropout_then_either(tokenizer: Any) -> None:
    """The backward pass of scores comes when the model is in training mode again."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model: Any = get_peft_model(tiny.model("untied"), lora)
    batch, found = render(GROUPS, tokenizer), list[dict[str, Tensor]]()
    for training in (False, True):
        model.train(training)
        score(model, batch).logp.sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_adapters_dropout_on_the_head_falls_while_it_trains() -> None:
    """A run is in evaluation mode but for that."""
    options = AdapterOptions(type="lora", r=4, dropout=0.5, target_modules=["lm_head"])
    model = add_adapter(tiny.model("untied"), options, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    rows = [Rendered(0, 0, tuple(range(20, 30)), 2)]
    for dropout in (False, True):
        scorer = Scorer(adapter_dropout_on(model.eval()) if dropout else model.eval())
        assert torch.equal(scorer(rows).logp, scorer(rows).logp) != dropout


def test_dropout_on_the_head_falls_in_the_backward_pass_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every chunk; and the random numbers that come after it are those after the forward pass."""
    monkeypatch.setattr(product, "CPU_BLOCK", 5 * tiny.VOCABULARY)
    monkeypatch.setattr(product, "FEWEST", 1)
    options = AdapterOptions(type="lora", r=4, dropout=0.5, target_modules=["lm_head"])
    model = add_adapter(tiny.model("untied"), options, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    head = Head(inside(adapter_dropout_on(model.eval())))
    hidden, targets = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12)
    found: list[dict[str, Tensor]] = []
    for chunked in (True, False):
        torch.manual_seed(1)
        if chunked:
            logp = head(hidden, targets)
        else:
            logits = torch.cat([head.logits(h) for h in hidden.split(5)])
            logp = logits.log_softmax(-1)[targets, targets]
        after = torch.rand(1)
        torch.manual_seed(2)
        (logp * torch.linspace(-1, 1, 12)).sum().backward()
        found.append({**gradients(model), "logp": logp.detach(), "after": after, "next": torch.rand(1)})
    assert len(found[0]) > 3 and found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=1e-5)


def test_a_token_that_is_ruled_out_adds_no_entropy() -> None:
    model = tiny.model("phi")
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = Head(model).logits(hidden)[:, 1:].double().softmax(-1)
        model.lm_head.bias[0] = -torch.inf
        entropy = Head(model).values(hidden, ("entropy",))["entropy"]
    torch.testing.assert_close(entropy.double(), -(before * before.log()).sum(-1), atol=1e-5, rtol=0)


# -- the scalar head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
def test_a_scalar_head_gives_what_the_classifier_gives_one_by_one(share: bool, tokenizer: Any) -> None:
    """Values and gradients; the number is that of the last token, whatever the padding."""
    model = classifier()
    alone = copy.deepcopy(model)
    batch = render(tiny.pairs(5), tokenizer)
    found = Scorer(model, share=share, head="scalar")(batch.sequences).logp
    expected = torch.cat([alone(input_ids=torch.tensor([s.ids])).logits[:, 0] for s in batch.sequences])
    torch.testing.assert_close(found, expected, atol=tolerances.LOGP, rtol=0)
    weight = torch.linspace(-1, 1, len(found))
    (weight * found).sum().backward()
    (weight * expected).sum().backward()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=tolerances.GRADIENT * float(b.grad.abs().max()), rtol=1e-4)


def test_score_gives_scalars_and_no_logp(tokenizer: Any) -> None:
    model, batch = classifier(), render(tiny.pairs(3), tokenizer)
    found = score(model, batch, head="scalar")
    assert found.scalar is not None and found.scalar.shape == (6,) and found.logp.isnan().all()
    assert found.length.tolist() == [s.length for s in batch.sequences]
    with pytest.raises(Refusal, match="a scalar head has no entropy"):
        score(model, batch, head="scalar", want=("entropy",))
    with pytest.raises(Refusal, match="LlamaForCausalLM has no head named score"):
        score(tiny.model(), batch, head="scalar")
    with pytest.raises(Refusal, match="gives 3 numbers"):
        score(classifier(3), batch, head="scalar")


def classifier(labels: int = 1) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = tiny.CONFIGS["llama"](64)
    config.num_labels = labels
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()
