"""What a user may say about data: keys of `data:` in a run, and of one source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from preftune.data.filters import BadFilter, parse

VotesMethod = Literal["majority", "dawid_skene", "bradley_terry"]


def _filter(text: str) -> str:
    try:
        parse(text)
    except BadFilter as error:
        raise PydanticCustomError("bad_filter", "{said}", {"said": str(error)}) from None
    return text


def _canonical(value: Any) -> Any:
    return value.replace("-", "_").lower() if isinstance(value, str) else value


_Format = Annotated[str | None, Field(description="Name of the row format, where the columns alone do not tell it.")]
_Split = Annotated[str | None, Field(description="Split of a hub data set or a saved DatasetDict; train if absent.")]
_Limit = Annotated[
    int | None, Field(ge=1, description="Read at most this many rows of a source, from its start; those that a filter keeps.")
]
_Filter = Annotated[
    Annotated[str, AfterValidator(_filter)] | None,
    Field(description="Rows that are read: column op value and ..., such as 'score >= 4 and lang in [en, de]'."),
]
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
    filter: _Filter = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="train: expected share of each epoch, over the sum of all sources' weights."
    )


def _listed(value: Any) -> Any:
    """One source alone is a list of one; a path alone is a source."""
    items: Any = [value] if isinstance(value, (str, Path, dict, Source)) else value
    if not isinstance(items, list):
        return items
    return [{"path": str(item)} if isinstance(item, (str, Path)) else item for item in cast("list[Any]", items)]


Sources = Annotated[list[Source], BeforeValidator(_listed)]


class DataOptions(BaseModel):
    """How data is read. `format`, `split`, `limit`, `columns` and `filter` are defaults for every source."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sources: Sources = Field(
        default_factory=list[Source], description="Files, folders and hub names, read one after the other."
    )
    format: _Format = None
    split: _Split = None
    limit: _Limit = None
    columns: _Columns = Field(default_factory=dict)
    filter: _Filter = None
    votes: Annotated[VotesMethod | None, BeforeValidator(_canonical)] = Field(
        default=None,
        description="majority, dawid_skene or bradley_terry: a pair's votes become one soft label; absent: each is its own.",
    )
    strict: bool = Field(default=False, description="Refuse the data at the first faulty row instead of dropping it.")
    allow_drops: bool = Field(default=False, description="Go on even if more than half of the rows are dropped.")
    template: str | None = Field(
        default=None, description="Chat template to use instead of the model's own; plain is the built-in one."
    )


class ScoredOptions(DataOptions):
    """The same for data whose answers are scored: they have to fit."""

    too_long: Literal["drop", "truncate_response", "truncate_prompt_start"] = Field(
        default="drop", description="Rows longer than max_length: drop, truncate_response or truncate_prompt_start."
    )
