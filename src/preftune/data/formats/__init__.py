"""The row formats that are understood: a closed table, recognised by the columns of a file.

Each entry names its columns and reads a row into an Example (one prompt, its answers, what was said of them), or raises a
RowFault. Entries stand in files by kind; this is the whole of them, and how the right one is found.
"""

from __future__ import annotations

from preftune.data.faults import RowFault
from preftune.data.formats.battles import BATTLES
from preftune.data.formats.columns import NOTES, Row
from preftune.data.formats.example import KINDS, Example, Format, Score
from preftune.data.formats.labelling import LABELLING
from preftune.data.formats.pairs import PAIRS
from preftune.data.formats.ranked import RANKED
from preftune.data.formats.singles import SINGLES

__all__ = ["COLUMNS", "FORMATS", "KINDS", "Example", "Format", "Row", "RowFault", "Score", "fitting", "recognise", "understand"]

FORMATS = {format.name: format for format in (*PAIRS, *RANKED, *BATTLES, *LABELLING, *SINGLES)}
# read along with the columns of a format, where they are there
OPTIONAL = (
    "system", "tools", "input", "history", "context", "weight", "preference", *NOTES, "id", "turn", "judge", "tstamp",
    "response_a", "response_b",
)  # fmt: skip
COLUMNS = {c for f in FORMATS.values() for need in f.needs for c in ([need] if isinstance(need, str) else need)} | {*OPTIONAL}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def fitting(row: Row, *, nulls: bool = False) -> list[Format]:
    """The format of a row: several where none of them is the nearer one, none where it is not known. With `nulls`, columns that
    hold null count as there."""
    present = {name for name, held in row.items() if nulls or held is not None}
    found = [format for format in FORMATS.values() if format.fits(row, present)]
    return [f for f in found if not any(other.beats(f, present) for other in found if other is not f)]


def recognise(row: Row, *, nulls: bool = False) -> Format | None:
    """The format of a row, where it is clear."""
    found = fitting(row, nulls=nulls)
    return found[0] if len(found) == 1 else None


def understand(format: Format, row: Row) -> Example:
    """One row as an Example. Rows with pictures or sounds are not read yet, whatever their format."""
    if not row.keys().isdisjoint(MEDIA):
        for column in MEDIA:
            if row.get(column) not in (None, "", []):
                raise RowFault("unsupported_content", "images and sounds are not read yet: remove the row", column)
    return format.read(row)
