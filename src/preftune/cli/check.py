"""preftune check DATA ... [model=M] [out=PAGE.html]"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from preftune.cli.common import output_file
from preftune.cli.console import Watch
from preftune.config import resolve
from preftune.data.options import Source
from preftune.errors import Refusal
from preftune.keys import CheckKeys

log = logging.getLogger("preftune")


def run(words: list[str], as_json: bool) -> dict[str, Any]:
    places = [word for word in words if "=" not in word and not word.endswith((".yaml", ".yml"))]
    keys = resolve(CheckKeys, [word for word in words if word not in places])
    if places and keys.data.sources:
        raise Refusal("name the data once: as DATA or as data.sources", code="usage", key="data.sources")
    sources = [Source(path=place) for place in places] or keys.data.sources
    if not sources:
        raise Refusal("check takes data: preftune check DATA ...", code="usage")
    read = [*words, *(source.path for source in keys.eval_data)]
    out = output_file(keys.out, read, keys.data, overwrite=keys.overwrite, model=keys.model) if keys.out else None
    from preftune.report import checked as page
    from preftune.runs.check import examine

    with Watch() as watch:
        found = examine(keys, sources, lambda file, rows: watch("read", rows, 0, {}))
    report = found.report
    if not as_json:
        _print(report, drawn=keys.model is not None)
    if out:
        log.info(f"report: {page.write(report, out, ', '.join(Path(source.path).name for source in sources))}")
    if errors := found.errors:
        rows, dropped = report["rows"], report["rows"] - report["kept"]
        what = f"{dropped:,} of {rows:,} rows cannot be used" if dropped else errors[0]["message"]
        more = "; training goes on without them" if dropped and not _refused(errors) else ""
        raise Refusal(what + more, code="findings", document=report)
    return report


def _refused(errors: list[dict[str, Any]]) -> bool:
    """Whether training would refuse the data as a whole."""
    return any(found["row"] is None for found in errors)


BEFORE, ENDS = 24, 40  # tokens that are shown of a prompt, and at both ends of an answer


def _short(tokens: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The end of the prompt, and the answer without its middle."""
    first = next((n for n, (_, trained) in enumerate(tokens) if trained), len(tokens))
    skip = max(0, first - BEFORE)
    prompt, answer = tokens[skip:first], tokens[first:]
    if skip:
        prompt = [(f"({skip:,} tokens)", False), *prompt]
    if len(answer) > 2 * ENDS:
        answer = [*answer[:ENDS], (f"({len(answer) - 2 * ENDS:,} tokens)", True), *answer[-ENDS:]]
    return prompt + answer


def _print(report: dict[str, Any], *, drawn: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from preftune.report import checked as page
    from preftune.runs.preview import marked

    console = Console(highlight=False)
    brief = not log.isEnabledFor(logging.INFO)
    for source in report["sources"] if not brief else ():
        read = f" read as {source['read_as']}" if source.get("read_as") else ""
        console.print(escape(f"{source['path']}: {source['rows']:,} rows{read}, {source['kept']:,} kept"), soft_wrap=True)
    colours = {"error": "bold red", "warning": "yellow", "info": "cyan"}
    for kind in page.kinds(report):
        where = f" ({'row' if len(kind.places) == 1 else 'rows'} {kind.where})" if kind.places else ""
        number = f" {kind.findings:,}" if kind.places else ""
        head = f"[{colours[kind.severity]}]{kind.severity}[/] [bold]{escape(kind.code)}[/]"
        console.print(f"{head}{number}{escape(where)}: {escape(kind.message)}", soft_wrap=True)
    if brief:
        return
    for section in page.sections(report):
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, title=section.title, title_justify="left")
        for line in section.lines:
            table.add_row(escape(line.label), escape(line.value), f"[dim]{escape(line.note)}[/]")
        console.print()
        console.print(table)
    for shares in page.balance(report):
        most = ", ".join(f"{value} {share}" for value, share, _ in shares.rows[:10])
        console.print(f"\n{escape(shares.title)} [dim]({escape(shares.note)})[/]: {escape(most)}", soft_wrap=True)
    for place, answers in page.drawn(report) if drawn else ():
        console.print(f"\n{escape(place)}")
        for answer in answers:
            console.print(escape(f"  {answer.column}: {marked(_short(answer.tokens))}"), soft_wrap=True)
    console.print(f"\n[bold]{escape(page.verdict(report))}[/]", soft_wrap=True)
