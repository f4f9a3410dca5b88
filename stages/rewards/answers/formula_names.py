"""Names that formulas may have: functions, constants, Greek letters, and operators that only a larger grammar reads."""

from collections.abc import Callable
from typing import Any

import sympy

Function = Callable[..., Any]
FUNCTIONS: dict[str, Function] = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "arccot": sympy.acot,
    "arcsec": sympy.asec, "arccsc": sympy.acsc,
    "asin": sympy.asin, "acos": sympy.acos, "atan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh,
    "coth": sympy.coth, "sech": sympy.sech, "csch": sympy.csch, "arcsinh": sympy.asinh,
    "arccosh": sympy.acosh, "arctanh": sympy.atanh,
    "arsinh": sympy.asinh, "arcosh": sympy.acosh, "artanh": sympy.atanh, "ln": sympy.log, "exp": sympy.exp,
}  # fmt: skip
INVERSES = {"sin": sympy.asin, "cos": sympy.acos, "tan": sympy.atan, "cot": sympy.acot, "sec": sympy.asec,
    "csc": sympy.acsc, "sinh": sympy.asinh, "cosh": sympy.acosh, "tanh": sympy.atanh}  # fmt: skip
SEVERAL: dict[str, Function] = {"max": sympy.Max, "min": sympy.Min, "gcd": sympy.gcd, "lcm": sympy.lcm}
LOGARITHMS = {"log", "lg"}
GREEK = frozenset([
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu",
    "xi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi",
    "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega", "ell", "hbar", "aleph",
])  # fmt: skip
UNCOMMON = frozenset([
    "sum", "int", "iint", "iiint", "oint", "prod", "lim", "limsup", "liminf", "sup", "inf", "partial", "nabla",
    "det", "operatorname",
])  # fmt: skip
NAMED = frozenset(["pi", "infinity", "infty", "sqrt", "cbrt", "abs", *FUNCTIONS, *LOGARITHMS, *SEVERAL, *GREEK]) - {"exp"} | {
    "exp"
}
