"""Reading a number as people write it, exactly and without evaluating anything."""

import re
from fractions import Fraction

LONGEST = 100
"""Characters of an answer that may still be a number; a longer text is not one, and costs no time."""

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*
    (?: \\[dt]?frac\s*\{{\s*(?P<top>{_DECIMAL})\s*\}}\s*\{{\s*(?P<below>{_DECIMAL})\s*\}}
      | (?P<whole>{_DIGITS})\s+(?P<part>[0-9]+)\s*/\s*(?P<parts>[0-9]+)
      | (?P<first>{_DECIMAL})\s*/\s*(?P<second>{_DECIMAL})
      | (?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[+-]?[0-9]{{1,2}}))? )
    (?:\s*\\?%)? \.? (?P<unit>(?:\s+[A-Za-z°²³/]+|/[A-Za-z]{{3,}})*) \.?""",
    re.VERBOSE,
)
_NOT_UNITS = re.compile(
    r"\b(?:[^mgshLCF/\s]|(?i:and|or|but|not|to|plus|minus|times|over|half|halves|thirds?|quarters?|pairs?|dozens?"
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


def parse_number(text: str) -> Fraction | None:
    r"""The number that `text` states, or None when it is anything but one number.

    Reads decimals, thousands commas, fractions (`3/4`, `1 1/2`, `\frac{3}{4}`), a leading currency sign, a trailing `%`
    (left out: `50%` is 50) and, after a space, a unit of a few words. A comma that does not part thousands, a second number,
    or a word that changes the value (`and`, `or`, `half`, `thousand`) makes it None: `5 or 6` states no number.

    >>> parse_number("$1,200.50 per month"), parse_number("5 or 6")
    (Fraction(2401, 2), None)
    """
    if len(text) > LONGEST:
        return None
    plain = text.strip().replace("−", "-").replace("\\$", "$").replace("\\!", "")
    for left, right in (("**", "**"), ("$", "$"), ("\\(", "\\)"), ("\\boxed{", "}")):
        if plain.startswith(left) and plain.endswith(right) and len(plain) > len(left) + len(right):
            plain = plain[len(left) : -len(right)].strip()
    plain = re.sub(r"^([+-]?)\s*[$€£¥]\s*", r"\1", plain)
    match = _NUMBER.fullmatch(plain)
    if match is None:
        return None
    unit = match["unit"]
    if _NOT_UNITS.search(unit) or len(unit.split()) > _MOST_UNIT_WORDS:
        return None
    try:
        value = _value(match)
    except ZeroDivisionError:
        return None
    return -value if match["sign"] == "-" else value


def last_number(text: str) -> Fraction | None:
    """The last number that stands anywhere in `text`, or None: what a lenient reader takes for the answer.

    As lm-eval's filter `flexible-extract` for GSM8K, but it reads numbers as `parse_number` does. A minus after a digit, a
    letter or a bracket, or before a blank, subtracts.

    >>> last_number("15 - 6 = 9</think> so $1,200."), last_number("12-5"), last_number("none")
    (Fraction(1200, 1), Fraction(5, 1), None)
    """
    found = _ANYWHERE.findall(text.replace("−", "-").replace("\\$", "$"))
    return parse_number(found[-1]) if found else None


def _value(match: re.Match[str]) -> Fraction:
    def read(name: str) -> Fraction:
        return Fraction(match[name].replace(",", "").rstrip("."))

    if match["top"]:
        return read("top") / read("below")
    if match["whole"]:
        return read("whole") + read("part") / read("parts")
    if match["first"]:
        return read("first") / read("second")
    return read("decimal") * Fraction(10) ** int(match["exponent"] or 0)
