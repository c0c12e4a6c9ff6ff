"""preftune convert IN OUT to=FORMAT"""

from __future__ import annotations

import json
import logging
from itertools import chain
from pathlib import Path
from typing import Any

from preftune.config import resolve
from preftune.data.convert import Conversion
from preftune.data.formats import FORMATS
from preftune.data.options import Source
from preftune.data.targets import TARGETS, Target
from preftune.data.writers import check_ending, write_rows
from preftune.errors import Refusal, nearest
from preftune.keys import ConvertKeys
from preftune.runs import folder as files
from preftune.runs.prepare import load_said

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    places = [word for word in words if "=" not in word]
    if len(places) != 2:
        raise Refusal("convert takes two places: preftune convert IN OUT to=FORMAT", code="usage")
    source, place = places
    keys = resolve(ConvertKeys, [word for word in words if "=" in word])
    target = _target(keys.to)
    files.check_file_apart(Path(place), [source])
    out = files.choose_file(place, overwrite=keys.overwrite)
    check_ending(out)
    if keys.data.sources:
        raise Refusal("what is read is IN, the first of the two places", code="usage", key="data.sources")
    reading = load_said([Source(path=source)], keys.data)
    conversion = Conversion(target, keys.pairs)
    rows = conversion.rows(reading.groups)
    first = next(rows, None)
    if first is None:
        why = "; ".join(conversion.summary()) or "no judgement was read"
        raise Refusal(f"nothing can be written as {target.name}: {why}", code="nothing_kept", file=source, key="to")
    write_rows(out, chain([first], rows))
    log.info(f"{out}: {conversion.written:,} rows written as {target.title}")
    for line in conversion.summary():
        log.warning(f"{out}: {line}")
    if entry := conversion.entry(out.name):
        log.info(f"entry in dataset_info.json: {json.dumps({out.name.split('.')[0]: entry})}")
    return {
        "out": str(out),
        "format": target.name,
        "rows": conversion.written,
        "not_held": dict(conversion.lost),
        "changed": dict(conversion.changed),
        "other_columns": dict(conversion.beyond),
        "read": {"rows": reading.rows, "kept": reading.kept, "dropped": dict(reading.dropped)},
    }


def _target(name: str) -> Target:
    if name in TARGETS:
        return TARGETS[name]
    only = " It can be read, and is not written." if name in FORMATS else nearest(name, TARGETS)
    raise Refusal(f"no format {name} to write.{only} Known: {', '.join(TARGETS)}", code="unknown_format", key="to")
