"""Numbers of any kind as numbers of Python's: what a reward function returns is not always a float."""

from typing import Any


def plain_number(value: Any) -> float | int | bool:
    """A NumPy scalar, an array or tensor of no dimension, a Decimal or a Fraction as a float, int or bool.

    Meant as `default` of `json.dumps`. Raises TypeError for all else.

    >>> import fractions
    >>> plain_number(fractions.Fraction(1, 4))
    0.25
    """
    dimensions = getattr(value, "shape", ())
    if isinstance(dimensions, tuple) and len(dimensions) == 0:
        item = getattr(value, "item", None)
        number = item() if callable(item) else value
        if isinstance(number, bool | int | float):
            return number
        if hasattr(number, "__float__") and not isinstance(number, str | bytes):
            return float(number)
    size = f" of shape {tuple(dimensions)}" if dimensions else ""
    raise TypeError(f"a value of type `{type(value).__name__}`{size} is not a number")
