"""The shortest beginning that some answers share and that is worth a node of its own in the trie.

    python benchmarks/split.py --dtypes float32 bfloat16

Under each of some prompts K answers begin with the same N tokens, and one more answer does not: split, these N tokens stand
once, in a node that costs calls of attention; duplicated, they stand K times. Timed is forward and backward of the layers, the
two in turn. What splitting saves is fitted by slope * N - cost; printed is the N from which on it saves, cost / slope.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import common
import rows

PROMPT, TAIL = 80, 24  # tokens: of a prompt, and of an answer after what it may share
WARM = 1


def sequences(shared: int, answers: int, groups: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Of each prompt: `answers` that begin alike, and one more. Tokens below 100 stand where sequences part."""
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(100, vocabulary) for _ in range(count))

    found: list[tuple[int, ...]] = []
    for group in range(groups):
        prompt, alike = (group, *tokens(PROMPT - 1)), tokens(shared)
        found += [(*prompt, *alike, first, *tokens(TAIL - 1)) for first in range(answers)]
        found.append((*prompt, answers, *tokens(TAIL - 1)))
    return found


def seconds(model: Any, trie: Any, device: Any) -> float:
    """Of one forward and backward of the layers."""
    from preftune.scoring.backbone import along
    from preftune.scoring.layout import Layout

    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    along(model, Layout.of(trie, device, model.dtype)).float().square().mean().backward()
    return time.perf_counter() - began


def saved(model: Any, shared: int, answers: int, groups: int, repeats: int) -> dict[str, Any]:
    """Medians of both ways, in turn."""
    from preftune.scoring.trie import grow

    rows_of = sequences(shared, answers, groups, model.config.vocab_size)
    split, twice = grow(rows_of, 1), grow(rows_of, shared + 1)
    assert len(split.nodes) == len(twice.nodes) + groups
    assert len(twice.ids) == len(split.ids) + groups * (answers - 1) * shared
    times = [[seconds(model, trie, model.device) for trie in (split, twice)] for _ in range(WARM + repeats)][WARM:]
    alone, both = (statistics.median(column) for column in zip(*times, strict=True))
    return {"shared": shared, "split": alone, "duplicated": both, "saved": both - alone}


def break_even(found: list[dict[str, Any]]) -> float:
    """Least squares of saved = slope * shared - cost, and its zero."""
    line = statistics.linear_regression([each["shared"] for each in found], [each["saved"] for each in found])
    return -line.intercept / line.slope


def main() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from preftune.models.weights import cast_parameters
    from preftune.training.memory import keep_freed_memory
    from preftune.training.precision import DTYPES

    parser = common.arguments(__doc__, data=False)
    parser.add_argument("--dtypes", nargs="+", default=common.DTYPES, choices=common.DTYPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="N")
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 4], help="K")
    parser.add_argument("--groups", type=int, default=4, help="prompts")
    parser.add_argument("--repeats", type=int, default=3)
    words = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(rows.SHAPE | words.shape)))
    result: list[dict[str, Any]] = []
    for dtype in words.dtypes:
        cast_parameters(model, DTYPES[dtype])
        for answers in words.answers:
            found = [saved(model, n, answers, words.groups, words.repeats) for n in words.lengths]
            least = break_even(found)
            print(f"{dtype}, {answers} answers: worth it from {least:.1f} tokens on; saved ms by tokens:", end=" ", flush=True)
            print(*(f"{each['shared']}: {each['saved'] * 1e3:.0f}" for each in found), sep=", ", flush=True)
            result.append({"dtype": dtype, "answers": answers, "break_even": least, "measured": found})
    common.write(words, "split", {"prompt": PROMPT, "tail": TAIL, "cases": result})


if __name__ == "__main__":
    main()
