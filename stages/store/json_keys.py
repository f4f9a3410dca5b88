"""JSON objects that name a key twice: Python keeps the last value without a warning."""

from typing import Any


class RepeatedKey(ValueError):
    """A JSON object names a key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its keys and values; meant as `object_pairs_hook` of `json.loads`.

    Raises:
        RepeatedKey: A key is there twice.

    """
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKey(f"the key `{next(name for name in names if names.count(name) > 1)}` twice in one object")
    return values
