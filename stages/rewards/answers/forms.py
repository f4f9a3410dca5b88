"""The forms of final answers: lists, tuples, intervals, relations, quantities, words. form_reader.py finds them in a text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Formula:
    """What only algebra reads; in the notation of `plain_text`."""

    text: str


@dataclass(frozen=True)
class Words:
    """Text that is no mathematics."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A letter of multiple choice, `(C)`, perhaps with what stands behind it: `(C) 12`."""

    letter: str
    content: "Form | None" = None


@dataclass(frozen=True)
class Quantity:
    """An amount with its unit; `%`, `deg` and currencies are units."""

    amount: "Form"
    unit: str


@dataclass(frozen=True)
class Clock:
    """A time of day, or hours and minutes, or minutes and seconds."""

    parts: tuple[int, ...]
    half: Literal["", "am", "pm"]


@dataclass(frozen=True)
class Ratio:
    """`1:2:3`."""

    parts: tuple["Form", ...]


@dataclass(frozen=True)
class Based:
    """Digits in a base: `52_8`."""

    digits: str
    base: int


@dataclass(frozen=True)
class Several:
    """Answers side by side, in any order; `joined` is `,`, `or`, `and`, or `dots` where some are left out."""

    items: tuple["Form", ...]
    joined: str


@dataclass(frozen=True)
class Braces:
    """A set written by its elements."""

    items: tuple["Form", ...]


@dataclass(frozen=True)
class Builder:
    """A set written by a condition."""

    variable: str
    condition: "Form"


@dataclass(frozen=True)
class Sequence:
    """A tuple, point or vector: ordered. `square`: written in square brackets."""

    items: tuple["Form", ...]
    square: bool = False


@dataclass(frozen=True)
class Interval:
    """An interval that is no pair; an open one in round brackets is a `Sequence` of two."""

    left: "Form"
    right: "Form"
    left_closed: bool
    right_closed: bool


@dataclass(frozen=True)
class Operation:
    r"""Sets joined by `\cup`, `\\cap` or `\\setminus`."""

    sign: str
    parts: tuple["Form", ...]


@dataclass(frozen=True)
class NamedSet:
    """`R`, `Z`, `N`, `Q`, `C`, or `empty`."""

    name: str


@dataclass(frozen=True)
class Relation:
    """A chain of sides with the signs between them: `=`, `<`, `>`, `<=`, `>=`, `!=`, `in`."""

    sides: tuple["Form", ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """A matrix by its rows."""

    rows: tuple[tuple["Form", ...], ...]


Form = (
    Formula | Words | Choice | Quantity | Clock | Ratio | Based | Several | Braces | Builder | Sequence | Interval | Operation
    | NamedSet | Relation | Matrix
)  # fmt: skip
Read = Callable[[str], Form]
"""How a reader of a form reads its parts."""
