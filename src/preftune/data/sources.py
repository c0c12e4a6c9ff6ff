"""What a user names as data (paths, folders, hub names, Datasets, rows, Groups) as streams of numbered rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from preftune.data.dialogue import is_list, is_object
from preftune.data.faults import RowFault
from preftune.data.filters import Keeps, holds, parse
from preftune.data.formats import fitting
from preftune.data.hub import dataset_rows, is_dataset, is_hub_name, is_saved, load_hub, load_saved, no_splits
from preftune.data.options import DataOptions, Source
from preftune.data.readers import kind_of, read_rows
from preftune.errors import Refusal, nearest
from preftune.records import Group

Item = dict[str, Any] | RowFault | Group
Rows = Iterable[tuple[int, Item]]


@dataclass
class Stream:
    """Numbered rows of one file (or Dataset, or list) and what the user said about them.

    filtered: rows that a filter has left out so far, which do not count as read.
    """

    name: str
    rows: Rows
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    filtered: int = 0


def streams(sources: Any, options: DataOptions) -> Iterator[Stream]:
    """Streams of all sources in order; each is to be read before the next is asked for."""
    items = list(sources) if is_list(sources) else [sources]
    if not items:
        raise Refusal("no data is given: name a file, a folder, a hub name, or rows", code="no_data", key="data.sources")
    named: list[Source] = []
    for kind, alike in groupby(items, key=_kind):
        if kind in ("rows", "groups"):
            if options.split:
                raise no_splits(kind)
            numbered = enumerate(cast("Iterable[Item]", alike), start=1)
            yield from _limited([Stream(kind, numbered)], Source(path=kind), options)
            continue
        for item in alike:
            if kind == "dataset":
                source = Source(path=kind)
                found = iter([Stream(kind, dataset_rows(item, options.split, kind))])
            else:
                source = item if isinstance(item, Source) else _source(item)
                _check_new(source, named)
                found = _found(source, source.split or options.split)
            yield from _limited(found, source, options)


def _check_new(source: Source, named: list[Source]) -> None:
    """Refuses a source that was named before in the same words, and notes it: its rows could not be told apart."""
    same = source.model_copy(update={"path": str(Path(source.path)), "weight": None})
    if same in named:
        what = "stands there twice, and each of its rows would count twice: name it once"
        raise Refusal(what, code="named_twice", file=source.path, key="data.sources")
    named.append(same)


def _kind(item: object) -> str:
    if isinstance(item, (str, Path, Source)):
        return "path"
    if isinstance(item, Group):
        return "groups"
    if is_dataset(item):
        return "dataset"
    if is_object(item):
        return "path" if "path" in item and not fitting(item) else "rows"
    what = f"a {type(item).__name__} is no data: give paths, hub names, rows (dict), Datasets or Groups"
    raise Refusal(what, code="unknown_source")


def _source(item: object) -> Source:
    if not is_object(item):
        return Source(path=str(item))
    try:
        return Source.model_validate(item)
    except ValidationError as e:
        first = e.errors()[0]
        key, what = ".".join(map(str, first["loc"])), first["msg"]
        if first["type"] == "extra_forbidden":
            what = f"unknown key.{nearest(key, Source.model_fields)} Known: {', '.join(Source.model_fields)}"
        raise Refusal(what, code="bad_option", key=f"data.sources.{key}") from None


def _limited(found: Iterable[Stream], source: Source, options: DataOptions) -> Iterator[Stream]:
    """The source's options on its streams, and its filter and limit over all of them together."""
    left = source.limit or options.limit
    sieve = _Sieve(source.filter or options.filter, source.path)

    def cut(rows: Rows) -> Iterator[tuple[int, Item]]:
        nonlocal left
        for row in rows:
            yield row
            if left is not None:
                left -= 1
                if not left:
                    return

    for stream in found:
        read = Stream(stream.name, (), source.format or options.format, source.columns or options.columns)
        read.rows = cut(sieve.kept(stream.rows, read))
        yield read
        if left == 0:
            break
    sieve.check()


class _Sieve:
    """A filter over the rows of a source, which also sees whether the columns that it names are there."""

    def __init__(self, text: str | None, source: str) -> None:
        self.filter, self.source = parse(text) if text else None, source
        self.missing = dict.fromkeys(self.filter.columns if self.filter else ())
        self.found: dict[str, None] = {}

    def kept(self, rows: Rows, stream: Stream) -> Rows:
        """The rows that pass; one that cannot be compared is a fault of its own. The stream counts the others."""
        return rows if self.filter is None else self._kept(rows, self.filter.keeps, stream)

    def _kept(self, rows: Rows, keeps: Keeps, stream: Stream) -> Iterator[tuple[int, Item]]:
        for number, row in rows:
            if not is_object(row):
                yield number, row
                continue
            if self.missing:
                self.missing = {column: None for column in self.missing if not holds(row, column)}
                self.found.update(dict.fromkeys(row))
            try:
                passes = keeps(row)
            except RowFault as fault:
                yield number, fault
                continue
            if passes:
                yield number, row
            else:
                stream.filtered += 1

    def check(self) -> None:
        """Refuses a column that no row has had."""
        if self.missing and self.found:
            column = next(iter(self.missing))
            what = f"no row has a column {column}.{nearest(column, self.found)} Found: {', '.join(self.found)}"
            raise Refusal(what, code="unknown_column", file=self.source, key="data.filter")


def _found(source: Source, split: str | None) -> Iterator[Stream]:
    """A path that exists wins over a hub name."""
    name, path = source.path, Path(source.path).expanduser()
    if path.is_dir() and name:
        if is_saved(path):
            yield Stream(name, dataset_rows(load_saved(path, name), split, name))
            return
        files = _data_files(path, name)
        if split:
            raise no_splits(name)
        for file in files:
            shown = str(Path(name) / file.name)
            yield Stream(shown, read_rows(file, shown))
    elif path.exists() and name:
        if split:
            raise no_splits(name)
        yield Stream(name, read_rows(path, name))
    elif is_hub_name(name) and not kind_of(path):
        yield Stream(name, dataset_rows(load_hub(name, split), None, name))
    else:
        raise Refusal(_missing(path), code="not_found", file=name)


def _data_files(folder: Path, name: str) -> list[Path]:
    """Data files of a folder, sorted; .txt only where there is nothing else, since it is mostly a licence or a note."""
    known = sorted(p for p in folder.iterdir() if p.is_file() and kind_of(p) and not p.name.startswith("."))
    files = [p for p in known if kind_of(p) != "txt"] or known
    if not files:
        raise Refusal("the folder holds no data files, nor a saved data set", code="not_found", file=name)
    return files


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no such file: there is no folder {path.parent}"
    return f"no such file.{nearest(path.name, [p.name for p in path.parent.iterdir() if p.name != path.name])}"
