r"""A template as a chat template: what is served, or loaded elsewhere, gets the prompts that it was trained with.

A chat template is a Jinja program that a tokenizer carries. For one message of the user's, with the generation prompt, it gives
exactly `Template.render` of that message; answers of before, and further questions, stand in the form of the worked examples.
"""

import json

from stages.problems.templates import Template

NO_SYSTEM = "this model was trained without system messages"
ONE_QUESTION = "this model was trained on single questions: send one message of the user"


def chat_template(template: Template, begin: str = "") -> str:
    """The Jinja text. `begin`: what the tokenizer puts before every text (a beginning-of-text token), in its own words."""
    if template.name == "question":
        refuse = f"{{%- if messages|length != 1 or messages[0].role != 'user' -%}}{_raise(ONE_QUESTION)}{{%- endif -%}}"
        return refuse + _text(begin) + "{{- messages[0].content -}}" + _prompt(template.opened)
    head, separator, tail = template.render("\0").rpartition("User: \0\nAssistant:")
    assert separator, "the template ends with the question"
    head = head.removesuffix("\n\n")
    return (
        f"{_text(begin + head)}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}"
        + '{{- "\\n\\nUser: " + message.content -}}'
        + "{%- elif message.role == 'assistant' -%}"
        + '{{- "\\nAssistant: " + message.content -}}'
        + f"{{%- else -%}}{_raise(NO_SYSTEM)}{{%- endif -%}}"
        "{%- endfor -%}" + _prompt("\nAssistant:" + tail)
    )


def _prompt(text: str) -> str:
    return f"{{%- if add_generation_prompt -%}}{_text(text)}{{%- endif -%}}" if text else ""


def _text(text: str) -> str:
    """A string of Jinja's, in which braces mean nothing. Its escapes are those of JSON but for characters beyond ASCII."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}" if text else ""


def _raise(text: str) -> str:
    return f"{{{{- raise_exception({json.dumps(text)}) -}}}}"
