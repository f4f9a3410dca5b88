"""Asserts about a program, judged outside of it: the program is asked for values, and the assertion is checked here.

An assert that ran inside would be the program's to win (it can exit first, override `__eq__`, or replace `assert`'s helpers).
So every call of the program's functions is cut out of the assertion and sent alone; plain values come back; what is left, with
the expected result, is worked out here by a small interpreter that knows literals, comparisons, arithmetic and a few functions.
What only asks for a truth (`assert is_prime(7)`) can be guessed by a program, as any test of one bit can.
"""

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class UnreadableTests(Exception):
    """The reference is no set of tests that can be judged."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold of a program."""

    text: str
    """As the reference states it; for people."""
    asked: tuple[str, ...]
    """Expressions that the program's process evaluates."""
    holds: Callable[[list[Any]], bool]
    """Whether their values are right."""


LONGEST_INT = 10_000
"""Hexadecimal digits of an int that a program may give back: to reckon with longer ones takes long."""


class Opaque:
    """A value of a type that does not travel; equal to nothing."""


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "all": all,
    "any": any,
    "bool": bool,
    "dict": dict,
    "float": float,
    "frozenset": frozenset,
    "int": int,
    "len": len,
    "list": list,
    "math.isclose": math.isclose,
    "max": max,
    "min": min,
    "round": round,
    "set": set,
    "sorted": sorted,
    "str": str,
    "sum": sum,
    "tuple": tuple,
}
"""What an assertion may call outside the program."""
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
# No power and no shift: with a number of the program's choice they would fill the memory of the judge.
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_DISPLAYS: dict[type, Callable[[list[Any]], Any]] = {ast.List: list, ast.Tuple: tuple, ast.Set: set}


def read_asserts(text: str) -> list[Check]:
    """The assertions of a text of `assert` statements. `UnreadableTests` when there is something else in it, but imports.

    >>> check = read_asserts("assert sorted(f([2, 1])) == [1, 2]")[0]
    >>> check.asked, check.holds([[2, 1]]), check.holds([[2]])
    (('f([2, 1])',), True, False)
    """
    try:
        statements = ast.parse(text).body
        found = [_check(s.test) for s in statements if isinstance(s, ast.Assert)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnreadableTests(f"not Python: {error}") from error
    strange = [s for s in statements if not isinstance(s, ast.Assert | ast.Import | ast.ImportFrom)]
    if strange or not found:
        raise UnreadableTests(f"not a list of asserts: {ast.unparse(strange[0])[:80] if strange else text[:80]!r}")
    return found


def _check(test: ast.expr) -> Check:
    asked: list[str] = []
    work_out = _reader(test, asked)
    if not asked:
        raise UnreadableTests(f"asks nothing of the program: {ast.unparse(test)[:80]}")
    return Check(f"assert {ast.unparse(test)}", tuple(asked), lambda values: bool(work_out(values)))


def _function_name(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def _of_program(node: ast.expr) -> bool:
    """Whether it is a call, or an item or attribute of one, that begins with a name of the program."""
    calls = False
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Call):
            if _function_name(node.func) in FUNCTIONS:
                return False
            calls = True
        node = node.func if isinstance(node, ast.Call) else node.value
    return calls and isinstance(node, ast.Name)


def _reader(node: ast.expr, asked: list[str]) -> Callable[[list[Any]], Any]:
    """A function from the values of what is `asked` (extended here) to the value of the node."""
    if _of_program(node):
        asked.append(ast.unparse(node))
        place = len(asked) - 1
        return lambda values: values[place]
    match node:
        case ast.Constant(value=constant):
            return lambda _: constant
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            make, parts = _DISPLAYS[type(node)], [_reader(item, asked) for item in items]
            return lambda values: make([part(values) for part in parts])
        case ast.Dict(keys=keys, values=items) if None not in keys:
            pairs = [(_reader(k, asked), _reader(v, asked)) for k, v in zip(keys, items, strict=True) if k is not None]
            return lambda values: {key(values): item(values) for key, item in pairs}
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            change, inner = _UNARY[type(op)], _reader(operand, asked)
            return lambda values: change(inner(values))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
            a, b = _reader(left, asked), _reader(right, asked)
            return lambda values: _ARITHMETIC[type(op)](_number(a(values)), _number(b(values)))
        case ast.BoolOp(op=op, values=items):
            parts, every = [_reader(item, asked) for item in items], isinstance(op, ast.And)
            return lambda values: all(p(values) for p in parts) if every else any(p(values) for p in parts)
        case ast.Compare(left=first, ops=ops, comparators=others):
            parts = [_reader(item, asked) for item in (first, *others)]
            compare = [_COMPARE[type(op)] for op in ops]
            return lambda values: all(f(a(values), b(values)) for f, a, b in zip(compare, parts, parts[1:], strict=False))
        case ast.Subscript(value=inner_node, slice=index):
            holder, key = _reader(inner_node, asked), _reader(index, asked)
            return lambda values: holder(values)[key(values)]
        case ast.Call(func=function, args=arguments, keywords=named) if _function_name(function) in FUNCTIONS:
            call, parts = FUNCTIONS[_function_name(function)], [_reader(item, asked) for item in arguments]
            by_name = {word.arg: _reader(word.value, asked) for word in named if word.arg is not None}
            return lambda values: call(*(p(values) for p in parts), **{name: p(values) for name, p in by_name.items()})
    raise UnreadableTests(f"cannot judge `{ast.unparse(node)[:80]}`")


def _number(value: Any) -> Any:
    """What may be reckoned with: a text times a number of the program's choice would fill the memory."""
    if not isinstance(value, int | float):
        raise TypeError("not a number")
    return value


def decode(value: Any) -> Any:
    """A value as the program's process encoded it (`sandbox_boot.encode`). `ValueError`, `TypeError` when it is none."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tuple":
            return tuple(decode(item) for item in content)
        case "set":
            return {decode(item) for item in content}
        case "dict":
            return {decode(key): decode(item) for key, item in content}
        case "bytes":
            return bytes.fromhex(content)
        case "int" if len(content) <= LONGEST_INT:
            return int(content, 16)
        case "object":
            return Opaque()
    raise ValueError(f"no such kind of value: {kind}")
