"""Data sets of the Hugging Face hub and of the `datasets` library, which is imported only when one is named."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from preftune.data.dialogue import is_object
from preftune.errors import Refusal, nearest

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_name(name: str) -> bool:
    """`namespace/name`; whether a path of that name exists is asked before."""
    return HUB_NAME.fullmatch(name) is not None


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def is_dataset(value: object) -> bool:
    """A Dataset, an IterableDataset, or a dictionary of them by split: known by what they offer, without an import."""
    if is_object(value):
        return bool(value) and all(is_dataset(part) for part in value.values())
    return hasattr(value, "column_names") and hasattr(value, "features")


def load_hub(name: str, split: str | None) -> Any:
    datasets = cast(Any, importlib.import_module("datasets"))
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as e:  # whatever the library, the network or the hub has to say, it is one line here
        said = next(iter(str(e).strip().splitlines()), "")
        what = f"is no file here, and the hub gave no data set ({type(e).__name__}: {said[:200]})"
        raise Refusal(what, code="not_on_hub", file=name) from None


def load_saved(folder: Path, name: str) -> Any:
    datasets = cast(Any, importlib.import_module("datasets"))
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as e:
        said = next(iter(str(e).strip().splitlines()), "")
        raise Refusal(f"cannot be loaded ({type(e).__name__}: {said[:200]})", code="unreadable", file=name) from None


def no_splits(name: str) -> Refusal:
    what = "has no splits: leave split out, or name it with the source that has it, as {path: ..., split: ...}"
    return Refusal(what, code="no_splits", file=name)


def dataset_rows(dataset: Any, split: str | None, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a Dataset."""
    if is_object(dataset):
        wanted = split or "train"
        if wanted not in dataset:
            what = f"has no split {wanted}: it has {', '.join(dataset)}.{nearest(wanted, dataset)}"
            raise Refusal(what, code="unknown_split", file=name)
        dataset = dataset[wanted]
    elif split:
        raise no_splits(name)
    if hasattr(dataset, "with_format"):  # rows as plain Python, whatever tensors the owner asked for
        dataset = dataset.with_format(None)
    yield from enumerate(dataset, start=1)
