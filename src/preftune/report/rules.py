"""What a run's figures say about it: a function for each pattern, which gives its evidence, or None where it is not there.

Why each threshold stands where it does is said in docs/diagnosis/, a page for each.
"""

from __future__ import annotations

import math
from statistics import fmean, median, stdev

from preftune.report.folder import mapping, number
from preftune.report.record import FEWEST, Curve, Record, Stretch
from preftune.report.words import count, figure, percent, plain

FALLEN = 0.1  # nats per token: one answer in e^0.1, a perplexity 10.5 % higher
LONGER = 1.25
DROPPED = 0.02  # of held-out accuracy, and twice its standard error
CHANCE, FEWEST_UNSEEN = 0.6, 100
KL_BUDGET, FAR = 20.0, 0.5  # nats per response, and nats per token of the judged answers
SURE = math.log(0.9 / 0.1)  # beta * margin at which the logistic loss takes a pair as 90 % certain
AGREED = math.log(0.73 / 0.27)  # 1: where it is at its optimum for labels that 73 % agree on
HARDLY = 1.0  # nats of margin
RISEN, SPIKE, PEAK, BEHIND, PARTED = 0.1, 2.0, 10.0, 20, 0.25
UNMOVED = 0.001  # nats per token
MISMATCH = 0.02  # nats per token, what bfloat16 is allowed at the start check
EASY, FEWEST_EASY, FEWEST_STUCK = 0.95, 50, 32


def likelihood_displacement(run: Record) -> str | None:
    """The chosen answers themselves got less likely: against the reference where it stays, else against the first steps."""
    ratio = run.per_token("log_ratio/chosen")
    if len(ratio) >= FEWEST and not run.moving and not reference_mismatch(run):
        end, moved, error, since = ratio.end, ratio.end.mean, ratio.end.error, "under the reference"
    else:
        logp = run.per_token("logp/chosen")
        start, end = logp.start, logp.end
        moved, error, since = end.mean - start.mean, math.hypot(start.error, end.error), f"over {start.where}"
    if moved > -FALLEN or moved + 2 * error > 0:
        return None
    other = run.per_token("log_ratio/rejected")
    beside = f", and the rejected ones {figure(-other.end.mean)}" if since == "under the reference" and len(other) else ""
    return f"over {end.where} the chosen answers have {figure(-moved)} nats per token less than {since}{beside}"


def length_drift(run: Record) -> str | None:
    """The model's own answers got longer, or shorter, by more than their number leaves to chance."""
    both = run.lengths
    before, after = fmean(b for b, _ in both), fmean(a for _, a in both)
    differences = [a - b for b, a in both]
    if not before or not after or 1 / LONGER < after / before < LONGER:
        return None
    if abs(fmean(differences)) < 2 * stdev(differences) / math.sqrt(len(both)):
        return None
    sides = [run.curve(f"length/{side}") for side in ("chosen", "rejected")]
    means = [figure(fmean(side.values)) for side in sides if len(side)]
    data = f"; in the data chosen answers have {means[0]} tokens, rejected ones {means[1]}" if len(means) == 2 else ""
    return f"{len(both)} sampled answers went from {figure(before)} to {figure(after)} tokens in the mean{data}"


def overfitting(run: Record) -> str | None:
    """The margin on training rows grows while held-out accuracy falls, or the held-out loss ends above the untrained one."""
    margin, held = run.curve("margin"), run.curve("eval/accuracy")
    if len(margin) < FEWEST or margin.end.mean <= margin.start.mean:
        return None
    grown = f"the margin in training came to {figure(margin.end.mean)} nats over {margin.end.where}"
    if len(held) > 1:
        best = max(held.values)
        step, last = held.steps[held.values.index(best)], held.values[-1]
        then = margin.near(step, max(1.0, margin.steps[-1] / 20))
        comparisons = number(run.after.get("comparisons")) or FEWEST_UNSEEN
        noise = 2 * math.sqrt(best * (1 - best) / comparisons)
        grew = margin.end.mean - then.mean > 2 * math.hypot(margin.end.error, then.error)
        if grew and best - last >= max(DROPPED, noise):
            fell = f"held-out accuracy fell from {percent(best)} at step {plain(step)} to {percent(last)}"
            return f"{fell} at step {plain(held.steps[-1])}, while {grown}"
    losses, training = run.curve("eval/loss"), run.curve("loss")
    first = number(run.before.get("loss"))
    last, where = (
        (losses.values[-1], f" at step {plain(losses.steps[-1])}") if len(losses) else (number(run.after.get("loss")), "")
    )
    if first is None or last is None or last <= first + RISEN * abs(first) or training.end.mean >= training.start.mean:
        return None
    return f"the held-out loss rose from {figure(first)} before training to {figure(last)}{where}, while {grown}"


def noisy_labels(run: Record) -> str | None:
    """Rows that training had not seen are ranked by chance, although the policy has moved."""
    unseen = _unseen(run.curve("accuracy"), run)
    right, rows = unseen.mean * len(unseen.values) * run.batch_size, len(unseen.values) * run.batch_size
    held, comparisons = number(run.after.get("accuracy")), number(run.after.get("comparisons"))
    if held is not None and comparisons:
        right, rows = right + held * comparisons, rows + comparisons
    share, noise = right / rows, 1 / math.sqrt(rows)  # two standard errors at one half
    if rows < FEWEST_UNSEEN or share + noise >= CHANCE or share - noise <= 1 - CHANCE:
        return None
    if not _moved(run) or learning_rate_too_high(run):
        return None
    ahead = figure(max(abs(run.curve(f"log_ratio/{side}").end.mean) for side in ("chosen", "rejected")))
    return (
        f"of {rows:,.0f} comparisons that were not trained on before, {percent(share)} are ranked right "
        f"(95 % interval {percent(share - noise)} to {percent(share + noise)}), with answers moved by {ahead} nats"
    )


def beta_too_small(run: Record) -> str | None:
    """The policy is far from its reference, and the loss still pulls."""
    margin, beta = run.curve("margin"), run.beta
    if not beta or beta * margin.end.mean > SURE or _together(run) or learning_rate_too_high(run):
        return None
    kl, sides = number(run.after.get("kl")), [run.per_token(f"log_ratio/{side}") for side in ("chosen", "rejected")]
    far = max((abs(side.end.mean) for side in sides if len(side)), default=0.0)
    pull = f"while beta * margin is {figure(beta * margin.end.mean)}, so that the loss still pulls"
    if kl is not None and kl > KL_BUDGET:
        return f"the KL from the reference is {figure(kl)} nats per response, {pull}"
    if far > FAR and not run.moving:
        return f"over {margin.end.where} judged answers lie {figure(far)} nats per token from the reference, {pull}"
    return None


def beta_too_large(run: Record) -> str | None:
    """The loss has what it asks for, and the policy has hardly moved."""
    margin, beta, kl = run.curve("margin"), run.beta, number(run.after.get("kl"))
    end = margin.end
    if not beta or beta * end.mean < AGREED or end.mean > HARDLY or (kl is not None and kl > HARDLY):
        return None
    told = f", the KL is {figure(kl)} nats per response" if kl is not None else ""
    return f"over {end.where} beta * margin is {figure(beta * end.mean)}, with a margin of {figure(end.mean)} nats{told}"


def learning_rate_too_high(run: Record) -> str | None:
    """The loss ends above its start, leaps together with the gradient, or the policy leaves all answers at once."""
    loss, norm = run.curve("loss"), run.curve("grad_norm")
    tenth = max(1, len(loss) // 10)
    start, end = loss.part(0, tenth), loss.end
    if len(loss) >= FEWEST and end.mean - start.mean > max(RISEN * abs(start.mean), 2 * math.hypot(start.error, end.error)):
        return f"the training loss went from {figure(start.mean)} ({start.where}) up to {figure(end.mean)} ({end.where})"
    gradients = dict(zip(norm.steps, norm.values, strict=True))
    # a step that was skipped may lack one of the two
    both = [(step, value, gradients[step]) for step, value in zip(loss.steps, loss.values, strict=True) if step in gradients]
    peaks = [
        int(both[n][0])
        for n in range(max(BEHIND // 2, tenth), len(both))
        if both[n][2] > PEAK * median(size for _, _, size in both[max(0, n - BEHIND) : n])
        and both[n][1] > SPIKE * abs(median(value for _, value, _ in both[max(0, n - BEHIND) : n]))
    ]
    if len(peaks) > max(1, len(loss) // 100):
        places = ", ".join(f"{step:,}" for step in peaks[:5]) + (", ..." if len(peaks) > 5 else "")
        behind = f"the median of the {BEHIND} steps before"
        return (
            f"in {count(len(peaks), 'steps')} ({places}) gradient norm and loss leap over {PEAK:g} and {SPIKE:g} times {behind}"
        )
    sides = [run.per_token(f"log_ratio/{side}") for side in ("chosen", "rejected")]
    if all(len(side) >= FEWEST and side.end.mean < -FAR for side in sides) and _together(run):
        lost = " and ".join(figure(-side.end.mean) for side in sides)
        return f"over {sides[0].end.where} chosen and rejected answers lost {lost} nats per token, and hardly parted"
    return None


def learning_rate_too_low(run: Record) -> str | None:
    """Nothing moved."""
    sides, beta = [run.per_token(f"log_ratio/{side}") for side in ("chosen", "rejected")], run.beta
    far = max((abs(side.end.mean) for side in sides if len(side)), default=math.inf)
    if run.moving or far > UNMOVED or (beta and abs(beta * run.curve("margin").end.mean) > 0.1):
        return None
    rate = figure(max(run.curve("learning_rate").values, default=math.nan))
    return f"over {sides[0].end.where} answers moved by {figure(far)} nats per token, at a learning rate of at most {rate}"


def accuracy_stuck(run: Record) -> str | None:
    """Every comparison right, or every one wrong, on rows that training had not seen."""
    unseen, held = _unseen(run.curve("accuracy"), run), number(run.after.get("accuracy"))
    for value in (0.0, 1.0):
        if len(unseen.values) * run.batch_size >= FEWEST_STUCK and set(unseen.values) == {value}:
            return f"accuracy is exactly {percent(value)} over {unseen.where}, on rows that were not trained on before"
        if held == value and (number(run.after.get("comparisons")) or 0) >= FEWEST_STUCK:
            return f"held-out accuracy is exactly {percent(value)} on {plain(run.after['comparisons'])} comparisons"
    return None


def reference_mismatch(run: Record) -> str | None:
    """At step 1, before any update, policy and reference differ."""
    if mapping(run.settings.get("adapter")).get("type") in ("prompt", "prefix"):
        return None  # virtual tokens move the policy from the start, and the run says so
    first = {side: run.per_token(f"log_ratio/{side}") for side in ("chosen", "rejected")}
    found = {side: curve.values[0] for side, curve in first.items() if len(curve) and curve.steps[0] == 1}
    if not found or max(map(abs, found.values())) <= MISMATCH:
        return None
    told = " and ".join(f"{figure(value)} ({side})" for side, value in found.items())
    return f"at step 1, before any update, log-ratios are {told} nats per token, and not 0"


def data_too_easy(run: Record) -> str | None:
    """Comparisons are ranked right before training, or from its beginning on rows that it has not seen."""
    before, rows = number(run.before.get("logp_accuracy")), number(run.before.get("comparisons")) or 0
    if before is not None and before >= EASY and rows >= FEWEST_EASY:
        return f"{percent(before)} of {rows:,.0f} held-out comparisons were ranked right before the first step"
    unseen = _unseen(run.curve("accuracy"), run, after=STARTED)
    rows, held = len(unseen.values) * run.batch_size, number(run.after.get("accuracy"))
    if not unseen.values or rows < FEWEST_EASY or unseen.mean < EASY or (held is not None and held < EASY):
        return None
    if accuracy_stuck(run):  # which says more
        return None
    told = f", and {percent(held)} of those held out" if held is not None else ""
    return f"over {unseen.where} of the first epoch {percent(unseen.mean)} of comparisons were ranked right{told}"


STARTED = 0.2  # of the first epoch: by then easy pairs are learned


def _unseen(accuracy: Curve, run: Record, after: float = 0.5) -> Stretch:
    """The later part of the first epoch: its rows are measured before the only update that has seen them."""
    first = {float(line["step"]) for line in run.lines if int(number(line.get("epoch")) or 0) == 0}
    places = [n for n, step in enumerate(accuracy.steps) if step in first]
    places = places[int(after * len(places)) :]
    return Stretch(tuple(accuracy.steps[n] for n in places), tuple(accuracy.values[n] for n in places))


def _together(run: Record) -> bool:
    """Whether chosen and rejected answers moved alike: then it was not the pull of the pairs that moved them."""
    sides = [run.curve(f"log_ratio/{side}") for side in ("chosen", "rejected")]
    far = max((abs(side.end.mean) for side in sides if len(side)), default=0.0)
    margin = run.curve("margin")
    return far > HARDLY and len(margin) > 0 and abs(margin.end.mean) < PARTED * far


def _moved(run: Record) -> bool:
    """Whether answers moved by a nat, so that chance is a result and no lack of training."""
    sides = [run.curve(f"log_ratio/{side}") for side in ("chosen", "rejected")]
    return any(len(side) and abs(side.end.mean) >= HARDLY for side in sides)
