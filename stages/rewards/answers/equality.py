r"""Whether two sympy expressions are equal: exact for rationals, to many digits for irrationals, by points for functions.

The rules:

* Two rationals (decimals are rationals) are equal when they are the same number. There is no tolerance: 0.333333 is not 1/3.
* A decimal with a point stands for an irrational when it agrees to a relative `DECIMAL_TOLERANCE`, that is to 7 significant
  digits: 1.41421356 is the square root of 2, 1.41 is not.
* Two other numbers are equal when they agree to `DIGITS` significant digits.
* Two expressions with variables are equal when they agree to 25 digits at every one of the points where both are real; where
  there are too few such points, when their difference expands to 0.
"""

import sympy
from sympy import Expr, Integer, Rational

DECIMAL_TOLERANCE = Rational(1, 2_000_000)
DIGITS = 110
_POINTS = (
    ("13/7", "5/3", "19/11", "23/13", "31/17"),
    ("-17/9", "7/5", "-29/13", "11/19", "-3/7"),
    ("2/9", "-13/11", "37/7", "-5/17", "41/3"),
    ("-53/7", "-43/9", "3/13", "61/11", "-2/19"),
    ("101/13", "1/7", "-8/3", "-71/5", "9/23"),
)
_WHOLE = ((2, 3, 5, 7, 11), (3, 7, 2, 5, 13), (4, 6, 9, 1, 8), (5, 2, 3, 10, 6))
_POINT_DIGITS, _POINT_AGREE = 40, Rational(1, 10**25)
ENOUGH_POINTS = 2


def equal(a: Expr, b: Expr, *, a_decimal: bool = False, b_decimal: bool = False) -> bool:
    """Whether two expressions have the same value.

    Args:
        a: From `read_formula`.
        b: The other one.
        a_decimal: Whether `a` was written as a decimal with a point, which may stand for an irrational.
        b_decimal: The same of `b`.

    >>> equal(Rational(1, 10**20), Rational(2, 10**20)), equal(sympy.sqrt(8), 2 * sympy.sqrt(2))
    (False, True)
    >>> [equal(sympy.sqrt(2), Rational(text), b_decimal=True) for text in ("1.41421356", "1.41")]
    [True, False]

    """
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    symbols = a.free_symbols | b.free_symbols
    if symbols or a.has(sympy.core.function.AppliedUndef) or b.has(sympy.core.function.AppliedUndef):
        return _equal_functions(a, b)
    if a.has(sympy.oo, sympy.zoo, sympy.nan) or b.has(sympy.oo, sympy.zoo, sympy.nan):
        return False
    if (a_decimal and a.is_Rational) or (b_decimal and b.is_Rational):
        return _agree(a, b, 30, DECIMAL_TOLERANCE)
    difference = a - b
    if difference.is_Rational:
        return bool(difference == 0)
    return _agree(a, b, 30, Rational(1, 10**20)) and _agree(a, b, DIGITS + 20, Rational(1, 10**DIGITS))


def _agree(a: Expr, b: Expr, digits: int, tolerance: Rational) -> bool:
    """Whether two numbers agree within a relative tolerance."""
    left, right = a.evalf(digits), b.evalf(digits)
    if not (left.is_number and right.is_number) or left.has(sympy.nan, sympy.zoo) or right.has(sympy.nan, sympy.zoo):
        return False
    return bool(_size(left - right) <= tolerance * max(_size(left), _size(right)))


def _size(value: Expr) -> Expr:
    """The absolute value of a number; 0 for one of which no digit is certain, which is what sympy makes of an exact 0."""
    size = abs(value).evalf(_POINT_DIGITS)
    return size if size.is_comparable else Integer(0)


def proportional(a: Expr, b: Expr) -> Expr | None:
    """The number c with a = c·b for all values of the variables, or None; c is never 0."""
    if a == 0 or b == 0:
        return None
    ratio = _cancelled(a / b)
    if ratio.free_symbols:
        above, below = sympy.fraction(sympy.together(a))[0], sympy.fraction(sympy.together(b))[0]
        ratio = _cancelled(above / below)
    if ratio.free_symbols or ratio == 0 or ratio.has(sympy.oo, sympy.zoo, sympy.nan, sympy.core.function.AppliedUndef):
        return None
    return ratio


def _cancelled(ratio: Expr) -> Expr:
    try:
        return sympy.cancel(ratio)
    except sympy.PolynomialError:
        return sympy.simplify(ratio)


def _equal_functions(a: Expr, b: Expr) -> bool:
    if a.has(sympy.core.function.AppliedUndef) or b.has(sympy.core.function.AppliedUndef):
        applied = sorted(a.atoms(sympy.core.function.AppliedUndef) | b.atoms(sympy.core.function.AppliedUndef), key=str)
        names = {value: sympy.Symbol(f"value{n}") for n, value in enumerate(applied)}
        return equal(a.xreplace(names), b.xreplace(names))
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    floor = Rational(1, 10**30) if a == 0 or b == 0 else Integer(0)  # what cancels leaves a rounding error beside 0
    real = complex_points = 0
    for row in (*_POINTS, *_WHOLE):
        values = {
            s: Rational(row[n % 5]) + n // 5 if isinstance(row[0], str) else Integer(row[n % 5] + n // 5)
            for n, s in enumerate(symbols)
        }
        left, right = (x.subs(values).evalf(_POINT_DIGITS) for x in (a, b))
        if not _finite(left) or not _finite(right):
            continue
        same = bool(_size(left - right) <= _POINT_AGREE * max(_size(left), _size(right), floor))
        if left.is_real and right.is_real:
            if same:
                real += 1
            elif not (_leaves_reals(a, values) or _leaves_reals(b, values)):
                return False
        elif same:
            complex_points += 1
        elif a.has(sympy.I) or b.has(sympy.I):
            return False
    if real >= ENOUGH_POINTS or complex_points >= ENOUGH_POINTS:
        return True
    return bool(sympy.expand(a - b) == 0)


def _leaves_reals(expression: Expr, values: dict[Expr, Expr]) -> bool:
    r"""Whether a root or logarithm within a real value is none: `\sqrt{x}\sqrt{y}` at negative x and y."""
    return any(part.subs(values).evalf(15).is_real is False for part in expression.atoms(sympy.Pow, sympy.log))


def _finite(value: Expr) -> bool:
    return (
        bool(value.is_number)
        and not value.has(sympy.nan, sympy.zoo, sympy.oo)
        and value.is_finite is not False
        and not value.free_symbols
    )
