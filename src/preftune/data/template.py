"""Chat templates: the tokenizer's own, one from a file, or the plain form for a tokenizer that brings none."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from preftune.errors import Refusal
from preftune.records import Group

log = logging.getLogger("preftune")

UNSAID_PLAIN = "the tokenizer has no chat template: messages are rendered with data.template=plain"
# messages as the dialogue text of the HH data: a blank line, the speaker, a colon, the words; the end token after the last
_DIALOGUE = (
    "{% if tools %}{{ raise_exception('the plain form has no words for tools: give data.template=FILE') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}"
    "{{ raise_exception('the plain form has no words for tool calls: give data.template=FILE') }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ '\\n\\n' + {'user': 'Human', 'assistant': 'Assistant'}.get(message['role'], message['role'] | capitalize)"
    " + ': ' + message['content'] }}{% endif %}"
    "{% if loop.last and message['role'] == 'assistant' and not add_generation_prompt %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
_said: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # by tokenizer: a run has one, and renders with it many times


def say_once(tokenizer: Any, line: str) -> None:
    """A warning about a tokenizer, the first time that it is due."""
    said = _said.setdefault(tokenizer, set())
    if line not in said:
        said.add(line)
        log.warning(line)


def apply_template(tokenizer: Any, template: str | None, groups: Iterable[Group] = ()) -> None:
    """Gives the tokenizer the template that a run renders with, so that the saved model is served as it was trained.

    Args:
        tokenizer: of transformers; its `chat_template` is set.
        template: `plain`, or the path of a Jinja file; None: the tokenizer's own. Where it has none and there are messages
            among the groups, the plain one, which is said.
        groups: what will be rendered.
    """
    if template is None:
        if getattr(tokenizer, "chat_template", None) or all(isinstance(group.prompt, str) for group in groups):
            return
        say_once(tokenizer, UNSAID_PLAIN)
    tokenizer.chat_template = template_text(tokenizer, template)


def template_text(tokenizer: Any, template: str | None) -> str | None:
    """The Jinja text that messages are rendered with; None: the tokenizer's own."""
    if template == "plain" or (template is None and not getattr(tokenizer, "chat_template", None)):
        return _plain(tokenizer)
    return None if template is None else read_template(template)


def _plain(tokenizer: Any) -> str:
    """A template writes its own start token: this one where the tokenizer writes it before plain text."""
    start = tokenizer.bos_token_id
    written = start is not None and tokenizer("a")["input_ids"][0] == start
    return ("{{ bos_token }}" if written else "") + _DIALOGUE


def read_template(path: str, *, key: str = "data.template") -> str:
    """The text of a Jinja file.

    Raises:
        Refusal: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        line = f"the chat template {path} cannot be read ({why}): give a Jinja file, or plain"
        raise Refusal(line, code="bad_template", key=key) from error
