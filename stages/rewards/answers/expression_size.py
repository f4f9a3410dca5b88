r"""Whether an expression is too big to be computed, told from its text: powers of powers, factorials, deep nesting.

Such an answer would hold a verifier for its whole limit. Told from the text the verdict (`none`) is the same on every machine.
The estimate bounds the digits of every number on the way, roughly and from above: sums count as products, signs as nothing.

>>> too_big(r"10^{10^{10}}"), too_big("2^{2015}"), too_big("1000000!"), too_big("x^{x^{x}}")
(True, False, True, False)
"""

import math
import re

MOST_DIGITS = 50_000.0
"""Of any number on the way: a power of so many takes sympy milliseconds."""
LARGEST_FACTORIAL = 2_000.0
"""Largest n of n! and of binomials."""
DEEPEST = 40
"""Levels of brackets; the parser takes seconds for a hundred."""

# Digits of other scripts, `²` and the like are signs of their own: what reads them as numbers differs from parser to parser.
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\*\*|[0-9]+(?:,[0-9]{3})*(?:\.[0-9]*)?|\.[0-9]+|[A-Za-z]|\S")
_OPEN, _CLOSE = set("{(["), set("})]")
_SYMBOL = {"e": math.log10(math.e), "\\pi": math.log10(math.pi)}
_CAPS = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|[,;!: ])")


class _TooBig(Exception):
    """Known from here on."""


def too_big(text: str) -> bool:
    """Whether a verifier should not be asked about this text."""
    tokens = _TOKEN.findall(_CAPS.sub(" ", text))
    try:
        position = 0
        while position < len(tokens):  # brackets that close nothing are passed over
            _, position = _product(tokens, position, 0)
            position += 1
    except _TooBig:
        return True
    return False


def _product(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    """log10 of a bound of what stands up to the next closing bracket, and where that is."""
    if depth > DEEPEST:
        raise _TooBig
    total = 0.0
    while position < len(tokens) and tokens[position] not in _CLOSE:
        size, position = _powers(tokens, position, depth)
        total = _checked(total + max(size, 0.0))
    return total, position


def _powers(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    """One factor with its factorials and powers, which are taken from the right."""
    size, position = _atom(tokens, position, depth)
    while position < len(tokens):
        if tokens[position] == "!":
            value = 10.0 ** min(size, 300.0)
            if value > LARGEST_FACTORIAL * 1.001:  # logarithms are rounded
                raise _TooBig
            size, position = _checked(math.lgamma(value + 1) / math.log(10)), position + 1
        elif tokens[position] in ("^", "**"):
            exponent, position = _powers(tokens, position + 1, depth + 1)
            size = _checked(max(abs(size), 0.3) * 10.0 ** min(exponent, 300.0)) if exponent > 0 else size
        else:
            break
    return size, position


def _atom(tokens: list[str], position: int, depth: int) -> tuple[float, int]:
    if depth > DEEPEST:
        raise _TooBig
    if position >= len(tokens):
        return 0.0, position
    token = tokens[position]
    if token in _OPEN:
        size, end = _product(tokens, position + 1, depth + 1)
        return size, end + 1
    if token in ("\\binom", "\\dbinom", "\\tbinom"):
        size, end = _atom(tokens, position + 1, depth + 1)
        if size > math.log10(LARGEST_FACTORIAL):
            raise _TooBig
        return size, end
    if "0" <= token[0] <= "9" or token[0] == ".":
        whole = token.replace(",", "").partition(".")[0].lstrip("0")
        leading = float(f"{whole[0]}.{whole[1:17] or '0'}") if whole else 1.0
        return _checked(max(len(whole) - 1, 0) + math.log10(leading)), position + 1
    if token in ("-", "+"):  # of an exponent without braces: 2^-9
        return _powers(tokens, position + 1, depth + 1)
    return _SYMBOL.get(token, 0.0), position + 1


def _checked(digits: float) -> float:
    if digits > MOST_DIGITS:
        raise _TooBig
    return digits
