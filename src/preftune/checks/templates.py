"""What a chat template and a tokenizer do to a row that training would not notice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from preftune.checks.codes import finding
from preftune.data.render import Rendered, Speaker
from preftune.records import Content, Finding, Group, Message

NAMED = 20  # rows of one kind that a message names


class Problems:
    """Kinds of problems, with the rows that have them: most are in the template, and in every row."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self._rows: dict[tuple[str, str], list[tuple[str, int]]] = {}
        self._count: dict[tuple[str, str], int] = {}

    def add(self, group: Group, rendered: Sequence[Rendered], file: str, row: int) -> None:
        for kind in {*self._of_text(group), *self._of_ids(rendered)}:
            rows = self._rows.setdefault(kind, [])
            self._count[kind] = self._count.get(kind, 0) + 1
            if len(rows) < NAMED:
                rows.append((file, row))

    def note(self, code: str, message: str, file: str, row: int) -> None:
        """A problem that is found elsewhere."""
        self._rows.setdefault((code, message), []).append((file, row))
        self._count[code, message] = self._count.get((code, message), 0) + 1

    def findings(self) -> list[Finding]:
        """One of each kind, at the first of its rows."""
        found: list[Finding] = []
        for (code, message), rows in self._rows.items():
            count, (file, row) = self._count[code, message], rows[0]
            more = "" if count == 1 else f" ({count:,} rows: {', '.join(str(n) for _, n in rows[:NAMED])}"
            more += ", ...)" if count > NAMED else ")" if more else ""
            found.append(finding(code, message + more, file, row))
        return sorted(found, key=lambda f: (f.code, f.message))

    def _of_text(self, group: Group) -> Iterator[tuple[str, str]]:
        if isinstance(group.prompt, str) or not group.responses:
            return
        prompt = self._speaker.text(group.prompt, group, generation_prompt=True)
        for message in group.prompt:
            if message.role in ("user", "system") and message.content.strip() not in prompt:
                yield "lost_turn", f"the template leaves out what the {message.role} says: give another with data.template"
        answer = group.responses[0].content
        assert not isinstance(answer, str)
        whole = self._speaker.text((*group.prompt, *answer), group, generation_prompt=False)
        if not whole.startswith(prompt):
            why = "writes the prompt otherwise once the answer follows, so that what is trained begins inside the prompt"
            yield "not_prefix_stable", f"the template {why}: give another with data.template"
        said = answer[-1].content.strip()
        if said and said not in whole:
            yield "lost_turn", "the template leaves out words of the answer: give another with data.template"
        elif said and not whole[whole.rfind(said) + len(said) :].strip():
            yield "no_end_token", "the template writes nothing after the answer, and the tokenizer's end token is put there"

    def _of_ids(self, rendered: Sequence[Rendered]) -> Iterator[tuple[str, str]]:
        start, end = self._speaker.start_token, self._speaker.end_token
        if end is None:
            yield "no_end_token", "the tokenizer has no end token: a model trained on this does not learn to stop"
        for sequence in rendered:
            ids = sequence.ids
            if start is not None and start != end and len(ids) > 1 and ids[0] == ids[1] == start:
                yield "double_start_token", "two start tokens stand at the beginning: take one out of the text or the template"
            last = ids[-1] if ids else None
            if sequence.mask is None and last in self._speaker.special and last in ids[sequence.start : -1]:
                yield "double_end_token", "the end token stands in the answer's text, too: take it out"


def last_turn(prompt: Content) -> Content | None:
    """What stands before the last question; None where there are no turns."""
    if isinstance(prompt, str):
        at = prompt.rfind("\n\nHuman:")
        return None if at < 0 else prompt[:at]
    turns: tuple[Message, ...] = prompt
    asked = [n for n, message in enumerate(turns) if message.role == "user"]
    return turns[: asked[-1]] if asked else None
