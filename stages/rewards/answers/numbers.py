"""Reading a number as people write it, exactly and without evaluating anything."""

import re
from fractions import Fraction
from typing import NamedTuple

from stages.rewards.answers import forms
from stages.rewards.answers.form_reader import read_form
from stages.rewards.answers.text import plain_text

LONGEST = 100
"""Characters of an answer that may still be a number; a longer text is not one, and costs no time."""

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_PLAIN = re.compile(rf"[+-]?{_DECIMAL}")
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*
    (?: (?:(?P<mixed>[0-9]+)\s*)?\\frac\s*
        (?:\{{\s*(?P<top>{_DECIMAL})\s*\}}\s*\{{\s*(?P<below>{_DECIMAL})\s*\}}|\s*(?P<t>[0-9])\s*(?P<b>[0-9]))
      | (?P<whole>{_DIGITS})\s+(?P<part>[0-9]+)\s*/\s*(?P<parts>[0-9]+)
      | (?P<first>{_DECIMAL})\s*/\s*(?P<second>{_DECIMAL})
      | (?P<indian>[1-9][0-9]?(?:,[0-9]{{2}})+,[0-9]{{3}}(?:\.[0-9]+)?)
      | (?P<decimal>{_DECIMAL})
        (?:[eE](?P<exponent>[+-]?[0-9]{{1,2}})|\s*\\(?:times|cdot)\s*10\s*\^\s*
        (?:\{{\s*(?P<power>[+-]?[0-9]{{1,2}})\s*\}}|(?P<digit>[0-9])))? )""",
    re.VERBOSE,
)
_NOT_UNITS = re.compile(
    r"\b(?:[^mgshLCFNJWVKA\W\d]|(?i:and|or|but|not|to|plus|minus|times|over|half|halves|thirds?|quarters?|pairs?|dozens?"
    r"|hundreds?|thousands?|[mb]illions?|trillions?|pi|sqrt|zero|one|two|three|four|five|six|seven|eight|nine|ten))\b"
)
"""Words that change the value, and single letters other than unit symbols: `2 x` is no number."""
_MOST_UNIT_WORDS = 4
_ANYWHERE = re.compile(
    rf"""(?: (?<![\w).])- )? [$€£¥]?
    (?: \\[dt]?frac\s*\{{\s*{_DECIMAL}\s*\}}\s*\{{\s*{_DECIMAL}\s*\}}
      | {_DIGITS}\s+[0-9]+\s*/\s*[0-9]+
      | {_DECIMAL}(?:/{_DECIMAL})?(?:[eE][+-]?[0-9]{{1,2}})? )""",
    re.VERBOSE,
)


class Amount(NamedTuple):
    """A number with what stands beside it."""

    value: Fraction
    unit: str
    """As in `answer_forms.Quantity`; empty without one."""


def parse_number(text: str) -> Fraction | None:
    r"""The number that `text` states, or None when it is anything but one number.

    Reads decimals, thousands commas and spaces, fractions (`3/4`, `1 1/2`, `\frac{3}{4}`), powers of ten, a currency, a
    `%` (left out: `50%` is 50), degrees and a unit of a few words. A comma that does not part thousands, a second
    number, or a word that changes the value (`and`, `or`, `half`, `thousand`) makes it None: `5 or 6` states no number.

    >>> parse_number("$1,200.50 per month"), parse_number(r"12\,345"), parse_number("5 or 6")
    (Fraction(2401, 2), Fraction(12345, 1), None)
    """
    amount = parse_amount(text)
    return None if amount is None else amount.value


def parse_amount(text: str) -> Amount | None:
    """The number that `text` states with its unit, or None when it is anything but one number."""
    if len(text) > LONGEST:
        return None
    if _PLAIN.fullmatch(text) is not None:
        return Amount(Fraction(text.replace(",", "").rstrip(".")), "")
    form, units = read_form(plain_text(text)), list[str]()
    if isinstance(form, forms.Clock) and form.half and not any(form.parts[1:]):
        return Amount(Fraction(form.parts[0]), form.half)
    while isinstance(form, forms.Quantity):  # `$5 per hour` has two
        units.append(form.unit)
        form = form.amount
    unit = " ".join(units)
    if _NOT_UNITS.search(unit) or len(unit.split()) > _MOST_UNIT_WORDS:
        return None
    value = _read(form.text) if isinstance(form, forms.Formula) else None
    return None if value is None else Amount(value, unit)


def last_number(text: str) -> Fraction | None:
    """The last number that stands anywhere in `text`, or None: what a lenient reader takes for the answer.

    As lm-eval's filter `flexible-extract` for GSM8K, but it reads numbers as `parse_number` does. A minus after a digit, a
    letter or a bracket, or before a blank, subtracts.

    >>> last_number("15 - 6 = 9</think> so $1,200."), last_number("12-5"), last_number("none")
    (Fraction(1200, 1), Fraction(5, 1), None)
    """
    found = _ANYWHERE.findall(text.replace("−", "-").replace("\\$", "$"))
    return parse_number(found[-1]) if found else None


def _read(text: str) -> Fraction | None:
    """The value of a number without a unit."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    try:
        value = _value(match)
    except ZeroDivisionError:
        return None
    return -value if match["sign"] == "-" else value


def _value(match: re.Match[str]) -> Fraction:
    def read(*names: str) -> Fraction:
        return Fraction(next(match[name] for name in names if match[name]).replace(",", "").rstrip("."))

    if match["top"] or match["t"]:
        return Fraction(match["mixed"] or 0) + read("top", "t") / read("below", "b")
    if match["whole"]:
        return read("whole") + read("part") / read("parts")
    if match["first"]:
        return read("first") / read("second")
    return read("decimal", "indian") * Fraction(10) ** int(match["exponent"] or match["power"] or match["digit"] or 0)
