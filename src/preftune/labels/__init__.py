"""Labels: the votes of several annotators on one pair become a probability, and a word on how far people agree.

votes = labels.votes_of(preftune.read("votes.csv"))
print(labels.summarised(votes))                      # how many, Krippendorff's alpha, annotators to look at
groups = labels.merged(groups, "bradley_terry")      # a soft Comparison for each pair that several people judged
"""

from __future__ import annotations

from preftune.labels.agreement import Agreement, Estimate, agreement, cohen_kappa, fleiss_kappa, krippendorff_alpha, pair_tables
from preftune.labels.annotators import Contested, Suspect, contested, to_look_at
from preftune.labels.bradley_terry import BradleyTerry, Prior, bradley_terry
from preftune.labels.comparisons import METHODS, Label, labelled, merged, votes_of
from preftune.labels.dawid_skene import DawidSkene, dawid_skene
from preftune.labels.labels import Labels, majority
from preftune.labels.summary import Summary, summarised
from preftune.labels.votes import Votes

__all__ = [
    "METHODS",
    "Agreement",
    "BradleyTerry",
    "Contested",
    "DawidSkene",
    "Estimate",
    "Label",
    "Labels",
    "Prior",
    "Summary",
    "Suspect",
    "Votes",
    "agreement",
    "bradley_terry",
    "cohen_kappa",
    "contested",
    "dawid_skene",
    "fleiss_kappa",
    "krippendorff_alpha",
    "labelled",
    "majority",
    "merged",
    "pair_tables",
    "summarised",
    "to_look_at",
    "votes_of",
]
