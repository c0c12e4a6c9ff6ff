"""YAML files and key=value words as nested dicts, short forms made long: what `config` then checks."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

from preftune.errors import Refusal

# the key that a group's short form sets: data=D is data.sources=[D]
MAIN_KEYS = {"data": "sources", "prompts": "sources", "method": "name", "reference": "model", "adapter": "type"}
_SOURCE_ONLY = {"path", "split", "format", "limit", "columns", "filter", "weight"}


def parse_word(word: str) -> dict[str, Any]:
    """'train.eval_every=50' -> {'train': {'eval_every': 50}}; the text after = is YAML 1.2."""
    key, _, text = word.partition("=")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        known = re.fullmatch(r"-*[A-Za-z_][\w-]*(\.[\w-]+)*", key)
        hint = f"; write {key.lstrip('-').replace('-', '_')}=..." if known else ""
        raise Refusal(f"{word!r} is neither a YAML file nor key=value{hint}", code="usage")
    try:
        value = plain(new_yaml().load(text))
    except Exception as error:  # ruamel has a tree of errors; each is a user's text that is not YAML
        raise Refusal(
            f"{text!r} is not a YAML value; put text with special characters in quotes: {key}='\"...\"'",
            code="bad_value",
            key=key,
        ) from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def new_yaml() -> Any:
    """A reader and writer of YAML 1.2."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True)


def read_file(name: str) -> dict[str, Any]:
    """The keys of one YAML file."""
    path = Path(name)
    if not path.is_file():
        raise Refusal(_no_run_file(path), code="missing_file", file=name)
    try:
        content = plain(new_yaml().load(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise Refusal(f"is not UTF-8 at byte {error.start:,}: save it as UTF-8", code="not_utf8", file=name) from error
    except OSError as error:
        raise Refusal(f"cannot be read: {error.strerror}", code="unreadable", file=name) from error
    except Exception as error:  # see parse_word
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise Refusal(f"is not YAML: {problem}", code="bad_yaml", file=name, row=mark.line + 1 if mark else None) from error
    if not isinstance(content, dict):
        raise Refusal("holds no keys; write 'key: value' lines", code="bad_yaml", file=name)
    return content


def _no_run_file(path: Path) -> str:
    if (path / "config.yaml").is_file():
        return f"is a folder; its settings stand in {path / 'config.yaml'}"
    what = "is a folder" if path.is_dir() else "there is no such file"
    return f"{what}; here stands a YAML file with the keys of a run, everything else is key=value (model=..., data=...)"


def said_in(layers: list[tuple[str, dict[str, Any]]], key: str | None) -> str | None:
    """The file whose layer set the key last; None for a word of the command line, and for what nobody set."""
    for file, layer in reversed(layers):
        found: Any = expand(layer)
        for part in (key or "").split("."):
            if not isinstance(found, dict) or part not in found:
                break
            found = found[part]
            if not isinstance(found, dict):
                return file or None
        else:
            return file or None
    return None


def plain(value: Any) -> Any:
    """YAML reads 2026-01-31 as a date; here it is a name."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.isoformat() if isinstance(value, datetime.date) else value


def expand(layer: dict[str, Any]) -> dict[str, Any]:
    """Short forms in their long form."""
    result: dict[str, Any] = {}
    for key, value in layer.items():
        main = MAIN_KEYS.get(key)
        if main == "sources" and isinstance(value, dict) and "path" in value:
            inside = {k: v for k, v in value.items() if k in _SOURCE_ONLY}
            value = {k: v for k, v in value.items() if k not in _SOURCE_ONLY} | {"sources": [inside]}
        elif main is not None and value is not None and not isinstance(value, dict):
            value = {main: value}
        result[key] = value
    return result


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if value is not None}
    return {key: without_nulls(value) if isinstance(value, dict) else value for key, value in kept.items()}


def merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
