"""Loading and saving: plain models, adapters over a base, and the folders that a run leaves behind."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from preftune.errors import Refusal
from preftune.models.adapters import is_adapter, virtual_tokens
from preftune.models.inspect import QUANTIZED, Facts, check_installed, facts, resolve, stored, stored_types
from preftune.models.quantized import compute_in, is_quantized, note, settings
from preftune.models.weights import copy_sharing, name_of

log = logging.getLogger("preftune")

_PADDING = 1024  # most rows that an embedding is padded with beyond the tokenizer's ids
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them


def device() -> torch.device:
    """CUDA where there is one, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_tokenizer(ref: str, *, key: str = "model", trust_remote_code: bool = False) -> Any:
    path = resolve(ref, key)
    with refusing(ref, "tokenizer", key), quiet(warnings=False):
        known = facts(path, key)
        if known.adapter and not (Path(path) / "tokenizer_config.json").is_file():
            path = base_of(path)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_model(
    ref: str,
    *,
    dtype: torch.dtype = torch.float32,
    key: str = "model",
    trust_remote_code: bool = False,
    quantize: bool = False,
) -> Any:
    """A causal language model in evaluation mode, on the best device. An adapter folder gives its peft model, over a base in 4
    bits where it was trained on one.

    Args:
        dtype: that it computes in.
        quantize: hold the weights of its linear layers in 4 bits.
    """
    path, known = place_of(ref, key)
    if known.classifier:
        line = f"{ref} holds a reward model, which gives a number and writes no text: evaluate data=... takes it"
        raise Refusal(line, code="reward_model", key=key)
    how = {"trust_remote_code": trust_remote_code, "quantize": quantize}
    with refusing(ref, "model", key), quiet():
        model, missing = load_base(AutoModelForCausalLM, path, dtype=dtype, key=key, **how)
        if missing:  # transformers would fill them with random numbers
            line = f"{ref} holds no causal language model: its weights lack {', '.join(missing[:3])}"
            raise Refusal(line, code="incomplete_model", key=key)
        model = with_adapter(model, path, key) if known.adapter else model
    return model.to(device()).eval()


def place_of(ref: str, key: str) -> tuple[str, Facts]:
    """Where a model is, of a folder a place that holds from any working folder, since an adapter notes it; and its facts."""
    path = resolve(ref, key)
    path = str(Path(path).absolute()) if Path(path).is_dir() else path
    return path, facts(path, key)


def load_base(
    kind: Any, path: str, *, dtype: torch.dtype, key: str, trust_remote_code: bool, quantize: bool, **keys: Any
) -> tuple[Any, list[str]]:
    """(model, names of weights that its files lack) of a model, or of the base of an adapter.

    Args:
        kind: a class of transformers that loads models.
        quantize: see `load_model`; what is an adapter over a base in 4 bits is loaded so in any case.
        **keys: of transformers' `from_pretrained`.
    """
    known = facts(path, key)
    keys |= {"trust_remote_code": trust_remote_code, "dtype": dtype}
    if packed := quantize or known.quantized:
        check_installed("adapter.type" if quantize else key)
        keys |= packing(path, trust_remote_code=trust_remote_code)
    loaded: Any = kind.from_pretrained(base_of(path) if known.adapter else path, output_loading_info=True, **keys)
    model, info = loaded
    model = compute_in(model, dtype) if packed else model.to(device())
    return model, sorted(info["missing_keys"])


def with_adapter(model: Any, path: str, key: str) -> Any:
    """The base with the adapter of a folder, of which every tensor has found its place."""
    from peft import PeftModel, get_peft_model_state_dict

    made = PeftModel.from_pretrained(model, path, autocast_adapter_dtype=False)
    wanted, there = set(get_peft_model_state_dict(made, save_embedding_layers=False)), set(stored(Path(path)))
    lost = sorted((wanted - there) | {name for name in there - wanted if ".lora_" in name})
    if there and lost:
        where = "its files lack" if lost[0] in wanted else f"{type(model).__name__} has no place for"
        line = f"{path} is an adapter for another model than its base {model.name_or_path}: {where} {lost[0]}"
        raise Refusal(line, code="other_base", key=key)
    return made


def packing(path: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """How a base is loaded in few bits: packed from the precision that it is stored in, whatever the run computes in, so that
    the same files always give the same weights."""
    folder = Path(path) if (Path(path) / QUANTIZED).is_file() else None
    base = base_of(path) if facts(path, "model").adapter else path
    own = Path(base).is_dir() and facts(base, "model").quantized  # packed when it was saved, and says how itself
    how = {} if own else {"quantization_config": settings(folder)}
    return how | {"dtype": stored_dtype(path, trust_remote_code=trust_remote_code), "device_map": {"": device()}}


def base_of(path: str) -> str:
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise Refusal(f"{path}/adapter_config.json names no base model", code="bad_model_file", key="model")
    return base


def stored_dtype(ref: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The precision that most weights are stored in, those of the base for an adapter; float32 where nothing says it."""
    path = resolve(ref, "model")
    with refusing(ref, "model", "model"), quiet(warnings=False):
        base = base_of(path) if facts(path, "model").adapter else path
        counts = {dtype: count for name, count in stored_types(base).items() if (dtype := _STORED.get(name))}
        if counts:
            return max(counts, key=counts.__getitem__)
        said = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).dtype
    return said if isinstance(said, torch.dtype) else torch.float32


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a folder that transformers loads (peft, for an adapter), aside and then renamed: never half there.

    Args:
        dtype: that the weights are written in; None: as they are.
        state: from `whole_state`, of a model in parts.
    """
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if state is not None:
        state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
    elif is_adapter(model):  # its base stays where it is
        written = [p for p in model.parameters() if p.requires_grad]
        if dtype is not None and any(p.dtype != dtype for p in written):
            model = copy_sharing(model, lambda parameter: not parameter.requires_grad)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.data = parameter.data.to(dtype)
    elif dtype is not None and any(p.dtype != dtype for p in model.parameters()):
        model = copy.deepcopy(model).to(dtype=dtype)  # the whole model: tied weights stay tied, and the config says the dtype
    try:
        with quiet():
            model.save_pretrained(aside, **({} if state is None else {"state_dict": state}))
            if state is not None and dtype is not None and not is_adapter(model):
                _say_precision(aside, dtype)
            if is_adapter(model) and is_quantized(model):
                note(model, aside)
        tokenizer.save_pretrained(aside)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)  # half of it would fill a disk that is full
        raise
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)


def _say_precision(folder: Path, dtype: torch.dtype) -> None:
    """Of a model in parts the config says what its masters are, float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = name_of(dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def max_positions(model: Any) -> int | None:
    """Longest sequence the model has positions for beside an adapter's virtual tokens, where its config says so."""
    limit = _positions(model.config)
    return None if limit is None else limit - virtual_tokens(model)


def _positions(config: Any) -> int | None:
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None


def positions_of(ref: str, *, trust_remote_code: bool = False) -> int | None:
    """The same from the config alone, before the weights are loaded."""
    path = resolve(ref, "model")
    with refusing(ref, "config", "model"), quiet(warnings=False):
        known = facts(path, "model")
        base = base_of(path) if known.adapter else path
        limit = _positions(AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code))
    return None if limit is None else limit - known.virtual


def longest(asked: int | None, positions: int | None, virtual: int = 0) -> int | None:
    """The limit on prompt plus response: what was asked for, within the positions that the model has.

    Args:
        virtual: positions that a new adapter takes.
    """
    if virtual and positions is not None and virtual >= positions - 1:
        line = f"{virtual:,} virtual tokens leave no room in the model's {positions:,} positions"
        raise Refusal(line, code="too_long", key="adapter.tokens")
    left = None if positions is None else positions - virtual
    if asked is not None and left is not None and asked > left:
        which = f", less {virtual:,} virtual tokens" if virtual else ""
        raise Refusal(f"{asked:,} is over the model's {positions:,} positions{which}", code="too_long", key="max_length")
    if virtual and left is not None and asked is None:
        log.info(f"max_length: {left:,}, the model's {positions:,} positions less {virtual:,} virtual tokens")
    return asked or left


def check_tokenizer(model: Any, tokenizer: Any, reference: Any = None) -> None:
    """Refuses a tokenizer with ids that the model has no row for, and a reference with another vocabulary.

    Rows beyond the tokenizer's ids are padding, and models of one family are often padded differently.
    """
    size, needed = _rows(model), max(tokenizer.get_vocab().values()) + 1
    if needed > size:
        raise Refusal(
            f"the tokenizer has ids up to {needed - 1:,} and the model a vocabulary of {size:,}: they do not belong together",
            code="vocabulary_mismatch",
            key="tokenizer",
        )
    other = size if reference is None else _rows(reference)
    if other != size and not all(needed <= rows < needed + _PADDING for rows in (size, other)):
        raise Refusal(
            f"the policy has a vocabulary of {size:,} and the reference one of {other:,}: "
            "log-ratios of their tokens mean nothing",
            code="vocabulary_mismatch",
            key="reference",
        )


def check_same_vocabulary(tokenizer: Any, other: Any) -> None:
    """Refuses a reference whose tokenizer gives any token another id than the policy's does."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        token = next(token for token in [*ours, *theirs] if ours.get(token) != theirs.get(token))
        raise Refusal(
            f"the policy and the reference have different vocabularies ({len(ours):,} and {len(theirs):,} tokens; {token!r} is "
            f"{ours.get(token, 'absent')} in one and {theirs.get(token, 'absent')} in the other): "
            "log-ratios of their tokens mean nothing",
            code="vocabulary_mismatch",
            key="reference",
        )


def _rows(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


@contextmanager
def quiet(*, warnings: bool = True) -> Generator[None]:
    """Progress bars of other libraries hide our own lines; so do their warnings about what we refuse in a line of ours."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    if not warnings:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def refusing(ref: str, what: str, key: str) -> Generator[None]:
    """Turns what the loaders raise for a bad folder or name into one line."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # the loaders raise many kinds, safetensors one of its own
        said = " ".join(str(error).split())[:300] or type(error).__name__
        whose = ref if Path(ref).is_dir() else f"{ref} (no folder here, so a name on the hub)"
        raise Refusal(f"the {what} of {whose} cannot be loaded: {said}", code="cannot_load", key=key) from error
