"""What a model folder says about itself, read from its JSON files: for refusals before anything heavy is imported."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from preftune.errors import Refusal
from preftune.models.options import NO_MERGE, AdapterOptions

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
QUANTIZED = "quantization_config.json"  # in an adapter's folder: how its base was loaded
MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", QUANTIZED, "*.py")  # what it computes with
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of a local folder. `folder` is None for a hub name, of which nothing is known before it is fetched.

    tokens: token -> id, where a tokenizer.json is there. classifier: a sequence classifier, as reward models are. virtual:
    tokens that an adapter puts before every sequence. quantized: the weights, or those of an adapter's base, are held in few
    bits.
    """

    ref: str
    folder: Path | None = None
    adapter: bool = False
    vocab_size: int | None = None
    tokens: dict[str, int] | None = None
    classifier: bool = False
    virtual: int = 0
    quantized: bool = False


def resolve(ref: str, key: str) -> str:
    """A model reference as transformers takes it: a run folder stands for its model/.

    Raises:
        Refusal: a path that is not there, or a folder without a model in it.
    """
    path = Path(ref)
    if path.is_dir():
        if (path / "config.yaml").is_file() and not _is_model(path):
            path = path / "model"
            if not _is_model(path):
                saved = sorted((Path(ref) / "checkpoints").glob("*/"), key=lambda folder: folder.stat().st_mtime)
                hint = f"; its newest checkpoint is {saved[-1]}" if saved else ", and it has no checkpoint"
                raise Refusal(f"{ref} is a run without a finished model{hint}", code="unfinished_run", key=key)
        if not _is_model(path):
            raise Refusal(f"{ref} holds no model (no config.json, no adapter_config.json)", code="no_model", key=key)
        return str(path)
    if path.exists():
        raise Refusal(f"{ref} is a file; a model is a folder or a hub name", code="no_model", key=key)
    parts = ref.split("/")
    here = len(parts) == 2 and Path(parts[0]).is_dir()  # a name in a folder that is here, and no owner on the hub
    if here or len(parts) != 2 or not all(parts) or ref.startswith((".", "~")) or ref.endswith(DATA_SUFFIXES):
        hint = _near(path) or "; a name on the hub is written owner/name"
        raise Refusal(f"there is no folder {ref}{hint}", code="missing_model", key=key)
    return ref


def facts(ref: str, key: str) -> Facts:
    """Reads what can be known of a resolved reference without loading it."""
    folder = Path(ref)
    if not folder.is_dir():
        return Facts(ref)
    if (folder / "adapter_config.json").is_file():
        return _adapter_facts(ref, folder, key)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise Refusal(f"{ref} holds no weights (no .safetensors, no .bin)", code="no_weights", key=key)
    config = _json(folder / "config.json", key)
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    classifier = any("ForSequenceClassification" in name for name in config.get("architectures") or ())
    return Facts(ref, folder, False, size, _tokens(folder, key), classifier, quantized="quantization_config" in config)


def _adapter_facts(ref: str, folder: Path, key: str) -> Facts:
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise Refusal(f"{ref} holds no weights (no adapter_model.safetensors)", code="no_weights", key=key)
    settings = _json(folder / "adapter_config.json", key)
    base = settings.get("base_model_name_or_path") or ""
    if Path(base).is_absolute() and not Path(base).is_dir():
        line = f"{ref} is an adapter for the model in {base}, which is not there: put that folder back, or write where it is "
        raise Refusal(f"{line}into {folder / 'adapter_config.json'}", code="missing_model", key=key)
    known = facts(base, key) if Path(base).is_dir() else Facts(base)
    if known.folder is not None and not known.quantized:
        with suppress(OSError, ValueError, OverflowError):  # a broken file: loading it will say what is wrong
            _check_fits(ref, folder, known.folder, key)
    return replace(
        known,
        ref=ref,
        folder=folder,
        adapter=True,
        tokens=_tokens(folder, key) or known.tokens,
        classifier=settings.get("task_type") == "SEQ_CLS",
        virtual=settings.get("num_virtual_tokens") or 0,
        quantized=known.quantized or (folder / QUANTIZED).is_file(),
    )


def _check_fits(ref: str, folder: Path, base: Path, key: str) -> None:
    """Refuses an adapter for another base model, as far as the headers of the weight files tell."""
    widths: dict[str, set[int]] = {}
    for name, tensor in stored(base).items():
        widths.setdefault(_end(name.removesuffix(".weight")), set()).update(tensor["shape"])
    asked = {  # by factor of a low-rank update: its layer, and how wide that has to be
        name: (_end(name.partition(".lora_")[0]), tensor["shape"][side])
        for name, tensor in stored(folder).items()
        for part, side in ((".lora_A.weight", 1), (".lora_B.weight", 0))
        if name.endswith(part)
    }
    wrong = [name for name, (layer, width) in asked.items() if layer in widths and width not in widths[layer]]
    # the head may be the table of embeddings, and has no weight of its own then
    numbered = [layer for layer, _ in asked.values() if any(part.isdigit() for part in layer.split("."))]
    if wrong:
        layer, width = asked[wrong[0]]
        line = f"{wrong[0]} is for a layer {width} wide, and that is {' x '.join(map(str, sorted(widths[layer])))} there"
    elif widths and numbered and not any(layer in widths for layer in numbered):
        line = f"that has no layer {numbered[0]}"
    else:
        return
    raise Refusal(f"{ref} is an adapter for another model than {base}: {line}", code="other_base", key=key)


def _end(name: str) -> str:
    """What a layer is known by, 7.self_attn.q_proj: how names begin may differ between a file and the model's modules."""
    return ".".join(name.split(".")[-3:])


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """By name the `dtype`, as safetensors says it, and the `shape` of each tensor that the headers of a local folder list."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found |= json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found.pop("__metadata__", None)
    return found


def stored_types(ref: str) -> Counter[str]:
    """How many weights of each type the headers of a local folder list."""
    found: Counter[str] = Counter()
    for tensor in stored(Path(ref)).values():
        found[tensor["dtype"]] += math.prod(tensor["shape"])
    return found


def check_installed(key: str) -> None:
    if find_spec("bitsandbytes") is None:
        line = "weights in 4 bits need bitsandbytes: pip install 'preftune[qlora]'"
        raise Refusal(line, code="missing_package", key=key)


def check_adapter_of(model: Facts, adapter: AdapterOptions) -> None:
    """Refuses what cannot be trained of this model: an adapter upon an adapter, weights in few bits."""
    if model.adapter and adapter.type != "none":
        line = "the model is an adapter already, and training goes on with it: leave adapter away, or fold it in first (merge)"
        raise Refusal(line, code="two_adapters", key="adapter")
    if adapter.merge and adapter.type == "none" and not model.adapter:
        line = "there is no adapter to merge: adapter=lora trains one"
        raise Refusal(line, code="no_adapter", key="adapter.merge")
    if adapter.merge and model.virtual:
        raise Refusal(NO_MERGE, code="cannot_merge", key="adapter.merge")
    if model.quantized and not model.adapter and adapter.type == "none":
        line = "weights in few bits cannot be trained: adapter=qlora trains an adapter over them"
        raise Refusal(line, code="quantized", key="adapter.type")
    if model.quantized or adapter.type == "qlora":
        check_installed("adapter.type")


def check_vocabulary(policy: Facts, reference: Facts | None = None) -> None:
    """Refuses a model without tokenizer, a tokenizer with ids that the model has no row for, and a reference that reads
    other tokens."""
    if policy.folder and not policy.adapter and not any((policy.folder / name).is_file() for name in TOKENIZER_FILES):
        raise Refusal(f"{policy.ref} holds no tokenizer (no tokenizer.json)", code="no_tokenizer", key="model")
    if policy.tokens and policy.vocab_size and max(policy.tokens.values()) >= policy.vocab_size:
        raise Refusal(
            f"the tokenizer in {policy.ref} has ids up to {max(policy.tokens.values()):,}, and its model a vocabulary of "
            f"{policy.vocab_size:,}: they do not belong together",
            code="vocabulary_mismatch",
            key="model",
        )
    if reference is None:
        return
    if policy.tokens is not None and reference.tokens is not None:
        same = policy.tokens == reference.tokens
    else:
        same = None in (policy.vocab_size, reference.vocab_size) or policy.vocab_size == reference.vocab_size
    if not same:
        raise Refusal(
            f"the policy {policy.ref} and the reference {reference.ref} have different vocabularies "
            f"({_difference(policy, reference)}): log-ratios of their tokens mean nothing",
            code="vocabulary_mismatch",
            key="reference",
        )


def _difference(policy: Facts, reference: Facts) -> str:
    ours, theirs = policy.tokens, reference.tokens
    if ours is None or theirs is None or len(ours) != len(theirs):
        sizes = [len(known.tokens) if known.tokens is not None else known.vocab_size for known in (policy, reference)]
        return f"{sizes[0]:,} and {sizes[1]:,} tokens"
    token = next(token for token in ours if ours[token] != theirs.get(token))
    return f"token {token!r} is {ours[token]} in one and {theirs.get(token, 'absent')} in the other"


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _tokens(folder: Path, key: str) -> dict[str, int] | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    data = _json(folder / "tokenizer.json", key)
    if not isinstance(data.get("model"), dict):
        raise Refusal("is no tokenizer: it has no model", code="bad_model_file", file=str(folder / "tokenizer.json"), key=key)
    vocab = data["model"].get("vocab") or {}
    if isinstance(vocab, list):  # unigram models list [piece, score]
        vocab = {piece[0]: n for n, piece in enumerate(vocab)}
    return {**vocab, **{token["content"]: token["id"] for token in data.get("added_tokens", [])}}


def _json(path: Path, key: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"cannot be read as JSON: {error}", code="bad_model_file", file=str(path), key=key) from error
    if not isinstance(found, dict):
        raise Refusal("is no JSON object", code="bad_model_file", file=str(path), key=key)
    return cast("dict[str, Any]", found)


def _near(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return f", nor a folder {path.parent}"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f". Did you mean {path.parent / close[0]}?" if close else ""
