"""What a user may say about data: keys of `data:` in a run, and of one source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_Format = Annotated[str | None, Field(description="Name of the row format, where the columns alone do not tell it.")]
_Split = Annotated[str | None, Field(description="Split of a hub data set or a saved DatasetDict; train if absent.")]
_Limit = Annotated[int | None, Field(ge=1, description="Read at most this many rows of a source, from its start.")]
_Columns = Annotated[
    dict[str, str], Field(description="Our column name to the file's own, such as {chosen: better, rejected: worse}.")
]


class Source(BaseModel):
    """One place that rows are read from, with what differs from the defaults of the whole."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str = Field(description="A file, a folder or a hub name; an existing path wins over a hub name.")
    format: _Format = None
    split: _Split = None
    limit: _Limit = None
    columns: _Columns = Field(default_factory=dict)


def _listed(value: Any) -> Any:
    """One source alone is a list of one; a path alone is a source."""
    items: Any = [value] if isinstance(value, (str, Path, dict, Source)) else value
    if not isinstance(items, list):
        return items
    return [{"path": str(item)} if isinstance(item, (str, Path)) else item for item in cast("list[Any]", items)]


Sources = Annotated[list[Source], BeforeValidator(_listed)]


class DataOptions(BaseModel):
    """How data is read. `format`, `split`, `limit` and `columns` are defaults for every source."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sources: Sources = Field(
        default_factory=list[Source], description="Files, folders and hub names, read one after the other."
    )
    format: _Format = None
    split: _Split = None
    limit: _Limit = None
    columns: _Columns = Field(default_factory=dict)
    strict: bool = Field(default=False, description="Refuse the data at the first faulty row instead of dropping it.")
    allow_drops: bool = Field(default=False, description="Go on even if more than half of the rows are dropped.")
    template: str | None = Field(
        default=None, description="Chat template to use instead of the model's own; plain is the built-in one."
    )


class ScoredOptions(DataOptions):
    """The same for data whose answers are scored: they have to fit."""

    too_long: Literal["drop", "truncate_response", "truncate_prompt_start"] = Field(
        default="drop", description="What is done with a row that is longer than max_length."
    )
