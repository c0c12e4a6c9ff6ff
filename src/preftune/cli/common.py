"""What verbs that score data share: data read and rendered, every refusal before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.models.inspect import check_vocabulary, facts, resolve
from preftune.runs import folder as files
from preftune.runs.prepare import load_said

if TYPE_CHECKING:
    import torch

    from preftune.data.options import DataOptions, ScoredOptions
    from preftune.data.render import Batch
    from preftune.keys import DoctorKeys, EvaluateKeys, ScoreKeys
    from preftune.records import Group


def output_file(out: str, words: Iterable[str], options: DataOptions, *, overwrite: bool, **models: str | None) -> Path:
    """The file that a verb writes. Refuses one that it reads, whatever `overwrite` says: its files among the words, its data,
    their template, and its models by key."""
    read = [word for word in words if "=" not in word]
    read += [*(source.path for source in options.sources), *([options.template] if options.template else [])]
    read += [resolve(ref, key) for key, ref in models.items() if ref]
    files.check_file_apart(Path(out), read)
    return files.choose_file(out, overwrite=overwrite)


@dataclass
class Opened:
    """Rendered data, the names of its files, its tokenizer, and the models that are loaded when they are asked for."""

    batch: Batch
    files: list[str]
    tokenizer: Any
    refs: tuple[str, str | None]
    keys: DoctorKeys | EvaluateKeys | ScoreKeys

    def models(self, dtype: torch.dtype | None = None, load: Callable[..., Any] | None = None) -> tuple[Any, Any]:
        """(policy, reference or None), in the precision that the keys ask for, else in this one, else in float32.

        load: of the policy; None: `load_model`, which takes language models.
        """
        from preftune.models.load import check_tokenizer, load_model
        from preftune.training.precision import DTYPES

        dtype = DTYPES[self.keys.dtype] if self.keys.dtype else dtype or DTYPES["float32"]
        trust = self.keys.trust_remote_code
        ref, other = self.refs
        reference = load_model(other, dtype=dtype, key="reference", trust_remote_code=trust) if other else None
        policy = (load or load_model)(ref, dtype=dtype, trust_remote_code=trust)
        check_tokenizer(policy, self.tokenizer, reference)
        return policy, reference


def open_data(
    model: str,
    options: ScoredOptions,
    keys: DoctorKeys | EvaluateKeys | ScoreKeys,
    *,
    reference: str | None,
    check: Callable[[list[Group]], object] = lambda groups: None,
    virtual: int = 0,
) -> Opened:
    """Checks the models' files, reads, checks and renders the data; drops are said, and counted by the contract's rule.

    Args:
        virtual: positions that a new adapter takes.
    """
    refs = resolve(model, "model"), resolve(reference, "reference") if reference else None
    check_vocabulary(facts(refs[0], "model"), facts(refs[1], "reference") if refs[1] else None)
    reading = load_said(options.sources, options)
    check(reading.groups)
    from preftune.data.read import by_row, enforce, say_drops
    from preftune.data.render import render
    from preftune.models.load import check_same_vocabulary, load_tokenizer, longest, positions_of

    trust = keys.trust_remote_code
    tokenizer = load_tokenizer(refs[0], trust_remote_code=trust)
    if refs[1] and not Path(refs[1]).is_dir():  # of a folder the files told it already
        check_same_vocabulary(tokenizer, load_tokenizer(refs[1], key="reference", trust_remote_code=trust))
    limit = longest(keys.max_length, positions_of(refs[0], trust_remote_code=trust), virtual)
    batch = render(reading.groups, tokenizer, max_length=limit, too_long=options.too_long, template=options.template)
    enforce(
        reading.rows,
        reading.dropped + by_row(batch.findings),
        [*reading.findings, *batch.findings],
        strict=options.strict,
        allow_drops=options.allow_drops,
    )
    say_drops(batch.findings)
    return Opened(batch, [source["path"] for source in reading.sources], tokenizer, refs, keys)
