"""What is wrong with a key or a value, in one line: the nearest key, the kind that is wanted, what else is missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from preftune.data.options import Source
from preftune.errors import Refusal, nearest
from preftune.methods.options import ConstraintOptions

_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "finite_number": "a finite number",
    "dict_type": "keys and values",
    "model_type": "keys and values",
}

# what other tools call our keys
ELSEWHERE = {
    "lr": "learning_rate",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size (one number for the whole step)",
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset": "data",
    "dataset_name": "data",
    "datasets": "data",
    "output_dir": "out",
    "ref_model": "reference",
    "sync_ref_model": "reference.sync_steps",
    "ref_model_sync_steps": "reference.sync_steps",
    "ref_model_mixup_alpha": "reference.sync_alpha",
    "pref_beta": "beta",
    "loss_type": "method",
    "pref_loss": "method",
    "stage": "method",
    "loss_weights": "method.mix",
    "pref_ftx": "method.mix",
    "label_smoothing": "method.noise",
    "dpo_label_smoothing": "method.noise",
    "f_divergence_type": "method.divergence",
    "f_alpha_divergence_coef": "method.divergence_alpha",
    "use_weighting": "method.weighting=wpo",
    "ld_alpha": "method.alpha",
    "discopop_tau": "method.temperature",
    "simpo_gamma": "method.gamma",
    "kto_chosen_weight": "method.desirable_weight",
    "kto_rejected_weight": "method.undesirable_weight",
    "finetuning_type": "adapter",
    "use_peft": "adapter=lora",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "use_rslora": "adapter.rslora",
    "use_dora": "adapter=dora",
    "load_in_4bit": "adapter=qlora",
    "quantization_bit": "adapter=qlora",
    "num_virtual_tokens": "adapter.tokens",
    "prompt_tuning_init_text": "adapter.text",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_prompt_length": "max_length (prompt plus response)",
    "bf16": "dtype",
    "torch_dtype": "dtype",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "warmup_ratio": "train.warmup",
    "lr_scheduler_type": "train.schedule",
    "report_to": "train.trackers",
    "optim": "train.optimizer",
    "eval_dataset": "eval_data",
    "val_size": "eval_data",
}


def refusal(error: ValidationError, verb: str, keys: Mapping[str, Sequence[str]]) -> Refusal:
    """The first thing wrong, and what else; `keys` holds every verb's keys, dotted."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key, value = ".".join(str(part) for part in first["loc"]), first["input"]
    missing = [f"{'.'.join(map(str, p['loc']))}=..." for p in problems if p["type"] == "missing" and p is not first]
    others = len(problems) - 1 - len(missing)
    more = f" (also needed: {', '.join(missing)})" if missing else ""
    more += f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return Refusal(f"unknown key.{_hint(first['loc'], verb, keys)}{more}", code="unknown_key", key=key)
    if first["type"] == "missing":
        return Refusal(f"is needed: {key}=...{more}", code="missing_key", key=key)
    if first["type"] in _WORDS:
        wanted = _WORDS[first["type"]]
        how = {"a list": f": write {key}=[{value}]", "text": f": put text in quotes, {key}='\"...\"'"}.get(wanted, "")
        return Refusal(f"should be {wanted}, not {value!r}{how}{more}", code="wrong_type", key=key)
    if first["type"] == "too_short":
        return Refusal(f"should hold at least one value{more}", code="bad_value", key=key)
    if first["type"] == "bad_filter":
        return Refusal(f"{first['msg']}{more}", code="bad_filter", key=key)
    message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    close = nearest(str(value), re.findall("'(.*?)'", message)) if first["type"] == "literal_error" else ""
    return Refusal(f"{message}, not {value!r}{'.' if close else ''}{close}{more}", code="bad_value", key=key)


def _hint(loc: tuple[int | str, ...], verb: str, keys: Mapping[str, Sequence[str]]) -> str:
    """Which known key an unknown one may stand for."""
    key, group, last = ".".join(map(str, loc)), ".".join(map(str, loc[:-1])), str(loc[-1])
    known = keys.get(verb, ())
    beside = [n.rpartition(".")[2] for n in known if n.rpartition(".")[0] == group]
    if any(isinstance(part, int) for part in loc):
        beside = list(Source.model_fields)
    elif loc[:2] == ("method", "constraints"):
        beside = list(ConstraintOptions.model_fields)
    if not group and ELSEWHERE.get(last, "").split("=")[0].split(" ")[0] in known:
        return f" Here that is {ELSEWHERE[last]}."
    close = nearest(last, beside)
    if verbs := [other for other, names in keys.items() if key in names]:
        return f" It is a key of {', '.join(verbs)}.{close}"
    if close:
        return close.replace("mean ", f"mean {group}.") if group else close
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return f" Did you mean {same[0]}?"
    if beside and group:
        return f" Known: {', '.join(beside)}."
    return nearest(key, known) or f" preftune {verb} --help lists the keys."
