"""A model's chat template rendered as transformers does, without its imports (3 s): a sandbox that cannot change anything."""

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn


class TemplateFault(Exception):
    """Why a template cannot be rendered."""


def render_chat(template: str, messages: Sequence[Any], tokens: Mapping[str, str]) -> str:
    """The text of a conversation; after a user's message with the generation prompt. `tokens`: special tokens by name.

    Raises TemplateFault for whatever the template does.
    """
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant says; here it is only read over."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            """The nodes between the marks, in a scope of their own."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False, default=str)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: dt.datetime.now(dt.UTC).strftime(form)
    asks = bool(messages) and messages[-1].get("role") == "user"
    try:
        text = environment.from_string(template).render(
            messages=list(messages), tools=None, documents=None, add_generation_prompt=asks, **tokens
        )
    except Exception as error:
        raise TemplateFault((str(error).strip() or type(error).__name__).splitlines()[0][:300]) from error
    return str(text)


def _raise(message: object) -> NoReturn:
    raise TemplateFault(str(message))
