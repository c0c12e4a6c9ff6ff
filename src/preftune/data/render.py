"""Groups -> token ids and spans: what of each response is scored, by one rule for text, chat and generation.

Plain text: ids = tokenizer(prompt + response), with the tokenizer's own start token, plus the end token unless it is last
already. Messages: the chat template applied to the whole conversation. The span of every response of a group starts at the
same index: the smallest common prefix of the prompt's ids and the joined ids, so a token that straddles the boundary belongs
to the response. It ends with the end-of-turn or end token, once; what the template writes after that is not scored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from preftune.data.encode import encoder
from preftune.data.kept import SHORTER, Fault, check_marks, without
from preftune.data.template import UNSAID_PLAIN, say_once, template_text
from preftune.errors import Refusal
from preftune.records import Comparison, Content, Finding, Group, Ranking

TooLong = Literal["drop", "truncate_response", "truncate_prompt_start"]
log = logging.getLogger("preftune")

_CHUNK = 1024  # groups per tokenizer call: enough for its threads, little text held twice


@dataclass(frozen=True, slots=True)
class Rendered:
    """One response under its prompt. `mask` covers ids[start:], True = scored; None means all of it.

    attachments: (place in ids, digest) of each token that stands for an image or a sound. What is the same in ids is the same
    only where these are, too.
    """

    group: int
    response: int
    ids: tuple[int, ...]
    start: int
    mask: tuple[bool, ...] | None = None
    attachments: tuple[tuple[int, bytes], ...] = ()

    @property
    def length(self) -> int:
        """Scored tokens, the end token included."""
        return sum(self.mask) if self.mask is not None else max(0, len(self.ids) - self.start)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rendered responses, in the order group, then response; `groups` are what is left after drops."""

    groups: tuple[Group, ...]
    sequences: tuple[Rendered, ...]
    findings: tuple[Finding, ...] = ()
    _first: tuple[int, ...] = field(default=(), repr=False)

    def index(self, group: int, response: int) -> int:
        """The place in `sequences` of a group's response."""
        return self._first[group] + response

    def __len__(self) -> int:
        return len(self.sequences)

    def beside(self, extra: Mapping[int, Sequence[Rendered]]) -> Batch:
        """With further rows under its prompts: those of group g have the numbers from `count(g)` on, and count as responses of
        it that nobody wrote."""
        first: list[int] = []
        sequences: list[Rendered] = []
        for g in range(len(self.groups)):
            first.append(len(sequences))
            own = self._first[g]
            sequences += [*self.sequences[own : own + self.count(g)], *extra.get(g, ())]
        return replace(self, sequences=tuple(sequences), _first=tuple(first))

    def count(self, group: int) -> int:
        """Rows of a group: its responses, and what stands beside them."""
        ends = (*self._first, len(self.sequences))
        return ends[group + 1] - ends[group]


def render(
    groups: Sequence[Group],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    too_long: TooLong = "drop",
    template: str | None = None,
) -> Batch:
    """Tokenizes every response under its prompt.

    Args:
        groups: as `preftune.read` gives them.
        tokenizer: a transformers tokenizer.
        max_length: most tokens of prompt plus response; None: no limit.
        too_long: what happens to a response over it. `drop` removes it with the marks that need it;
            `truncate_response` cuts its end, and then no end token stands there; `truncate_prompt_start` cuts the shared
            prompt of the whole group from the left, keeping the start token.
        template: None (the tokenizer's own, else `plain`, said), `plain`, or the path of a Jinja file.

    Returns:
        A Batch. Marks that could not be rendered are gone from its groups, each with one finding of severity `error`; so
        are faulty responses that no mark needs. A ranking goes on without a faulty response while two are left: a `warning`.

    Raises:
        Refusal: a mark that says nothing, such as a preference over 1.
    """
    check_marks(groups)
    speaker = Speaker(tokenizer, template)
    kept: list[Group] = []
    sequences: list[Rendered] = []
    first: list[int] = []
    findings: list[Finding] = []
    for at in range(0, len(groups), _CHUNK):
        for group, rendered in speaker.render(groups[at : at + _CHUNK], findings):
            group, rendered, order = fitted(group, rendered, max_length, too_long, speaker.start_token, findings)
            if group.responses or not rendered:
                first.append(len(sequences))
                sequences += [replace(rendered[i], group=len(kept), response=n) for n, i in enumerate(order)]
                kept.append(group)
    if shorter := sum(finding.code == SHORTER for finding in findings):
        log.warning(f"{shorter:,} rankings go on without an answer that cannot be used")
    return Batch(tuple(kept), tuple(sequences), tuple(findings), tuple(first))


def render_prompts(groups: Iterable[Group], tokenizer: Any, *, template: str | None = None) -> list[tuple[int, ...]]:
    """The ids of each group's prompt, ready to be continued: text as it stands, messages with generation prompt.

    Raises:
        Refusal: the chat template refuses a prompt.
    """
    speaker = Speaker(tokenizer, template)
    return [speaker.prompt(group, number) for number, group in enumerate(groups, start=1)]


class Speaker:
    """A tokenizer and the template it speaks: text and ids of prompts and conversations."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.end_token: int | None = tokenizer.eos_token_id
        self.start_token: int | None = tokenizer.bos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self.template = template_text(tokenizer, template)
        self.unsaid_plain = template is None and self.template is not None
        self._blank: dict[int, bool] = {}
        self._encode = encoder(tokenizer)

    # -- text -------------------------------------------------------------------------------------------------------

    def text(self, content: Content, group: Group, *, generation_prompt: bool) -> str:
        """A prompt or conversation as the text that is tokenized."""
        if isinstance(content, str):
            return content
        if self.unsaid_plain:
            say_once(self.tokenizer, UNSAID_PLAIN)
        return self.tokenizer.apply_chat_template(
            [m.as_dict() for m in content],
            tools=list(group.tools) or None,
            chat_template=self.template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )

    def ids(self, texts: list[str], content: Content) -> list[list[int]]:
        """A template writes its own start token; plain text gets the tokenizer's."""
        return self._encode(texts, isinstance(content, str))

    # -- prompts and responses ----------------------------------------------------------------------------------------

    def prompt(self, group: Group, number: int) -> tuple[int, ...]:
        try:
            text = self.text(group.prompt, group, generation_prompt=True)
        except _template_errors() as error:
            raise Refusal(f"the chat template refuses prompt {number}: {_said(error)}", code="template_error") from error
        ids = self.ids([text], group.prompt)[0]
        if isinstance(group.prompt, str):
            while len(ids) > 1 and ids[-1] == self.end_token:  # some tokenizers end every text by themselves
                ids.pop()
        return tuple(ids) or self._first_token()

    def render(self, groups: Sequence[Group], findings: list[Finding]) -> Iterable[tuple[Group, list[Rendered]]]:
        """Every group with its rendered responses; what the template refuses is gone from it, with a finding."""
        ready: list[Group] = []
        texts: dict[bool, list[str]] = {True: [], False: []}  # by "is plain text"
        for group in groups:
            written = self._written(group, findings)
            if written:
                ready.append(written[0])
                texts[isinstance(group.prompt, str)] += written[1]
        ids = {kind: iter(self.ids(t, "" if kind else ()) if t else []) for kind, t in texts.items()}
        for group in ready:
            of_kind = ids[isinstance(group.prompt, str)]
            prompt = next(of_kind)
            yield group, self._spans(group, prompt, [next(of_kind) for _ in group.responses])

    def _written(self, group: Group, findings: list[Finding]) -> tuple[Group, list[str]] | None:
        """The group with the texts of its prompt and of each response under it; None where nothing of it is left."""
        texts: list[str] = []
        faults: dict[int, Fault] = {}
        try:
            prompt = self.text(group.prompt, group, generation_prompt=True)
        except _template_errors() as error:
            fault = Fault("template_error", f"the chat template refuses this prompt: {_said(error)}")
            if not group.responses:
                findings.append(Finding(fault.code, "error", fault.message))
            without(group, dict.fromkeys(range(len(group.responses)), fault), {}, findings)
            return None
        for n, response in enumerate(group.responses):
            try:
                texts.append(self.text(_join(group.prompt, response.content), group, generation_prompt=False))
            except _template_errors() as error:
                faults[n] = Fault("template_error", f"the chat template refuses this conversation: {_said(error)}")
                texts.append("")
        left, order = without(group, faults, {}, findings)
        return (left, [prompt, *(texts[i] for i in order)]) if left.responses or not group.responses else None

    def _spans(self, group: Group, prompt: list[int], joined: list[list[int]]) -> list[Rendered]:
        if not joined:
            return []
        start = min(_common_prefix(prompt, ids) for ids in joined)
        lead: tuple[int, ...] = ()
        if start == 0:  # nothing stands before the first scored token: something has to predict it
            lead, start = self._first_token(), 1
        rendered: list[Rendered] = []
        for n, ids in enumerate(joined):
            ended = lead + tuple(self._end(ids, start - len(lead), group.prompt, finished=group.responses[n].finished))
            rendered.append(Rendered(0, n, ended, start, self._mask(group, n, ended, start, lead)))
        return rendered

    def _first_token(self) -> tuple[int, ...]:
        if self.start_token is not None:
            return (self.start_token,)
        if self.end_token is None:
            return ()
        say_once(self.tokenizer, "a prompt without tokens and a tokenizer without start token: the end token stands first")
        return (self.end_token,)

    def _end(self, ids: list[int], start: int, prompt: Content, *, finished: bool) -> list[int]:
        """ids up to and with the one end-of-turn or end token; without it where the response is not finished."""
        if isinstance(prompt, str):
            bare = ids[:-1] if ids and ids[-1] == self.end_token else ids
            return [*bare, *self._end_tokens()] if finished else bare
        end, tail = self._turn_end(ids, start)
        if not finished:
            return ids[: tail if end is None else end - 1]
        if end is not None:
            return ids[:end]
        return [*ids[:tail], *self._end_tokens()]

    def _end_tokens(self) -> list[int]:
        if self.end_token is None:
            say_once(self.tokenizer, "the tokenizer has no end token: responses are scored without one")
            return []
        return [self.end_token]

    def _turn_end(self, ids: Sequence[int], start: int) -> tuple[int | None, int]:
        """(index after the first special token of the trailing run of special and blank tokens, start of that run)."""
        tail = len(ids)
        while tail > start + 1 and (ids[tail - 1] in self.special or self._is_blank(ids[tail - 1])):
            tail -= 1
        ends = [i + 1 for i in range(tail, len(ids)) if ids[i] in self.special]
        return (ends[0] if ends else None), tail

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    def _mask(self, group: Group, n: int, ids: tuple[int, ...], start: int, lead: tuple[int, ...]) -> tuple[bool, ...] | None:
        """A response of several messages is trained on the assistant's own turns; tool results are read, not learned."""
        content = group.responses[n].content
        if isinstance(content, str) or len(content) == 1:
            return None
        mask = [False] * (len(ids) - start)
        for k, message in enumerate(content):
            if message.role != "assistant":
                continue
            before = _join(group.prompt, content[:k])
            begin = self._prefix(before, group, ids, lead, generation_prompt=True)
            end = self._prefix(_join(before, content[k : k + 1]), group, ids, lead, generation_prompt=False)
            turn_end = len(ids) if k + 1 == len(content) else self._turn_end(ids[:end], begin)[0] or end
            for i in range(max(begin, start), turn_end):
                mask[i - start] = True
        return tuple(mask)

    def _prefix(
        self, content: Content, group: Group, ids: tuple[int, ...], lead: tuple[int, ...], *, generation_prompt: bool
    ) -> int:
        text = self.text(content, group, generation_prompt=generation_prompt)
        return len(lead) + _common_prefix(self.ids([text], content)[0], list(ids[len(lead) :]))


def _join(prompt: Content, response: Content) -> Content:
    if isinstance(prompt, str):
        assert isinstance(response, str), "readers pair text with text and messages with messages"
        return prompt + response
    assert not isinstance(response, str)
    return (*prompt, *response)


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two lists share at their start."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # bisection: slices compare much faster than tokens in a loop
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _template_errors() -> tuple[type[Exception], ...]:
    from jinja2.exceptions import TemplateError

    return (TemplateError, TypeError, KeyError)


def _said(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# -- faults ---------------------------------------------------------------------------------------------------------


_EMPTY = Fault("empty_answer", "no token of the answer is left to score")


def _fit_length(
    rendered: list[Rendered], limit: int | None, too_long: TooLong, start_token: int | None
) -> tuple[list[Rendered], dict[int, Fault]]:
    """The responses within the limit, and for each one that cannot be, the reason."""
    over = [r for r in rendered if limit is not None and len(r.ids) > limit]
    if limit is None or not over:
        return rendered, {}
    if too_long == "drop":
        return rendered, {r.response: _too_long(f"{len(r.ids)} tokens, over max_length {limit}") for r in over}
    if too_long == "truncate_response":
        faults = {r.response: _too_long(f"the prompt alone fills max_length {limit}") for r in over if r.start >= limit}
        return [_cut_end(r, limit) if r.start < limit else r for r in rendered], faults
    keep = 1 if start_token is not None and rendered[0].ids[0] == start_token else 0
    room = limit - max(keep, 1)  # at least one token has to stand before the response
    long = [r.response for r in rendered if len(r.ids) - r.start > room]
    faults = dict.fromkeys(long, _too_long(f"the response alone fills max_length {limit}"))
    excess = max((len(r.ids) - limit for r in rendered if r.response not in faults), default=0)
    if excess <= 0:
        return rendered, faults
    cut = [replace(r, ids=r.ids[:keep] + r.ids[keep + excess :], start=r.start - excess) for r in rendered]
    return cut, faults


def fitted(
    group: Group,
    rendered: list[Rendered],
    limit: int | None,
    too_long: TooLong,
    start_token: int | None,
    findings: list[Finding],
) -> tuple[Group, list[Rendered], list[int]]:
    """(the group without what cannot be used within the limit, all its responses as they are cut, indices of those left)."""
    cut, faults = _fit_length(rendered, limit, too_long, start_token)
    faults |= {r.response: _EMPTY for r in cut if r.length == 0}
    left, order = without(group, faults, _indistinct(group, cut), findings)
    return left, cut, order


def _too_long(message: str) -> Fault:
    return Fault("too_long", message)


def _cut_end(r: Rendered, limit: int) -> Rendered:
    return replace(r, ids=r.ids[:limit], mask=None if r.mask is None else r.mask[: limit - r.start])


def _indistinct(group: Group, rendered: list[Rendered]) -> dict[int, Fault]:
    """Marks (by index) that compare equal tokens."""
    fault = Fault("identical_tokens", "both answers have the same tokens: nothing to learn from")
    pairs = [(n, pair) for n, m in enumerate(group.marks) if isinstance(m, Comparison | Ranking) for pair in m.pairs()]
    return {n: fault for n, pair in pairs if rendered[pair.a].ids == rendered[pair.b].ids}
