"""An OpenAI-compatible endpoint: where it is, which model answers, what may be spent.

No HTTP here: a recipe is checked without it. The key is read from the environment variable that is named, and written nowhere.
"""

import os
import re
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from stages.contract.config import EXECUTION, Config
from stages.contract.errors import RESUME, UserError
from stages.contract.secrets import declare


class Endpoint(Config):
    """A server that speaks OpenAI's protocol for chats (`/chat/completions`)."""

    url: Annotated[str, EXECUTION]
    """Its address up to the version, such as `http://127.0.0.1:8000/v1`; the same model elsewhere is the same model."""
    model: str = Field(min_length=1)
    """The model's name there."""
    key_variable: Annotated[str | None, EXECUTION] = None
    """Name of the environment variable that holds the API key (never the key itself); null: no key is sent."""
    temperature: float = Field(default=0.6, ge=0, le=2)
    """Sampling temperature of its answers."""
    max_tokens: int = Field(default=4096, ge=1)
    """Longest answer in tokens; a longer one is cut, and dropped."""
    body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, such as `{top_p: 0.95, seed: 1}`."""
    stream: Annotated[bool, EXECUTION] = False
    """Whether answers are asked for piece by piece: for long answers through proxies that cut silent connections."""
    concurrency: Annotated[int, EXECUTION] = Field(default=8, ge=1, le=1024)
    """Most requests at once; no more than the chosen answers of a chunk either."""
    timeout_s: Annotated[float, EXECUTION] = Field(default=300.0, gt=0)
    """Seconds that a whole answer may take; streamed: seconds of silence."""
    attempts: Annotated[int, EXECUTION] = Field(default=6, ge=1)
    """Times that a request is sent before the stage gives up (it can be resumed)."""
    wait_s: Annotated[float, EXECUTION] = Field(default=1.0, gt=0)
    """Seconds before the second attempt, if the server names none; doubled with each further one."""
    longest_wait_s: Annotated[float, EXECUTION] = Field(default=60.0, gt=0)
    """Most seconds between two attempts; a server that asks for more ends the stage (it can be resumed)."""
    most_requests: Annotated[int | None, EXECUTION] = Field(default=None, ge=1)
    """Answers that may be asked for, over all attempts of the stage; null: no limit. At it the stage stops and can go on."""
    most_tokens: Annotated[int | None, EXECUTION] = Field(default=None, ge=1)
    """Tokens read and written that may be spent, over all attempts of the stage; null: no limit. It is never exceeded: a
    request that could is not sent (a byte of its text counts as a token, its answer as `max_tokens`)."""

    # On the whole model, whose values a message never quotes: what is wrong may be a key.
    @model_validator(mode="after")
    def _nothing_secret(self) -> Self:
        if self.key_variable is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise ValueError("key_variable should be the name of an environment variable (never the key itself)")
        if self.key_variable is not None:
            declare(self.key_variable)
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url should be an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("url should hold neither a name, a password nor a query: they would be written down")
        if taken := sorted(
            self.body.keys() & {"model", "messages", "temperature", "max_tokens", "stream", "stream_options", "n"}
        ):
            raise ValueError(f"body should not hold `{taken[0]}`")
        return self

    def key(self) -> str | None:
        """The API key.

        Raises UserError when its variable is not set.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            what, mend = f"the environment variable `{self.key_variable}` is not set", f"set it, then go on with `{RESUME}`"
            raise UserError(what, where="rewrite.endpoint.key_variable", mend=mend)
        return key
