"""Conversations as prompts and completions, through the chat template of a model.

A chat template is a program of its author's: it may leave a message, a field or the thinking out. So all that a
conversation holds is looked for in what was rendered, and a conversation of which something is missing is refused, with the
name of the field. Only the thinking of earlier turns may go, since many templates drop it by design; that is counted.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import UserError
from stages.problems.templates import THINK_CLOSE, THINK_OPEN
from stages.rewards.chat_rendering import TemplateFault, rendered
from stages.rollout.token_text import TokenText

THINKING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold thinking."""
LINKS = ("id", "type", "index", "tool_call_id")
"""Fields of tool calls and their results that link them with each other; they have no content of their own."""
_WITHOUT_TEXT = "a message without role or text"

Message = dict[str, Any]


class Refused(Exception):
    """Why a row is left out."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    prompt: str
    completion: str
    """What the assistant says last, without the tokenizer's end token."""
    thinking_left_out: bool = False
    """Whether the template leaves out thinking of earlier turns."""


class Chat:
    """Renders conversations with the chat template of a model folder."""

    def __init__(self, folder: Path | None) -> None:
        """The tokenizer is loaded when the first conversation comes."""
        self._folder = folder
        self._text: TokenText | None = None

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """Prompt and completion; `messages` as `read_messages` returns them, `tools` the definitions of tools.

        Raises Refused when the template refuses the conversation, leaves something out, or changes the prompt once there is an
        answer.
        """
        text = self._loaded()
        prompt = self._rendered(messages[:-1], tools, generation=True)
        whole = self._rendered(messages, tools)
        if not whole.startswith(prompt):
            opened = prompt.rstrip().endswith(THINK_OPEN)
            why = f" (it opens the thinking with `{THINK_OPEN}` and the answer does not go on from there)" if opened else ""
            raise Refused(f"the chat template writes the prompt otherwise once there is an answer{why}")
        if tools and self._rendered(messages[:-1], None, generation=True) == prompt:
            raise Refused("the chat template has no place for `tools`")
        thinking_left_out = self._check_contents(messages, whole, prompt)
        for number, message in enumerate(messages):
            for field in message.keys() - {"role", "content"}:
                if self._has(messages, number, field, whole, tools):
                    continue
                if field not in THINKING or number == len(messages) - 1:
                    raise Refused(f"the chat template leaves out `{field}` of a message")
                thinking_left_out = True
        completion = whole[len(prompt) :]
        # Both are put there again when the texts are tokenized.
        end, begin = text.tokenizer.eos_token, text.tokenizer.bos_token_id
        if end and completion.rstrip().endswith(end):
            completion = completion.rstrip().removesuffix(end)
        if text.affixes[0][:1] == [begin]:
            prompt = prompt.removeprefix(text.tokenizer.bos_token)
        if not completion.strip():
            raise Refused("the chat template leaves out a part of the answer")
        return Rendered(prompt, completion, thinking_left_out)

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, generation: bool = False) -> str:
        try:
            return rendered(self._loaded().tokenizer, messages, tools, generation=generation)
        except TemplateFault as error:
            raise Refused(f"the chat template refuses it ({error})") from error

    def _check_contents(self, messages: Sequence[Message], whole: str, prompt: str) -> bool:
        """Raise Refused unless every content is in the text; returns whether thinking of earlier turns is not."""
        squeezed, left_out = _squeezed(whole), False
        for message in messages[:-1]:
            content = _squeezed(message["content"])
            if content in squeezed:
                continue
            if message["role"] != "assistant" or _squeezed(message["content"].split(THINK_CLOSE)[-1]) not in squeezed:
                raise Refused(f"the chat template leaves out a part of a message of `{message['role']}`")
            left_out = True
        answer = _squeezed(messages[-1]["content"])
        # The prompt may have opened the answer (`<think>`), but the answer has to end behind it.
        if squeezed.rfind(answer) + len(answer) <= len(_squeezed(prompt)) and answer:
            raise Refused("the chat template leaves out a part of the answer")
        return left_out

    def _has(self, messages: Sequence[Message], number: int, field: str, whole: str, tools: Sequence[Any] | None) -> bool:
        """Whether the text has all of a message's field, and has it because of the field."""
        message = messages[number]
        texts = list(_texts(message[field], field))
        if not any(text.strip() for text in texts):
            return True
        squeezed = _squeezed(whole)
        if not all(_appears(text, squeezed) for text in texts):
            return False
        without = [*messages[:number], {k: v for k, v in message.items() if k != field}, *messages[number + 1 :]]
        try:
            return self._rendered(without, tools) != whole
        except Refused:  # it cannot do without
            return True

    def _loaded(self) -> TokenText:
        if self._text is None:
            from stages.rollout.torch_engine import load_tokenizer

            mend = "set `tokenizer:` to a stage of kind `model` whose model has a chat template"
            if self._folder is None:
                raise UserError("conversations need a chat template", where="tokenizer", mend=mend)
            tokenizer = load_tokenizer(self._folder)
            if not tokenizer.chat_template:
                raise UserError("the model has no chat template", where="tokenizer", mend=mend)
            self._text = TokenText(tokenizer)
        return self._text


def read_messages(value: Any) -> list[Message]:
    """The messages of a row, as a chat template takes them: fields that are null left out, lists of texts joined.

    Raises Refused when they are no conversation that ends with an answer.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Refused("no list of messages")
    messages = [_message(message) for message in value]
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not _answers(messages[-1]):
        raise Refused("the last of several messages is not an answer of the assistant's")
    return messages


def read_tools(value: Any) -> list[Any] | None:
    """The tool definitions of a row: a list, or one as JSON; None where there are none. Raises Refused for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise Refused("`tools` is no JSON") from error
    if not value:
        return None
    if not isinstance(value, list):
        raise Refused("`tools` is no list of definitions")
    return list(map(_without_nulls, value))


def _message(fields: Mapping[str, Any]) -> Message:
    message = {name: _without_nulls(value) for name, value in fields.items() if value is not None and value != []}
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Refused("a message with a part that is no text")
        content = "".join(str(part.get("text", "")) for part in content)
    message |= {"role": message.get("role"), "content": content}
    if not isinstance(message["role"], str) or not isinstance(content, str) or not all(map(_is_text, _texts(message, ""))):
        raise Refused(_WITHOUT_TEXT)
    return message


def _answers(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _without_nulls(value: Any) -> Any:
    """Without keys whose value is null: parquet gives every record of a column the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _texts(value: Any, field: str) -> Iterator[str]:
    """Every text and number inside a value but for links."""
    if field in LINKS:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, "")
    elif isinstance(value, str):
        yield value
    else:
        yield json.dumps(value, default=str)


def _appears(text: str, squeezed: str) -> bool:
    """Whether a text is there, white space aside: as it is, as JSON, or, of JSON, all that is in it."""
    if any(_squeezed(form) in squeezed for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])):
        return True
    if text in ("true", "false"):
        return text.capitalize() in squeezed
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list) and all(_appears(part, squeezed) for part in _texts(value, ""))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
