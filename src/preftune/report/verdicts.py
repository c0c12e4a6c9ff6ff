"""The verdict of a run in one sentence, made from its figures and no more certain than they are."""

from __future__ import annotations

from collections.abc import Sequence

from preftune.report.folder import Json, RunFiles, mapping, number, objects, pair
from preftune.report.words import count, figure, interval, percent, plain


def sentence(files: RunFiles) -> str:
    """What the run showed: a demo's win rates, else held-out figures before and after, else how far training came."""
    return demo_sentence(files.demo) if files.demo else run_sentence(files.evaluation, files.metrics)


def demo_sentence(demo: Json) -> str:
    """The verdict of a demo: the best win rate by the scorer that labelled, and the same run by the other scorers."""
    run = best_run(demo)
    rates = {name: mapping(rate) for name, rate in mapping(run.get("win_rate")).items()}
    if not rates:
        return "The demo wrote no win rates: nothing was measured."
    told = [f"{percent(rate.get('win_rate'))} by the {name} scorer{_known(rate, 'win_rate')}" for name, rate in rates.items()]
    prompts, runs = number(demo.get("prompts")), objects(demo.get("runs"))
    where = "On held-out prompts" if prompts is None else f"On {count(int(prompts), 'held-out prompts')}"
    text = f"{where} the aligned model's answer beats the base model's in {' and '.join(told)}, ties counting one half"
    if number(run.get("kl")) is not None:
        text += f", at a KL of {figure(run['kl'])} nats per response"
    if len(runs) > 1:
        text += f" (beta {plain(run.get('beta'))}, the best of {len(runs)})"
    spans = {name: pair(rate.get("win_rate_interval")) for name, rate in rates.items()}
    unsure = [name for name, ends in spans.items() if ends and ends[0] <= 0.5 <= ends[1]]
    if unsure:
        names = " and the ".join(unsure)
        text += f"; the interval by the {names} scorer includes 50 %, so that no difference is shown there"
    return text + "."


def best_run(demo: Json) -> Json:
    """The demo's run with the highest win rate by its first scorer, the one that labelled."""

    def rate(run: Json) -> float:
        scorers = [mapping(value) for value in mapping(run.get("win_rate")).values()]
        value = number(scorers[0].get("win_rate")) if scorers else None
        return -1.0 if value is None else value

    return max(objects(demo.get("runs")), key=rate, default=mapping(None))


def run_sentence(evaluation: Json, metrics: Sequence[Json]) -> str:
    """The verdict of a training run: for SFT its loss; else the share ranked right, by log-probability or by a reward model's
    numbers; or the loss."""
    before, after = mapping(evaluation.get("before")), mapping(evaluation.get("after"))
    if after.get("method") == "sft" and number(after.get("loss")) is not None:
        return _loss_sentence(before, after)
    for key in ("logp_accuracy", "accuracy"):
        if number(after.get(key)) is not None:
            return _ranking_sentence(before, after, key)
    if number(after.get("loss")) is not None:
        return _loss_sentence(before, after)
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return "Nothing was trained or measured yet: this folder holds neither training steps nor held-out figures."
    last = number(steps[-1]["loss"])
    loss = "that is not finite" if last is None else f"of {figure(last)}"
    so_far = f"{count(len(steps), 'steps')} trained, the last with a loss {loss}"
    for line in reversed(metrics):
        step = figure(line.get("step"))
        if number(line.get("eval/logp_accuracy")) is not None:
            share = percent(line["eval/logp_accuracy"])
            return f"No final evaluation yet: {so_far}; at step {step}, {share} of held-out comparisons were ranked right."
        if number(line.get("eval/loss")) is not None:
            return f"No final evaluation yet: {so_far}; at step {step}, the held-out loss was {figure(line['eval/loss'])}."
    return f"No held-out evaluation, so nothing can be said about unseen data: {so_far}."


def _ranking_sentence(before: Json, after: Json, key: str) -> str:
    first, second = number(before.get(key)), float(after[key])
    ends = pair(after.get(f"{key}_interval"))
    known = _known(after, key) or " (no interval was measured)"
    where = _where(after, "comparisons")
    if first is None:
        return f"{where} the trained model ranks {percent(second)} right{known}; before training was not measured."
    if percent(first) == percent(second):
        return f"{where} the share ranked right stayed at {percent(second)}{known}."
    verb = "rose" if second > first else "fell"
    told = f"{where} the share ranked right {verb} from {percent(first)} to {percent(second)}{known}"
    if ends and ends[0] <= first <= ends[1]:
        return told + "; the interval includes the figure before training, so that no clear change is shown."
    return told + "."


def _loss_sentence(before: Json, after: Json) -> str:
    kind = judged(after)
    unit = " nats per token" if kind == "demonstrations" else ""
    first, second = number(before.get("loss")), float(after["loss"])
    where = _where(after, kind)
    if first is None:
        return f"{where} the loss after training is {figure(second)}{unit}; before training was not measured."
    start, end = figure(first), figure(second)
    moved = f"stayed at {end}" if start == end else f"{'fell' if second < first else 'rose'} from {start} to {end}"
    told = f"{where} the loss {moved}{unit}"
    if number(after.get("perplexity")) is not None and number(before.get("perplexity")) is not None:
        told += f" (perplexity {figure(before['perplexity'])} to {figure(after['perplexity'])})"
    return told + "."


def judged(side: Json) -> str:
    """The kind of judgements that the held-out loss is of."""
    kinds = ("demonstrations", "ratings", "rankings")
    return next((kind for kind in kinds if number(side.get(kind)) is not None), "comparisons")


def _where(side: Json, kind: str) -> str:
    size = number(side.get(kind))
    return f"On held-out {kind}" if size is None else f"On {count(int(size), f'held-out {kind}')}"


def _known(side: Json, key: str) -> str:
    """(95 % interval ...), or nothing where none was measured."""
    span = interval(side.get(f"{key}_interval"), share=True)
    return f" (95 % interval {span})" if span else ""
