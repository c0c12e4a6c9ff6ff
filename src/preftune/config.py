"""One resolved run: a YAML file and key=value words, merged, checked and completed from the options each room declares.

No torch, no transformers: every refusal of a key or value answers before anything heavy is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from preftune.config_errors import refusal
from preftune.config_files import expand, merge, new_yaml, parse_word, read_file, said_in, without_nulls
from preftune.data.options import DataOptions, Source
from preftune.errors import Refusal
from preftune.keys import (
    VERB_KEYS,
    CheckKeys,
    DoctorKeys,
    EvaluateKeys,
    GenerateKeys,
    Keys,
    ReferenceOptions,
    ScoreKeys,
    TrainKeys,
)
from preftune.methods.options import MethodOptions, check, check_beta, needs
from preftune.models.options import check_adapter

log = logging.getLogger("preftune")

K = TypeVar("K", bound=Keys)


def resolve(keys: type[K], words: Sequence[str], *, under: str | None = None) -> K:
    """The keys of a verb from its words: at most one YAML file, and key=value; `under` is a file that these change.

    A beta that the method does not read is refused as a word. In a file, which may serve several methods, it is said.
    """
    files = [w for w in words if "=" not in w]
    if len(files) > 1:
        raise Refusal(
            f"one YAML file at most, not {', '.join(files)}; keys are written key=value, without spaces", code="usage"
        )
    layers = [layer for file in (under, *files) if file is not None for layer in _read_files(file, keys)]
    layers += [("", parse_word(w)) for w in words if "=" in w]
    merged: dict[str, Any] = {}
    for _, layer in layers:
        merge(merged, expand(layer))
    try:
        return build(keys, merged)
    except Refusal as error:
        error.file = error.file or said_in(layers, error.key)
        if (error.code, error.key) != ("unused_key", "beta") or not error.file:
            raise
        log.info(f"{error.file}: not used by this method: beta")
        return build(keys, merged | {"beta": None})


def build(keys: type[K], raw: dict[str, Any]) -> K:
    """Checks a nested dict (short forms expanded, nulls left out: their default) against a verb's keys."""
    try:
        return _consistent(keys.model_validate(without_nulls(expand(raw))))
    except ValidationError as error:
        raise refusal(error, _verb_of(keys), {name: list(all_keys(other)) for name, other in VERB_KEYS.items()}) from None


def _consistent(run: K) -> K:
    """Refuses keys that nothing would read, or says them where another verb has a use for them."""
    if isinstance(run, TrainKeys | DoctorKeys):
        check_adapter(run.adapter)
    if isinstance(run, TrainKeys | EvaluateKeys | DoctorKeys | CheckKeys):
        check(run.method)
    if isinstance(run, TrainKeys | EvaluateKeys):
        check_beta(run.method, run.beta)
    if isinstance(run, TrainKeys):
        check_moving(run.reference, run.method)
        if run.train.early_stop and not run.train.eval_every:
            raise Refusal("looks at evaluations: give train.eval_every too", code="unused_key", key="train.early_stop")
        if run.train.kl_budget and not run.train.eval_every:
            raise Refusal("is looked at in evaluations: give train.eval_every too", code="unused_key", key="train.kl_budget")
        _check_weights(run)
    elif any(source.weight for source in _sources(run)):
        log.info("not used: the weights of the sources, which say how a training run draws from them")
    if isinstance(run, ScoreKeys | EvaluateKeys | DoctorKeys):
        other = "model" if isinstance(run, DoctorKeys) else "store"
        unused = [f"reference.{name}" for name in _changed(run.reference, other, "sync_steps", "sync_alpha")]
        unused += _changed(run, "seed") if isinstance(run, ScoreKeys) else []
        if unused:
            log.info(f"not used by {_verb_of(type(run))}: {', '.join(unused)}")
    if isinstance(run, CheckKeys) and run.model is None:
        for name in _changed(run, "dtype", "batch_size", "max_length", "trust_remote_code"):
            raise Refusal("only a model's tokenizer or run reads it: add model=...", code="unused_key", key=name)
    if isinstance(run, CheckKeys) and run.data.votes:
        log.info("not used: data.votes; the check looks at every vote by itself")
    if isinstance(run, GenerateKeys) and run.beams > 1:
        for name in _changed(run, "temperature", "top_k", "top_p"):
            line = f"beam search does not sample: leave {name} away, or beams=1"
            raise Refusal(line, code="unused_key", key=name)
    return run


def _check_weights(run: TrainKeys) -> None:
    """Refuses weights that leave open how much a source counts."""
    for n, source in enumerate(run.eval_data):
        if source.weight is not None:
            line = "held-out data is used as it is: leave the weight out"
            raise Refusal(line, code="unused_key", key=f"eval_data.{n}.weight")
    sources = run.data.sources
    without = [n for n, source in enumerate(sources) if source.weight is None]
    if without and len(without) < len(sources):
        line = f"{sources[without[0]].path} has no weight, and others have: give one to each source, or to none"
        raise Refusal(line, code="missing_key", key=f"data.sources.{without[0]}.weight")
    paths = [str(Path(source.path)) for source in sources]
    if not without and len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        line = f"{twice} stands there twice, with a weight each: name it once"
        raise Refusal(line, code="bad_value", key="data.sources")


def _sources(run: Keys) -> list[Source]:
    """All sources of a verb, of its data and its prompts."""
    found = [getattr(run, name, None) for name in ("data", "prompts")]
    return [source for options in found if isinstance(options, DataOptions) for source in options.sources]


def check_moving(reference: ReferenceOptions, method: MethodOptions) -> None:
    """Refuses keys of a reference that moves where there is none, and those that do not go with it."""
    if not reference.sync_steps:
        if _changed(reference, "sync_alpha"):
            raise Refusal("reference.sync_steps alone reads it", code="unused_key", key="reference.sync_alpha")
        return
    if method.members and not needs(method).reference:
        raise Refusal(f"{method.label} has no reference", code="unused_key", key="reference.sync_steps")
    if reference.model:
        line = "a reference that follows the policy starts as the policy: leave one of the two away"
        raise Refusal(line, code="unused_key", key="reference.model")
    if reference.store not in (None, "off"):
        line = "a reference that follows the policy is scored in every step, and nothing of it is kept: leave one away"
        raise Refusal(line, code="unused_key", key="reference.store")


def _changed(options: BaseModel, *names: str) -> list[str]:
    """Those of the names that are not at their default."""
    return [name for name in names if getattr(options, name) != type(options).model_fields[name].default]


def _verb_of(keys: type[Keys]) -> str:
    return next((verb for verb, other in VERB_KEYS.items() if other is keys), "VERB")


def dump(keys: Keys) -> str:
    """The resolved run as YAML, with absolute paths: what config.yaml holds."""
    import io

    yaml = new_yaml()
    yaml.default_flow_style = False
    text = io.StringIO()
    yaml.dump(saved_values(keys), text)
    return text.getvalue()


def saved_values(keys: Keys) -> dict[str, Any]:
    """What config.yaml holds, before it is YAML."""
    return _absolute(keys.model_dump(mode="json", exclude={"dry_run", "overwrite", "resume"}))


def all_keys(keys: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every key of a verb, dotted, with its description and default."""
    found: dict[str, str] = {}
    for name, field in keys.model_fields.items():
        inner = _model_of(field.annotation)
        found[prefix + name] = (field.description or "") + _default(field.default)
        if inner is not None:
            found |= all_keys(inner, f"{prefix}{name}.")
    return found


# -- files ------------------------------------------------------------------------------------------------------------


def _read_files(name: str, keys: type[Keys]) -> list[tuple[str, dict[str, Any]]]:
    """The file, after the one it names as `base:`. Keys of other verbs may stand in it: one file serves them all, and what
    this verb does not use is said."""
    layer = read_file(name)
    base = layer.pop("base", None)
    layers = [(name, layer)]
    if base is not None:
        if not Path(str(base)).is_file():
            raise Refusal(f"there is no file {base} here", code="missing_file", file=name, key="base")
        under = read_file(str(base))
        if "base" in under:
            raise Refusal("a base file cannot name another base", code="nested_base", file=str(base), key="base")
        layers.insert(0, (str(base), under))
    others = {key for verb in VERB_KEYS.values() for key in verb.model_fields} - set(keys.model_fields)
    for file, one in layers:
        if unused := [key for key, value in one.items() if key in others and value is not None]:
            log.info(f"{file}: not used by {_verb_of(keys)}: {', '.join(unused)}")
    return [(file, {k: v for k, v in one.items() if k not in others}) for file, one in layers]


def _absolute(values: dict[str, Any]) -> dict[str, Any]:
    """Paths that exist become absolute; hub names stay."""

    def path(text: Any) -> Any:
        here = isinstance(text, str) and text not in ("", "plain") and Path(text).exists()
        return str(Path(text).absolute()) if here else text

    result = dict(values)
    for key in ("model", "against"):
        if key in result:
            result[key] = path(result[key])
    if result.get("out"):
        result["out"] = str(Path(result["out"]).absolute())
    if "reference" in result:
        store = result["reference"]["store"]  # a file that need not be there yet
        store = store if store in (None, "off") else str(Path(store).absolute())
        result["reference"] = {**result["reference"], "model": path(result["reference"]["model"]), "store": store}
    for key in ("data", "prompts"):
        if result.get(key):
            sources = [{**s, "path": path(s["path"])} for s in result[key]["sources"]]
            result[key] = {**result[key], "sources": sources, "template": path(result[key]["template"])}
    if "eval_data" in result:
        result["eval_data"] = [{**s, "path": path(s["path"])} for s in result["eval_data"]]
    return result


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return f" [{str(value).lower()}]"
    return f" [{value:g}]" if isinstance(value, int | float) else f" [{value}]" if isinstance(value, str) else ""


def _model_of(annotation: Any) -> type[BaseModel] | None:
    options = getattr(annotation, "__args__", (annotation,))
    if getattr(annotation, "__origin__", None) is list:
        return None
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
