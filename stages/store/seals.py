"""Seals: a document carries the sha256 of its own content, so that one with a flipped byte in it is never believed.

The content counts, not its spelling: keys in another order or other white space break no seal. A document without a seal (of an
older version, or written by hand) is read as it is; who needs one asks for it.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from stages.contract.errors import UserError
from stages.store.files import digest_json, read_json

SEAL = "seal"
"""Key of the seal."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content and its seal, which comes last."""
    return {**content, SEAL: _digest(content)}


def opened(document: Any) -> dict[str, Any]:
    """The content of a document without its seal.

    Raises ValueError when it is no JSON object, or not what was sealed.
    """
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - pydantic passes on only these
    content = {key: value for key, value in document.items() if key != SEAL}
    try:
        whole = SEAL not in document or document[SEAL] == _digest(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not whole:
        raise ValueError("its content is not what was written")
    return content


def _digest(content: dict[str, Any]) -> str:
    return digest_json(json.loads(json.dumps(content)))  # as it will be read: keys are texts, tuples are lists


class Sealed(BaseModel):
    """A model that is written with its seal, and refuses content under another one's."""

    model_config = ConfigDict(extra="forbid")

    @model_serializer(mode="wrap")
    def _with_seal(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return sealed(content(self))

    @model_validator(mode="before")
    @classmethod
    def _as_sealed(cls, document: Any) -> Any:
        return opened(document) if isinstance(document, dict) else document


def read_document(path: Path, what: str, mend: str) -> dict[str, Any]:
    """The JSON object in a file, whatever its seal says. `what` it is and how to mend it go into the errors.

    Raises UserError when there is none.
    """
    try:
        document = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{what} is missing", where=str(path), mend=mend) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what} cannot be read ({error})", where=str(path), mend=mend) from error
    if not isinstance(document, dict):
        raise UserError(f"{what} is not a JSON object", where=str(path), mend=mend)
    return document
