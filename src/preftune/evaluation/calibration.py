"""How far stated probabilities are to be believed: log-loss, Brier score, calibration error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 10


def calibration(margin: Tensor, preference: Tensor, *, bins: int = BINS) -> dict[str, Any]:
    """Of a model that says P(a over b) = sigmoid(margin), against labels that say p.

    log_loss  mean of -p log P - (1 - p) log(1 - P), nats; ln 2 = 0.693 says nothing at all
    brier     mean of (P - p)^2; 0.25 says nothing at all
    ece       expected calibration error: the mean, weighted by how many there are, of |accuracy - confidence| over bins of the
              confidence max(P, 1 - P), of equal width between 0.5 and 1 (Guo et al. 2017, arXiv 1706.04599, equation 3).
              Of a tie the accuracy is one half

    Args:
        margin: [P] nats.
        preference: [P] in [0, 1].

    Returns:
        `log_loss, brier, ece`, and `calibration`: of each bin that is not empty its mean confidence, accuracy and count. {} for
        no pairs.

    Example:
        >>> import torch
        >>> found = calibration(torch.tensor([2.0, 2.0, -2.0, 2.0]), torch.ones(4))
        >>> round(found["ece"], 4), found["calibration"][0]["count"]  # 0.88 sure of each, and right in three of four
        (0.1308, 4)
    """
    if not len(margin):
        return {}
    margin, preference = margin.double(), preference.double()
    said = torch.sigmoid(margin)
    confidence = torch.maximum(said, 1 - said)
    right = torch.where(margin > 0, preference, torch.where(margin < 0, 1 - preference, 0.5))
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins).double()
    means = [torch.bincount(place, weights=values, minlength=bins) / count.clamp(min=1) for values in (confidence, right)]
    table = [
        {"confidence": float(sure), "accuracy": float(share), "count": int(number)}
        for sure, share, number in zip(*means, count, strict=True)
        if number
    ]
    return {
        "log_loss": float(-(preference * F.logsigmoid(margin) + (1 - preference) * F.logsigmoid(-margin)).mean()),
        "brier": float((said - preference).square().mean()),
        "ece": sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(margin),
        "calibration": table,
    }
