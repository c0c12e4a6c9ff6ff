"""preftune chat: talk to a model or a run."""

from __future__ import annotations

import sys
from typing import Any

from preftune.config import resolve
from preftune.errors import Refusal
from preftune.keys import ChatKeys
from preftune.models import inspect
from preftune.records import Group, Message
from preftune.runs.prepare import check_template

HELP = "Type a message. /reset forgets the conversation, /quit (or Ctrl-D) ends it."
NO_TEMPLATE = "The model has no chat template: it continues what you type (template=plain makes it a dialogue)."


def run(words: list[str], as_json: bool) -> None:
    keys = resolve(ChatKeys, words)
    if as_json:
        raise Refusal("a conversation is not one JSON document; generate writes JSON", code="usage")
    check_template(keys.template, key="template")
    inspect.check_vocabulary(inspect.facts(inspect.resolve(keys.model, "model"), "model"))
    from preftune.data.render import render_prompts
    from preftune.models.load import load_model, load_tokenizer, max_positions
    from preftune.training.precision import DTYPES

    tokenizer = load_tokenizer(keys.model, trust_remote_code=keys.trust_remote_code)
    templated = keys.template is not None or bool(tokenizer.chat_template)
    start = (Message("system", keys.system),) if keys.system else ()
    if templated:  # a template that refuses every conversation does so now, not at the first message
        render_prompts([Group((*start, Message("user", "Hello")))], tokenizer, template=keys.template)
    model = load_model(keys.model, dtype=DTYPES[keys.dtype or "float32"], trust_remote_code=keys.trust_remote_code)
    print(HELP if templated else f"{HELP} {NO_TEMPLATE}", file=sys.stderr)
    turns: tuple[Message, ...] = start
    while (line := _ask()) is not None:
        if line == "/reset":
            turns = start
            continue
        turns = (*turns, Message("user", line))
        prompt = Group(turns) if templated else Group((keys.system or "") + line)
        ids = render_prompts([prompt], tokenizer, template=keys.template)[0]
        limit = max_positions(model)
        room = keys.max_new_tokens if limit is None else min(keys.max_new_tokens, limit - len(ids))
        if room < 1:
            print(f"(the conversation fills the model's {limit} positions: /reset starts a new one)", file=sys.stderr)
            turns = turns[:-1]
            continue
        answer = _answer(model, tokenizer, ids, keys, room, seed=keys.seed + len(turns))
        turns = (*turns, Message("assistant", answer))


def _ask() -> str | None:
    """The next line that is not blank; None at the end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line == "/quit":
            return None
        if line:
            return line


def _answer(model: Any, tokenizer: Any, ids: tuple[int, ...], keys: ChatKeys, room: int, *, seed: int) -> str:
    """Prints the answer as it comes, and returns it."""
    from transformers import TextStreamer

    from preftune.generation.sample import Sampling, sample

    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    how = Sampling(temperature=keys.temperature, top_p=keys.top_p, max_new_tokens=room, seed=seed)
    return sample(model, tokenizer, [ids], how, streamer=streamer)[0].text
