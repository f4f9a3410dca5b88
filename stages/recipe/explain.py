"""A validation error of pydantic's as one line: file and key, what is wrong, what to write."""

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.recipe.load import Origins, place_of


def explain(error: ValidationError, model: type[BaseModel], path: tuple[str, ...], origins: Origins) -> UserError:
    """The first mistake of a validation as one line: file and key, what, mend."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # Tags of unions appear in pydantic's location but not in the file.
    location = tuple(str(part) for part in first["loc"])
    keys = tuple(part for part in location if not _is_tag(part, model))
    where = place_of((*path, *keys), origins)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return UserError(f"unknown key `{location[-1]}`", where=where, mend=nearest(location[-1], known))
    message = str(first["msg"]).removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    mend = _doc_at(model, location)
    if given is None:
        mend = "null is no value here: remove the key"
    elif first["type"] == "string_type" and isinstance(given, int | float):
        mend = f'write "{given}" in quotes'
    if first["type"] == "literal_error" and isinstance(given, str):
        near = nearest(given, re.findall(r"'([^']+)'", first["ctx"]["expected"]))
        mend = near if near.startswith("did") else mend
    return UserError(f"{message[:1].lower()}{message[1:]}{shown}", where=where, mend=mend)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every model in an annotation, such as those of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def _is_tag(part: str, model: type[BaseModel]) -> bool:
    """Whether `part` is the tag of a discriminated union somewhere below `model` (a value of `source`, say)."""
    for field in model.model_fields.values():
        for below in models_in(field.annotation):
            switch = below.model_fields.get("source")
            if switch is not None and part in get_args(switch.annotation):
                return True
            if below is not model and _is_tag(part, below):
                return True
    return False


def _candidates(model: type[BaseModel], location: tuple[str, ...]) -> list[type[BaseModel]]:
    models = [model]
    for part in location:
        tagged = [m for m in models if "source" in m.model_fields and part in get_args(m.model_fields["source"].annotation)]
        if tagged:
            models = tagged
            continue
        inside = [m for model in models if part in model.model_fields for m in models_in(model.model_fields[part].annotation)]
        models = inside or models
    return models


def _fields_at(model: type[BaseModel], location: tuple[str, ...]) -> set[str]:
    return {name for m in _candidates(model, location) for name in m.model_fields}


def _doc_at(model: type[BaseModel], location: tuple[str, ...]) -> str:
    if not location:
        return ""
    for candidate in _candidates(model, location[:-1]):
        field = candidate.model_fields.get(location[-1])
        if field is not None and field.description:
            return f"`{location[-1]}` is: {field.description.splitlines()[0].rstrip('.')}"
    return ""
