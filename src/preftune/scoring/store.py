"""What reference models said, kept between runs: one SQLite file with the log-probability of every scored token.

A value stands under a digest of everything that it follows from: the weights and the config, the precision, the kind of
device, the versions of this code's arithmetic and of the libraries', and the tokens and the span of its row. A setting that is
not among these cannot make it stale. The file only ever saves work: whatever is wrong with it is said once, and the run goes on
without it.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b, file_digest
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from preftune.data.render import Batch, Rendered
from preftune.models.inspect import MODEL_FILES
from preftune.scoring.place import APPLICATION, SCHEMA, default_place, is_ours

log = logging.getLogger("preftune")

NUMERICS = 2  # of scoring: one more whenever a change moves log-probabilities by more than rounding
# a new minor version may compute positions or norms in another way
LIBRARIES = " ".join(f"{name} {'.'.join(metadata.version(name).split('.')[:2])}" for name in ("torch", "transformers"))
LIMIT = 4 * 2**30  # bytes; over it those rows go that were not used for longest
PATIENCE = 30.0  # seconds to wait for another process that writes
SETTLED = 2 * 10**9  # nanoseconds after which a file that is written again has another time

_TABLES = (
    # the id is the clock: a row that is used moves to the end, so that what is evicted stands together at the beginning
    f"CREATE TABLE IF NOT EXISTS responses (id INTEGER PRIMARY KEY, {SCHEMA})",
    "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, digest BLOB NOT NULL)",
    f"PRAGMA application_id = {APPLICATION}",
)
_ROWS = 1000  # most rows of one transaction

T = TypeVar("T")


def open_store(setting: str | None) -> Store | None:
    """`reference.store`: a path, `off`, or None for the file in the user's cache folder. Nothing is written yet."""
    if setting is not None:
        return None if setting == "off" else Store(Path(setting))
    if (place := default_place()) is None:
        log.warning("there is no home folder to keep reference log-probabilities in: reference.store=PATH names a file")
        return None
    return Store(place)


class _Damaged(Exception):
    """The file is not what was written."""


class Store:
    """The file. It is opened when something is first asked of it, and again after `close`."""

    def __init__(self, path: Path, *, limit: int = LIMIT) -> None:
        self.path, self.limit = path, limit
        self._connection: sqlite3.Connection | None = None
        self._usable = self._writable = True
        self._begun_anew = False

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values that are there; from now on they are those used last."""

        def read(connection: sqlite3.Connection) -> dict[bytes, bytes]:
            ask, found = "SELECT logp FROM responses WHERE key = ?", dict[bytes, bytes]()
            for key in keys:
                for (value,) in connection.execute(ask, (key,)):
                    found[key] = _checked(key, value)
            return found

        found = self._attempt(read, {})
        last = "UPDATE responses SET id = (SELECT max(id) FROM responses) + 1 WHERE key = ?"
        self._write(last, [(key,) for key in found])
        return found

    def has(self, keys: Sequence[bytes]) -> bool:
        """Whether all of them are there."""
        ask = "SELECT 1 FROM responses WHERE key = ?"
        return self._attempt(lambda connection: all(connection.execute(ask, (key,)).fetchone() for key in keys), False)

    def put(self, values: Mapping[bytes, bytes]) -> None:
        put = "INSERT OR REPLACE INTO responses (key, logp) VALUES (?, ?)"
        self._write(put, [(key, value + _check(key, value)) for key, value in values.items()])

    def digest(self, ref: str, *, packed: bool = False) -> bytes | None:
        """Of the files that a model computes with: a folder, or a hub name as it was fetched last; for an adapter those of its
        base too, and the code that its config names elsewhere on the hub. None: they are not here, or not all of them.
        `packed`: loaded in 4 bits, it is another model.

        A file is read once; then it is known by its place, size, times and inode.
        """
        try:
            folder = Path(ref) if ref and Path(ref).is_dir() else _cached(ref, "config.json", "adapter_config.json")
            if folder is None or not _whole(folder):
                return None
            found = self._digest_of_files(folder, MODEL_FILES)
            if (adapter := folder / "adapter_config.json").is_file():
                parts = [self.digest(json.loads(adapter.read_bytes()).get("base_model_name_or_path") or "")]
            else:
                code = [_cached(name, file) for name, file in _code_elsewhere(folder / "config.json")]
                parts = [place and self._digest_of_files(place, ("*.py",)) for place in code]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # loading the model will say what is wrong
            return None
        if None in parts:
            return None
        return blake2b(b"".join([found, *filter(None, parts), b"nf4" * packed]), digest_size=32).digest()

    def _digest_of_files(self, folder: Path, patterns: Sequence[str]) -> bytes:
        found = blake2b(digest_size=32)
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            found.update(path.name.encode() + b"\0" + self._digest_of_file(path))
        return found.digest()

    def _digest_of_file(self, path: Path) -> bytes:
        place, stat = str(path.absolute()), path.stat()
        stamp = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        ask = "SELECT digest FROM files WHERE path = ? AND stamp = ?"
        row = self._attempt(lambda connection: connection.execute(ask, (place, stamp)).fetchone(), None)
        if row is not None:
            return bytes(row[0])
        with path.open("rb") as file:
            digest = file_digest(file, lambda: blake2b(digest_size=32)).digest()
        if time.time_ns() - stat.st_mtime_ns > SETTLED:
            self._write("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", [(place, stamp, digest)])
        return digest

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- the file ---------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
            try:
                _prepare(connection)
                with suppress(sqlite3.OperationalError):  # it may only be read, or another process does the same just now
                    connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """In short transactions, so that other processes come in between."""

        def write(connection: sqlite3.Connection, part: Sequence[tuple[Any, ...]]) -> None:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(statement, part)
                self._evict(connection)

        for at in range(0, len(rows), _ROWS):
            if self._writable:
                self._attempt(lambda connection, at=at: write(connection, rows[at : at + _ROWS]), None, writes=True)

    def _evict(self, connection: sqlite3.Connection) -> None:
        while _bytes_used(connection) > self.limit:
            (count,) = connection.execute("SELECT count(*) FROM responses").fetchone()
            if not count:
                break
            oldest = "DELETE FROM responses WHERE id IN (SELECT id FROM responses ORDER BY id LIMIT ?)"
            connection.execute(oldest, (max(1, count // 10),))

    def _attempt(self, work: Callable[[sqlite3.Connection], T], otherwise: T, *, writes: bool = False) -> T:
        """What the work gives; `otherwise` where the file does not let it, which is said once."""
        while self._usable:
            try:
                return work(self._open())
            except (sqlite3.Error, OSError, _Damaged) as error:
                if not self._begun_anew and _is_damage(error) and is_ours(self.path):
                    self._begin_anew(error)
                elif writes and self._connection is not None:
                    self._writable = False
                    log.warning(f"{self.path}: no more reference log-probabilities are kept: {error}")
                    break
                else:
                    self._usable = False
                    self.close()
                    log.warning(f"{self.path}: reference log-probabilities are neither taken from here nor kept: {error}")
        return otherwise

    def _begin_anew(self, error: Exception) -> None:
        """Moves a damaged file aside, with what SQLite keeps beside it."""
        self._begun_anew, number = True, 1
        self.close()
        while (aside := Path(f"{self.path}.damaged-{number}")).exists():
            number += 1
        try:
            for suffix in ("-wal", "-shm", ""):
                with suppress(FileNotFoundError):
                    os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        except OSError:
            return  # the next attempt ends where this one did, and says so
        log.warning(f"{self.path} is damaged ({error}): it is {aside.name} now, and a new one is begun")


def _prepare(connection: sqlite3.Connection) -> None:
    """Makes the tables of a new file; a file with other tables is not ours."""
    if connection.execute("PRAGMA application_id").fetchone() == (APPLICATION,):
        return
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        (ours,) = connection.execute("PRAGMA application_id").fetchone()  # another process may have been faster
        if ours != APPLICATION and connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise _Damaged("it is a database of something else")
        for statement in _TABLES:
            connection.execute(statement)


def _bytes_used(connection: sqlite3.Connection) -> int:
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the extended codes carry their kind in the lowest byte
    return isinstance(error, _Damaged) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _check(key: bytes, value: bytes) -> bytes:
    """What stands behind a value: SQLite itself does not notice a bit that fell over."""
    return blake2b(key + value, digest_size=8).digest()


def _checked(key: bytes, stored: Any) -> bytes:
    value, check = bytes(stored)[:-8], bytes(stored)[-8:]
    if _check(key, value) != check:
        raise _Damaged("a value is not what was written")
    return value


# -- the files of a model --------------------------------------------------------------------------------------------------


def _cached(name: str, *files: str) -> Path | None:
    """The folder in the hub's cache that has one of these files of a model; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, file) for file in files) if name.count("/") == 1 else ()
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _whole(folder: Path) -> bool:
    """Whether there are weights, and every part of those that an index lists."""
    lists = [json.loads(path.read_bytes())["weight_map"].values() for path in folder.glob("*.index.json")]
    parts = {str(part) for names in lists for part in names}
    return all((folder / part).is_file() for part in parts) and any(
        path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)
    )


def _code_elsewhere(config: Path) -> list[tuple[str, str]]:
    """(hub name, file) of the code of another model that a config names as `owner/name--file.Class`."""
    named = json.loads(config.read_bytes()).get("auto_map", {}).values()
    parts = {one.rpartition(".")[0].partition("--") for one in named if isinstance(one, str)}
    return sorted((name, f"{file}.py") for name, mark, file in parts if mark)


# -- one model's values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """The values of one model, computed in one precision on one kind of device (cpu, cuda).

    identity: what the model is, by `Store.digest` of its folder or by `digest_of`.
    """

    store: Store
    identity: bytes
    dtype: torch.dtype
    device: str

    def find(self, batch: Batch, rows: Sequence[int]) -> dict[int, Tensor]:
        """Of those rows that are there: [length] nats of each scored token, float32."""
        keys = {row: self._key(batch.sequences[row]) for row in rows}
        found = self.store.get(list(dict.fromkeys(keys.values())))
        # a copy that may be written: torch wants no other
        return {row: torch.frombuffer(bytearray(found[key]), dtype=torch.float32) for row, key in keys.items() if key in found}

    def has(self, batch: Batch, rows: Sequence[int]) -> bool:
        """Whether all rows are there."""
        return self.store.has([self._key(batch.sequences[row]) for row in rows])

    def put(self, batch: Batch, rows: Sequence[int], token_logp: Sequence[Tensor]) -> None:
        """Keeps [length] nats of each scored token of these rows, on the CPU."""
        values = (tokens.contiguous().numpy().tobytes() for tokens in token_logp)
        self.store.put({self._key(batch.sequences[row]): value for row, value in zip(rows, values, strict=True)})

    def _key(self, sequence: Rendered) -> bytes:
        key = blake2b(f"{NUMERICS} {LIBRARIES} {self.dtype} {self.device} ".encode() + self.identity, digest_size=16)
        key.update(array("q", [sequence.start, len(sequence.ids), *sequence.ids]).tobytes())
        key.update(bytes(sequence.mask or ()))
        for place, digest in sequence.attachments:
            key.update(f" {place} ".encode() + digest)
        return key.digest()


def digest_of(model: Any) -> bytes | None:
    """Of a model in memory: its parts and settings, and every parameter and buffer with name, shape and type. None: its weights
    cannot be read byte by byte."""
    # where it came from, who wrote it, and what saving it fills in
    left_out = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in left_out}
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    settings = [config, adapters, model.active_adapters if adapters else None, str(model)]
    found = blake2b(json.dumps(settings, default=_in_order, skipkeys=True).encode(), digest_size=32)
    try:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            found.update(_bytes(tensor))
            if (state := getattr(tensor, "quant_state", None)) is not None:  # the scales of packed weights
                for part, scales in sorted(state.as_dict(packed=True).items()):
                    found.update(part.encode() + _bytes(scales))
    except (RuntimeError, TypeError) as error:  # they are somewhere else, or of a type of their own
        log.warning(f"no reference log-probabilities are kept: the model's weights cannot be read ({error})")
        return None
    for name in sorted({type(module).__module__ for module in model.modules()}):
        if name.startswith("transformers_modules."):  # its own code, which came with it
            found.update(Path(str(sys.modules[name].__file__)).read_bytes())
    return found.digest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _in_order(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
