"""YAML as a recipe uses it: what YAML 1.1 reads as something else than it looks like is a string, or refused by name."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import yaml

from stages.contract.errors import UserError

MOST_VALUES, DEEPEST = 20_000, 40
"""Values in a configuration file, and levels of them, of which more are a mistake (or an attack)."""
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_BOOL, _TIMESTAMP, _STRING, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "timestamp", "str", "merge"))


class _Loader(yaml.SafeLoader):
    """Only `true` and `false` are booleans (YAML 1.1 has `no`, `on` …), and dates are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))


def read_yaml(text: str, where: str, mend: str) -> Any:
    """The values of a YAML text.

    Raises UserError when it is not YAML, has a key twice, or has values that no recipe can have.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        what = f"not valid YAML (the character U+{error.character:04X} is not allowed in it)"
        raise UserError(what, where=where, mend=mend) from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, where)
        document = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise _syntax_error(error, where, mend) from error
    except RecursionError as error:
        raise UserError("nested too deeply", where=where, mend=mend) from error
    except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
        # What PyYAML's constructors say of `0x_`, `!!bool x` and the like.
        raise UserError(f"a value cannot be read ({error})", where=where, mend=mend) from error
    finally:
        loader.dispose()
    _check_values(document, where)
    return document


def _syntax_error(error: yaml.YAMLError, where: str, mend: str) -> UserError:
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or "")
    place = f"{where}: line {mark.line + 1}" if mark else where
    if r"\t" in problem:
        return UserError("not valid YAML (a tab where a value or key should begin)", where=place, mend="indent with spaces")
    return UserError(f"not valid YAML ({problem})" if problem else "not valid YAML", where=place, mend=mend)


def _check_nodes(root: yaml.Node, where: str) -> None:
    """Raise UserError for a key that is there twice or is no text, and for numbers that are not what they look like."""
    waiting: list[tuple[yaml.Node, tuple[str, ...]]] = [(root, ())]
    seen: set[int] = set()
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:  # by an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, path, where)
            waiting += [(value, (*path, str(key.value))) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(value, (*path, str(number))) for number, value in enumerate(node.value)]
        elif isinstance(node, yaml.ScalarNode):
            _check_number(node, f"{where}: line {_line(node)}")


def _check_keys(node: yaml.MappingNode, path: tuple[str, ...], where: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        place = f"{where}: line {_line(key)}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError("a key is a list or a mapping", where=place, mend="keys are names")
        if key.tag not in (_STRING, _MERGE):
            what = f"the key `{key.value}` is not read as a name (YAML: {key.tag.rpartition(':')[2]})"
            raise UserError(what, where=place, mend=f'write "{key.value}" in quotes, or choose another name')
        if key.value in lines:
            dotted = ".".join([*path, key.value])
            what = f"`{dotted}` is there twice, in lines {lines[key.value]} and {_line(key)}"
            raise UserError(what, where=place, mend="remove one of them")
        lines[key.value] = _line(key)


def _check_number(node: yaml.ScalarNode, place: str) -> None:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "int" and _OCTAL.fullmatch(text):
        plain = text.replace("_", "").lstrip("+-0") or "0"
        mend = f'write {plain} for a decimal number, "{text}" in quotes for a text'
        raise UserError(f"`{text}` is an octal number in YAML", where=place, mend=mend)
    if kind in ("int", "float") and ":" in text:
        mend = f'write "{text}" in quotes for a text'
        raise UserError(f"`{text}` is a number to base 60 in YAML", where=place, mend=mend)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _check_values(document: Any, where: str) -> None:
    """Raise UserError for what YAML can say and nothing here can use: endless values, huge numbers, half characters."""
    count = 0
    level: list[Any] = [[document]]
    for _ in range(DEEPEST):
        # An alias is walked as often as it is named: that is how often it would be read.
        level = list(itertools.islice((item for value in level for item in _below(value)), MOST_VALUES + 1))
        count += len(level)
        if not level or count > MOST_VALUES:
            break
        for value in level:
            if isinstance(value, int) and abs(value) >= 2**63:
                raise UserError("a number has more than 64 bits", where=where, mend="make it smaller")
            if isinstance(value, str) and not _is_text(value):
                raise UserError(f"`{value[:40]}` has half a character in it", where=where, mend="write it as UTF-8")
    if level:
        what = f"more than {MOST_VALUES:,} values, or nested more than {DEEPEST} deep"
        raise UserError(what, where=where, mend="name no alias inside itself, and few of many values")


def _below(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
