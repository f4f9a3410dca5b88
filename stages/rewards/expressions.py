r"""Comparing mathematical expressions with math-verify; runs in a worker process, without a limit of its own.

>>> judge(r"\frac{1}{2}", "0.5"), judge("5", "5 or 6"), judge("", "5")
('right', 'wrong', 'none')
"""

import re

_BASED = re.compile(r"\$?([0-9]+)_\{?([0-9]+)\}?\$?")
_WARMING = (
    r"\frac{1}{2}",
    r"\sqrt{2}+x^{2}",
    "(1,2]",
    r"\{1,2\}",
    r"\text{east}",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    "x=5",
)


def warm() -> None:
    """Use the parser once: its tables are made as it goes, which costs the first answers seconds."""
    for text in _WARMING:
        judge(text, text + "+1")


def judge(reference: str, answer: str) -> str:
    """`right`, `wrong`, or `none` when the reference cannot be read."""
    from math_verify import parse, verify

    numbers = _in_base(reference), _in_base(answer)
    if None not in numbers:  # math-verify drops the base
        return "right" if numbers[0] == numbers[1] else "wrong"
    sides = answer.split("=")
    if len(sides) > 1 and "=" not in reference and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", sides[0])):
        # `4 = 5`: math-verify looks at the last side alone. `x = 5` it reads as people do.
        found = [judge(reference, side) for side in sides]
        return next((verdict for verdict in ("none", "wrong") if verdict in found), "right")
    gold = parse(_boxed(reference), parsing_timeout=None)
    if not gold:
        return "none"
    found = parse(_boxed(answer), parsing_timeout=None)
    return "right" if verify(gold, found, timeout_seconds=None) else "wrong"


def _boxed(text: str) -> str:
    """The text as one boxed expression: math-verify then reads the whole of it instead of picking what looks best."""
    plain = " ".join(text.split())
    if (whole := re.fullmatch(r"\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\]", plain)) is not None:
        plain = next(part for part in whole.groups() if part)
    return plain if plain.startswith("\\boxed{") else f"\\boxed{{{plain}}}"


def _in_base(text: str) -> int | None:
    """The value of a number with its base, such as `52_8`."""
    match = _BASED.fullmatch(text.strip())
    try:
        return int(match[1], int(match[2])) if match else None
    except ValueError:  # a digit that the base has not
        return None
