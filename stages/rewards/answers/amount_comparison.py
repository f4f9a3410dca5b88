"""Compare words, choices, quantities, times, ratios and numbers in a base: the reference first, the answer second."""

import re
from collections.abc import Callable
from fractions import Fraction

import sympy

from stages.rewards.answers import forms
from stages.rewards.answers.equality import equal
from stages.rewards.answers.forms import Form
from stages.rewards.answers.formula_values import same_value, value_of
from stages.rewards.answers.units import dimension_of, singular
from stages.rewards.answers.words import words_key

Same = Callable[[Form, Form], bool]
"""How the parts of two forms are compared."""


def same_words(a: Form, b: Form) -> bool:
    """Whether two forms say the same in words."""
    keys = [words_key(_written(form)) for form in (a, b)]
    return keys[0] == keys[1] != ""


def _written(form: Form) -> str:
    if isinstance(form, forms.Words | forms.Formula):
        return form.text if isinstance(form, forms.Words) or not re.search(r"[^A-Za-z\s]", form.text) else ""
    if isinstance(form, forms.Quantity) and isinstance(form.amount, forms.Formula):
        return f"{form.amount.text} {form.unit}"
    return ""


def same_choice(a: Form, b: Form, same: Same) -> bool | None:
    """Compare a letter of multiple choice with another one, with a letter alone or with what it stands for."""
    letters = [form.letter if isinstance(form, forms.Choice) else _letter(form) for form in (a, b)]
    contents = [form.content if isinstance(form, forms.Choice) else None for form in (a, b)]
    if letters[0] and letters[1]:
        return letters[0] == letters[1] and (None in contents or same(contents[0], contents[1]))  # type: ignore[arg-type]
    for content, other in ((contents[0], b), (contents[1], a)):
        if content is not None:
            return same(content, other)
    return False


def _letter(form: Form) -> str:
    if isinstance(form, forms.Formula) and (match := re.fullmatch(r"\(?([A-Za-z])\)?", form.text)):
        return match[1].upper()
    return ""


def same_quantities(a: Form, b: Form, same: Same) -> bool | None:
    """Compare two amounts with units: in the base unit where both are known, else by the words of the units."""
    assert isinstance(a, forms.Quantity) and isinstance(b, forms.Quantity)
    if a.unit == b.unit:
        return same(a.amount, b.amount)
    if a.unit.startswith("deg") and b.unit.startswith("deg"):
        return "deg" in (a.unit, b.unit) and same(a.amount, b.amount)
    sizes = [dimension_of(form.unit) for form in (a, b)]
    if sizes[0] is not None and sizes[1] is not None:
        if sizes[0][0] != sizes[1][0]:
            return False
        return same_value(a.amount, b.amount, sizes[0][1], sizes[1][1])
    if "%" in (a.unit, b.unit):
        return _unit_words_agree(a.unit.replace("%", ""), b.unit.replace("%", "")) and same(a.amount, b.amount)
    return _unit_words_agree(a.unit, b.unit) and same(a.amount, b.amount)


def _unit_words_agree(a: str, b: str) -> bool:
    """Whether one unit says what the other says and perhaps more: `hours` and `hours later`."""
    words = [
        {singular(word) for word in re.findall(r"[A-Za-z]+|[0-9]+", unit)} - {"per", "a", "an", "the", "of"} for unit in (a, b)
    ]
    return words[0] <= words[1] or words[1] <= words[0]


def same_amount(a: Form, b: Form, same: Same) -> bool | None:
    """A quantity beside something without a unit."""
    if isinstance(a, forms.Quantity):
        amount, unit, other = a.amount, a.unit, b
    else:
        assert isinstance(b, forms.Quantity)
        amount, unit, other = b.amount, b.unit, a
    if isinstance(other, forms.Words):
        return same_words(a, b)
    if isinstance(other, forms.Relation | forms.Several | forms.Braces):
        return None
    pair = (amount, other) if isinstance(a, forms.Quantity) else (other, amount)
    if same(*pair):
        return True
    if unit == "%":
        return same_value(amount, other, Fraction(1, 100), Fraction(1))
    if unit == "deg":
        values = value_of(amount), value_of(other)
        radians = values[1] is not None and not values[1].is_Rational
        return radians and values[0] is not None and equal(values[0] * sympy.pi / 180, values[1])
    return False


def same_clocks(a: Form, b: Form) -> bool:
    """Whether two times of day are the same; without `a.m.` or `p.m.` a time may be either.

    >>> [same_clocks(forms.Clock((4, 5), "pm"), forms.Clock(parts, "")) for parts in ((16, 5), (4, 6))]
    [True, False]
    """
    assert isinstance(a, forms.Clock) and isinstance(b, forms.Clock)
    if a.half and b.half:
        return _of_day(a) == _of_day(b)
    if a.half or b.half:  # 5 p.m. is 17:00, and 5:00 where nothing says which
        return a.parts == b.parts or _of_day(a) == _of_day(b)
    return a.parts == b.parts


def _of_day(clock: forms.Clock) -> tuple[int, ...]:
    hour = clock.parts[0] % 12 + 12 * (clock.half == "pm") if clock.half else clock.parts[0]
    return (hour, *clock.parts[1:])


def clock_and_other(a: Form, b: Form) -> bool | None:
    """Compare a time with a ratio written with the same sign, or with a full hour alone."""
    clock, other = (a, b) if isinstance(a, forms.Clock) else (b, a)
    assert isinstance(clock, forms.Clock)
    if isinstance(other, forms.Ratio):
        values = [value_of(part) for part in other.parts]
        return len(values) == len(clock.parts) and all(v == p for v, p in zip(values, clock.parts, strict=True))
    if isinstance(other, forms.Formula) and clock.half and not any(clock.parts[1:]):
        return value_of(other) == clock.parts[0]
    return None if isinstance(other, forms.Relation | forms.Several) else False


def same_ratios(a: Form, b: Form) -> bool:
    """Whether two ratios are proportional."""
    assert isinstance(a, forms.Ratio) and isinstance(b, forms.Ratio)
    values = [[value_of(part) for part in form.parts] for form in (a, b)]
    if len(values[0]) != len(values[1]) or None in values[0] or None in values[1]:
        return False
    pairs = list(zip(values[0], values[1], strict=True))
    return all(p * values[1][0] == q * values[0][0] for p, q in pairs) and any(p != 0 for p, _ in pairs)  # type: ignore[operator]


def ratio_and_quotient(a: Form, b: Form) -> bool:
    """A ratio of two beside their quotient."""
    ratio, other = (a, b) if isinstance(a, forms.Ratio) else (b, a)
    assert isinstance(ratio, forms.Ratio)
    values = [value_of(part) for part in (*ratio.parts, other)]
    return len(values) == 3 and None not in values and values[1] != 0 and equal(values[0] / values[1], values[2])  # type: ignore[operator]


def same_based(a: Form, b: Form) -> bool:
    """Whether two numbers with their bases are equal."""
    assert isinstance(a, forms.Based) and isinstance(b, forms.Based)
    return int(a.digits, a.base) == int(b.digits, b.base)


def based_and_plain(a: Form, b: Form) -> bool:
    """A number with its base beside one without: the same number, or the digits alone where the question says in which base."""
    based, other = (a, b) if isinstance(a, forms.Based) else (b, a)
    assert isinstance(based, forms.Based) and isinstance(other, forms.Formula)
    if other.text.strip().upper().lstrip("0") == based.digits:
        return True
    return bool(value_of(other) == int(based.digits, based.base))
