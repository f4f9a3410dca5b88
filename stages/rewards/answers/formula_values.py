"""The values of formulas, and whether two of them are the same."""

import re
from fractions import Fraction

import sympy
from sympy import Expr, Rational, Symbol

from stages.rewards.answers import forms
from stages.rewards.answers.equality import equal
from stages.rewards.answers.forms import Form
from stages.rewards.answers.formula import Uncommon, Unreadable, read_formula

_DECIMAL = re.compile(r"[+-]?\s*(?:[0-9][0-9,]*)?\.[0-9]+(?:[eE][+-]?[0-9]+|\s*\\(?:times|cdot)\s*10\s*\^.*)?")


def same_formula(a: Form, b: Form) -> bool:
    """Whether two formulas are equal by the rules of equality.py; what cannot be read equals nothing.

    >>> same_formula(forms.Formula("2^{-3}"), forms.Formula("0.125")), same_formula(forms.Formula("2 3"), forms.Formula("2 3"))
    (True, False)
    """
    assert isinstance(a, forms.Formula) and isinstance(b, forms.Formula)
    values = value_of(a), value_of(b)
    if values[0] is None or values[1] is None:
        return False
    return equal(values[0], values[1], a_decimal=is_decimal(a), b_decimal=is_decimal(b))


def is_decimal(form: Form) -> bool:
    """Whether a form is one decimal with a point, perhaps times a power of ten."""
    return isinstance(form, forms.Formula) and _DECIMAL.fullmatch(form.text) is not None


def value_of(form: Form) -> Expr | None:
    """The value of a formula, or None when it has none."""
    if isinstance(form, forms.Quantity):
        return value_of(form.amount)
    if not isinstance(form, forms.Formula):
        return None
    try:
        return read_formula(form.text)
    except Uncommon:
        return _read_by_math_verify(form.text)
    except Unreadable:
        return None


def _read_by_math_verify(text: str) -> Expr | None:
    from math_verify import parse

    parsed = parse(f"\\boxed{{{text}}}", parsing_timeout=None)
    if not parsed or not isinstance(parsed[0], Expr):
        return None
    value = parsed[0].doit()
    value = value.replace(lambda part: part.is_Float, lambda part: sympy.nsimplify(part, rational=True))
    value = value.xreplace({Symbol("i"): sympy.I})
    return None if value.has(sympy.nan, sympy.zoo) or not isinstance(value, Expr) else value


def same_value(a: Form, b: Form, a_size: Fraction, b_size: Fraction) -> bool:
    """Whether two amounts are equal in units of the given sizes."""
    values = value_of(a), value_of(b)
    if values[0] is None or values[1] is None:
        return False
    left, right = (
        v * Rational(s.numerator, s.denominator) for v, s in zip(values, (a_size, b_size), strict=True) if v is not None
    )
    return equal(left, right, a_decimal=is_decimal(a), b_decimal=is_decimal(b))
