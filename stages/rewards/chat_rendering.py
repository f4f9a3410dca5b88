"""Chat templates rendered in a killable process: a template is a program of whoever made the model.

transformers renders templates in jinja2's immutable sandbox, which keeps them from everything but what they are given. It has
no limit of time or size: two nested loops over `range(99999)` run for hours, and `'x' * 10**10` takes all memory. Here the
kernel ends such a template, and the caller gets a TemplateFault.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.rewards.verifier_pool.pool import Limits, shared_pool

FUNCTION = "stages.rewards.chat_rendering:render"
LIMITS = Limits(cpu_s=5.0, wall_s=60.0, memory_bytes=1 << 30, reply_bytes=1 << 26)
"""Of one conversation, which takes milliseconds: seconds of processor time and by the clock, bytes of memory and of text."""


class TemplateFault(Exception):
    """Why a template gave no text: what it raised, or the limit that it passed."""


def rendered(tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any] | None = None, *, generation: bool = False) -> str:
    """Render a conversation with a tokenizer's chat template, as its `apply_chat_template` does.

    Args:
        tokenizer: A tokenizer that has a chat template.
        messages: The conversation, of JSON values.
        tools: Definitions of tools, for templates that have a place for them.
        generation: Whether the prompt for the assistant's next turn follows.

    Raises:
        TemplateFault: The template raises, passes a limit, or gets a value that JSON does not have.

    """
    given_tools = list(tools) if tools else None
    template = tokenizer.get_chat_template(None, given_tools)
    request = [template, list(messages), given_tools, generation, dict(tokenizer.special_tokens_map)]
    try:
        reply = shared_pool(FUNCTION, LIMITS, 1).ask([request])[0]
    except TypeError as error:  # from JSON
        raise TemplateFault(str(error)) from error
    if not isinstance(reply.value, str):
        raise TemplateFault(_reason(reply.fault))
    return reply.value


def _reason(fault: str) -> str:
    ended = f"it takes more than {LIMITS.cpu_s:g} s or {LIMITS.memory_bytes >> 30} GiB of memory"
    return (
        ended if fault in ("ended", "MemoryError") else fault.removeprefix("TemplateError: ")
    )  # what the template itself raises


def warm() -> None:
    """Import transformers before the first limit runs."""
    import transformers.utils.chat_template_utils  # noqa: F401


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    generation: bool,
    special: Mapping[str, Any],
) -> str:
    """Render one conversation; runs in the worker's process, where it may take what `LIMITS` allows."""
    from transformers.utils.chat_template_utils import render_jinja_template

    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    texts, _ = render_jinja_template([plain], tools=tools, chat_template=template, add_generation_prompt=generation, **special)
    return str(texts[0])
