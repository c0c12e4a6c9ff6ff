"""What a run takes: memory and time, estimated in one place for dry runs, `doctor`, and the default of the token budget."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preftune import processes
from preftune.data.render import Batch, Rendered
from preftune.models.adapters import inside, virtual_tokens
from preftune.models.load import max_positions
from preftune.models.weights import count, frozen_bytes
from preftune.scoring.backbone import backbone
from preftune.scoring.plan import answer_tokens
from preftune.scoring.product import KEPT
from preftune.scoring.score import default_budget
from preftune.training.method import Example
from preftune.training.optimizers import state_bytes
from preftune.training.options import Optimizer

log = logging.getLogger("preftune")

LARGEST, SMALLEST = 16_384, 256  # tokens of a micro-batch: more makes no step faster, fewer makes it slower than it need be
SHARE = 0.8  # of the free memory that activations may take: the allocator's gaps, and what other programs do meanwhile
# bytes: three blocks of float32 logits on a GPU. On the CPU two, smaller where the vocabulary is; there it is what is imported
# on the way as well, and what glibc keeps without using it again
BESIDE = 3 * 2**27
# what all layers keep for the backward pass, the temporary tensors of one of them there, and the allocator's gaps
PASSING = 1.2
EFFICIENCY = 0.5  # of the rate of one matrix product that a whole step reaches
_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one run, on one device.

    parameters, trained: of the model. fixed_bytes: weights, gradients and the optimizer's state. late_bytes: of these, the
    gradients that are made while the backward pass frees activations: all but the head's. token_bytes: activations per token of
    a micro-batch; None: they could not be counted. operations: per token of a training step, with a reference's forward pass
    where there is one. usual: the token budget where nothing says how much memory there is. scored_bytes: per scored token, of
    the softmax that a trained head keeps.
    """

    parameters: int
    trained: int
    fixed_bytes: int
    late_bytes: int
    token_bytes: int | None
    operations: float
    usual: int
    scored_bytes: int

    @classmethod
    def of(
        cls,
        model: Any,
        dtype: torch.dtype,
        *,
        best: bool,
        reference: bool,
        moving: bool = False,
        checkpointing: bool = False,
        optimizer: Optimizer = "adamw",
        parts: int = 1,
    ) -> Estimate:
        """Of a model that is loaded, or that only has its structure (on the meta device).

        Args:
            best: whether the weights of the best evaluation are kept beside the last.
            reference: whether the method scores a reference. moving: whether that is a copy which follows the policy.
            checkpointing: whether layers keep their input alone, and are computed again.
            parts: processes that weights, gradients and state are shared out among; what is gathered of them for the time of a
                layer is not counted.
        """
        total = sum(count(p) for p in model.parameters())
        training = [p for p in model.parameters() if p.requires_grad]
        trained, state = sum(map(count, training)), sum(state_bytes(optimizer, p.shape) for p in training)
        head = model.get_output_embeddings()
        first = sum(count(p) for p in head.parameters() if p.requires_grad) if head is not None else 0
        weight = getattr(head, "weight", None)
        frozen = sum(frozen_bytes(p, dtype) for p in model.parameters() if not p.requires_grad)
        # multiply and add, forward; twice that backward, half of it where frozen weights take no gradient of their own
        passes = 1 + (2 if trained == total else 1) + reference + checkpointing
        usual, token_bytes = default_budget(model), None
        try:
            token_bytes = int(PASSING * kept_bytes(model, dtype))
            if checkpointing:  # one layer's at a time with their gradients, and the input of each
                text = model.config.get_text_config()
                inputs = text.hidden_size * dtype.itemsize * text.num_hidden_layers
                token_bytes = min(token_bytes, 2 * token_bytes // text.num_hidden_layers + inputs)
        except Exception as error:  # a model's own code, called in a way that only counting needs
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            log.warning(f"memory per token is not known, {type(model).__name__} fails where it is counted ({said})")
        return cls(
            parameters=total,
            trained=trained,
            late_bytes=0 if checkpointing else math.ceil(4 * (trained - first) / parts),
            fixed_bytes=math.ceil((frozen + state + trained_bytes(trained, dtype, best=best, moving=moving)) / parts),
            token_bytes=token_bytes,
            operations=2.0 * _multiplied(model) * passes,
            usual=usual,
            scored_bytes=4 * len(weight) if weight is not None and weight.requires_grad and not checkpointing else 0,
        )

    def seconds(self, tokens: int, rate: float) -> float:
        """For so many tokens of training steps, at the `matrix_rate` of a machine."""
        return tokens * self.operations / (EFFICIENCY * rate)

    def peak_bytes(self, budget: int, sizes: Iterable[int], largest: int) -> int | None:
        """With micro-batches of at most `budget` tokens, about equal ones of each step, of steps of so many tokens; an example
        of more, up to `largest` tokens, cannot be cut. In a step's only micro-batch there is no gradient yet when the
        activations are most."""
        each = self.token_bytes
        if each is None:
            return None

        def passing(size: int) -> int:
            passes = math.ceil(size / budget)
            longest = max(math.ceil(size / passes), min(size, largest))
            kept = each * longest + min(self.scored_bytes * longest, 4 * KEPT)
            return kept - min(self.late_bytes, kept) * (passes == 1)

        return self.fixed_bytes + max(map(passing, sizes)) + BESIDE

    def tokens(self, free: int | None) -> int:
        """The token budget for so much memory, of which nothing is taken yet: a multiple of 256, at most 16,384."""
        if free is None or self.token_bytes is None:
            return self.usual
        kept = 4 * KEPT if self.scored_bytes else 0
        fitting = int((SHARE * (free - self.fixed_bytes) - BESIDE - kept) / max(1, self.token_bytes))
        return max(SMALLEST, min(LARGEST, fitting // SMALLEST * SMALLEST))


def trained_bytes(trained: int, dtype: torch.dtype, *, best: bool, moving: bool = False) -> int:
    """Bytes that are there for the whole run for what trains, besides the optimizer's state: its weights, their gradient in
    float32, and in bfloat16 the copy that computes; where the best weights are kept, or a reference moves, these too."""
    copy = 0 if dtype.itemsize == 4 else dtype.itemsize
    return trained * (4 + 4 + copy + 4 * best + (4 + copy) * moving)


def kept_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes per token that the backbone keeps for its backward pass, in the precision that computes: what autograd saves in a
    forward pass of a few tokens. On the meta device nothing is computed for it."""
    inner = inside(model)
    own = next(inner.parameters()).dtype
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}  # with the tensor: a storage that is freed gives its place to the next

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            size = storage.nbytes() * (dtype.itemsize / own.itemsize if tensor.dtype == own else 1)
            kept[storage._cdata] = (int(size), tensor)
        return tensor

    vocabulary, length = inner.get_input_embeddings().weight.shape[0], min(_TOKENS, max_positions(inner) or _TOKENS)
    ids = torch.tensor([[n % vocabulary for n in range(length)]], device=next(inner.parameters()).device)

    def counted(**mask: Tensor) -> int:
        kept.clear()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            given = {"input_ids": ids}
            if virtual_tokens(model):  # where nothing of the backbone trains, its inputs have the first gradient
                given = {"inputs_embeds": inner.get_input_embeddings()(ids).detach().requires_grad_()}
            result = (backbone(inner) or inner)(**given, use_cache=False, **mask)
            total = sum(size for size, _ in kept.values())
        del result
        return total // length

    if ids.is_meta:
        # most models look into a mask that is not made already (four dimensions), which nothing can here; some take no such
        ready = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).tril()
        for mask in (ready, torch.ones_like(ids)):
            with suppress(Exception):  # whatever a model's own code says of it
                return counted(attention_mask=mask)
    return counted()


def _multiplied(model: nn.Module) -> int:
    """Parameters that are multiplied with every token: all but tables of embeddings, and the head though it be one of them."""
    inner: Any = model
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    head, table = (getattr(m, "weight", None) for m in (inner.get_output_embeddings(), inner.get_input_embeddings()))
    tied = head.numel() if head is not None and head is table else 0
    return sum(count(p) for p in model.parameters()) - tables + tied


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one square matrix product, the best of a few."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, started = float("inf"), time.perf_counter()
    for _ in range(5):
        began = time.perf_counter()
        float((a @ b)[0, 0])  # waits for an accelerator
        best = min(best, time.perf_counter() - began)
        if time.perf_counter() - started > 1:  # a precision that the processor emulates
            break
    return 2 * size**3 / best


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process can still take, of a run's processes on one CPU each an equal share; None where it cannot be
    asked."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = min((free for free in (_available(), _left_in_group()) if free is not None), default=None)
    return None if free is None else free // processes.on_this_machine()


def _available(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_group(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the tightest limit leaves of the control groups that this process is in: a container's, a batch job's, a service's.

    Args:
        root: where the groups are mounted, those of version 1 in a folder of their controller.
        membership: a line `number:controllers:path` for each hierarchy; version 2 names no controllers.
    """
    folders = {root: _V2, root / "memory": _V1}  # in a container its own group is mounted here, whatever its path says
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top, files = (root, _V2) if not controllers else (root / "memory", _V1)
            if not controllers or "memory" in controllers.split(","):
                own = top.joinpath(*(part for part in Path(path).parts if part not in ("/", "..")))
                folders |= {folder: files for folder in (own, *own.parents) if folder.is_relative_to(top)}
    return min((left for folder, files in folders.items() if (left := _left(folder, *files)) is not None), default=None)


# limit, use, and what can go of it: cached files
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_NO_LIMIT = 2**60  # version 1 has no word for it, but a number near 2^63


def _left(folder: Path, limit: str, use: str, cached: str) -> int | None:
    """Bytes that one group may still take; None: it has no limit, or is not there."""
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, use))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return most - used + int(counts.get(cached, 0)) if most < _NO_LIMIT else None
    except (OSError, ValueError):  # "max" is version 2's word for no limit
        return None


def step_tokens(sequences: Sequence[Rendered], rows: Sequence[int], *, shares: bool, before: int = 0) -> int:
    """Tokens of a step of these rows: a group's prompt once, or with every row. `before`: virtual tokens."""
    if shares:
        return pass_tokens(sequences, rows, shares=True, before=before)
    return sum(before + len(sequences[row].ids) for row in rows)


def largest_example(batch: Batch, examples: Iterable[Example], *, shares: bool, before: int = 0) -> int:
    """Tokens of the largest example: no micro-batch can be cut below it. `before`: see `pass_tokens`."""
    rows = ([batch.index(e.group, r) for r in e.read] for e in examples)
    return max(pass_tokens(batch.sequences, own, shares=shares, before=before) for own in rows)


def pass_tokens(sequences: Sequence[Rendered], rows: Sequence[int], *, shares: bool, before: int = 0) -> int:
    """Tokens of the micro-batch of these rows: a group's prompt once, or every row padded to the longest. `before`: virtual
    tokens, once, or in front of every row."""
    if not shares:
        return len(rows) * (before + max(len(sequences[row].ids) for row in rows))
    starts = {sequences[row].group: sequences[row].start for row in rows}
    return before + sum(starts.values()) + answer_tokens(sequences, rows)
