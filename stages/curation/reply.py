"""What an endpoint's answer says, whole or in pieces: text, why it ended, tokens. What cannot be read is asked again."""

import json
from collections.abc import AsyncIterator
from typing import Any

from stages.store.unicode_text import replace_surrogates

MOST_TOKENS = 1 << 53
"""From here on a count of tokens is no count; a longer one could not even be printed."""


class NoReply(Exception):
    """No answer came, and another attempt may bring one."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        """`wait_s`: how long the server asks to wait."""
        super().__init__(what)
        self.wait_s = wait_s


def read_whole(raw: str) -> dict[str, Any]:
    """The document of one answer: `text`, `finish`, `model`, `tokens` (None where the server does not say).

    Raises NoReply when it is none.
    """
    body = _json(raw)
    choice = _choice(body)
    message = choice.get("message") if choice else None
    finish = choice.get("finish_reason") if choice else None
    if not isinstance(message, dict) or not isinstance(finish, str):
        raise NoReply(f"an answer without a choice: {_shown(raw)}")
    # No text at all: a model that used up its tokens thinking elsewhere.
    return _document(message.get("content") or "", finish, body)


async def read_stream(pieces: AsyncIterator[bytes]) -> dict[str, Any]:
    """The document of an answer that comes as server-sent events.

    Raises NoReply when the stream ends before the answer does.
    """
    text, finish, last = "", None, dict[str, Any]()
    async for line in _lines(pieces):
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").decode(errors="replace").strip()
        if data == "[DONE]":
            break
        event = _json(data)
        if "error" in event:
            raise NoReply(f"an error in the stream: {_shown(data)}")
        last |= {key: event[key] for key in ("model", "usage") if event.get(key)}
        if choice := _choice(event):
            delta = choice.get("delta")
            piece = delta.get("content") if isinstance(delta, dict) else None
            text += piece if isinstance(piece, str) else ""
            finish = choice.get("finish_reason") or finish
    if not isinstance(finish, str):
        raise NoReply(f"the stream was cut after {len(text)} characters")
    return _document(text, finish, last)


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Whole lines. Only a line feed ends one: a text may hold what Python takes for the end of a line (U+2028, say)."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line


def _json(raw: str) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise NoReply(f"not a JSON object: {_shown(raw)}")
    return body


def _choice(body: dict[str, Any]) -> dict[str, Any] | None:
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None


def _document(text: Any, finish: str, body: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(text, str):
        raise NoReply("an answer whose content is not a text")
    usage = body.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    model = body.get("model")
    return {
        "text": replace_surrogates(text),  # JSON can hold them
        "finish": finish,
        "model": model if isinstance(model, str) else None,
        "tokens": tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and 0 <= tokens < MOST_TOKENS else None,
    }


def _shown(raw: str) -> str:
    return f"`{raw[:80]}`"
