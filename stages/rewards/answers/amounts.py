"""Amounts with units, clock times and numbers in a base, by their text."""

import re
from fractions import Fraction

from stages.rewards.answers.forms import Based, Clock, Form, Formula, Quantity, Read
from stages.rewards.answers.units import ABBREVIATIONS, CURRENCIES, SCALES, UNITS, Dimension, dimension_of, singular
from stages.rewards.answers.words import BARE_TEXT, MATH_WORDS

_CLOCK = re.compile(
    r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?\s*(?:\\text\{\s*)?(?:([aApP])\.?\s?[mM]\.?)?\s*\}?"
    r"|([0-9]{1,2})\s*(?:\\text\{\s*)?([aApP])\.?\s?[mM]\.?\s*\}?"
)
_BASED = re.compile(r"([0-9A-Za-z]+)_(?:\{\s*([0-9]{1,2}|\\text\{[a-z]+\})\s*\}|([0-9]))")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "twelve": 12, "sixteen": 16}  # fmt: skip
_AMOUNT_AND_UNIT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")
_COMPOUND = re.compile(rf"{_AMOUNT_AND_UNIT.pattern}(?:\s*,?\s*(?:and\s+)?{_AMOUNT_AND_UNIT.pattern}){{1,3}}")
_BASE_UNITS: dict[Dimension, str] = {((dimension, 1),): unit for unit, (dimension, size) in UNITS.items() if size == 1}
_DEGREES = re.compile(
    r"([^A-Za-z]*?|.*[0-9})])\s*(?:\^?\s*\\circ|(?<![A-Za-z])degrees?|\\text\{\s*degrees?\s*\})\s*([CF]|\\text\{[CF]\})?"
)
_CURRENCY = re.compile("|".join(re.escape(name) for name in sorted(CURRENCIES, key=len, reverse=True)))
_UNIT_WORD = r"(?:[A-Za-zμΩ¢]+\.?(?:\s*\^\s*\{?\s*-?[1-9]\s*\}?)?)"
_UNIT = re.compile(rf"{_UNIT_WORD}(?:\s*[/*\s-]\s*{_UNIT_WORD})*")


def clock_in(text: str, read: Read) -> Form | None:  # noqa: ARG001 - as the other readers
    """Read a time of day."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    if match[5]:
        return Clock((int(match[5]), 0), "am" if match[6] in "aA" else "pm")
    parts = tuple(int(part) for part in match.group(1, 2, 3) if part is not None)
    if any(part > 59 for part in parts[1:]):
        return None
    return Clock(parts, "" if match[4] is None else "am" if match[4] in "aA" else "pm")


def based_in(text: str, read: Read) -> Form | None:  # noqa: ARG001 - as the other readers
    """Read a number with its base; None where a digit is too large for it."""
    match = _BASED.fullmatch(text.replace(r"_\text", r"_{\text").replace("}", "}}") if r"_\text" in text else text)
    if match is None or not match[1][:1].isalnum() or (match[1].isalpha() and len(match[1]) == 1):
        return None
    written = (match[2] or match[3]).strip()
    base = _BASES.get(written.removeprefix(r"\text{").removesuffix("}")) if written.startswith("\\") else int(written)
    if base is None or not 2 <= base <= 36 or not (re.search("[0-9]", match[1]) or (base > 10 and match[1].isupper())):
        return None
    digits = match[1].upper().lstrip("0") or "0"
    return Based(digits, base) if all(int(d, 36) < base for d in digits) else None


def quantity_in(text: str, read: Read) -> Form | None:
    """An amount and its unit, where the amount is a formula that begins with a digit, a sign or a command."""
    if (match := re.fullmatch(rf"([+-]?)\s*({_CURRENCY.pattern})\s*(.+)", text)) is not None:
        return Quantity(read(match[1] + match[3]), CURRENCIES[match[2]])
    if (match := re.fullmatch(rf"(.*[0-9}})])\s*({_CURRENCY.pattern})", text)) is not None:
        return Quantity(read(match[1]), CURRENCIES[match[2]])
    if (
        match := re.fullmatch(r"(.*?[^\\\s])\s*(?:\\?%|\\text\{\s*(?:percent|\\?%)\s*\}|(?<![A-Za-z])percent)", text)
    ) is not None:
        return Quantity(read(match[1]), "%")
    match = _DEGREES.fullmatch(text)
    if match is not None and match[1].strip() and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", match[1]):
        return Quantity(read(match[1]), "deg" + (match[2] or "").strip("\\tex{}"))
    plain = BARE_TEXT.sub(r" \1 ", text).strip() if r"\text" in text else text
    amount = re.match(
        r"[+-]?\s*(?:\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|[0-9][0-9,]*(?:\.[0-9]+)?"
        r"|\.[0-9]+)(?:\s*(?:[0-9]+/[0-9]+|/\s*[0-9]+|\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\\sqrt\s*\{[^{}]*\}"
        r"|\\pi(?![A-Za-z])|\\(?:times|cdot)\s*10\s*\^\s*\{?-?[0-9]+\}?))*",
        plain,
    )
    if amount is None or not (unit := plain[amount.end() :].strip()):
        return None
    spaced = plain[amount.end() : amount.end() + 1].isspace()
    if unit.startswith(("/", "per ")) and (match := re.fullmatch(r"(?:/|per)\s*([A-Za-z]{2,}(?:\s+[A-Za-z]+)*)", unit)):
        return Quantity(read(amount[0]), "/" + match[1])
    scale = unit.split(maxsplit=1)
    if scale[0].casefold() in SCALES:
        form = read(f"{amount[0].strip()} \\cdot {SCALES[scale[0].casefold()]}")
        return Quantity(form, scale[1]) if len(scale) > 1 else form
    if _UNIT.fullmatch(unit) is None:
        return None
    words = [word for word in re.split(r"[^A-Za-zμΩ¢]+", unit) if word]
    if any(word in MATH_WORDS for word in words) or not words:
        return None
    powers = ("per", "square", "cubic", "sq", "cu")
    known = all({word, singular(word), word.casefold()} & UNITS.keys() for word in words if word not in powers)
    # `5km/h` is an amount, `5m` may be a product.
    attached = len(unit) > 1 and re.split(r"[\^/]", unit)[0].strip() in ABBREVIATIONS
    if r"\text" in text or (spaced and max(map(len, words)) > 2) or (known and (spaced or attached)):
        return Quantity(read(amount[0]), unit)
    return None


def compound_in(text: str) -> Form | None:
    """An amount in several units of one kind, in the kind's base unit.

    >>> compound_in("2 hours and 30 minutes"), compound_in("2 hours")
    (Quantity(amount=Formula(text='9000'), unit='second'), None)
    """
    plain = " ".join(BARE_TEXT.sub(r" \1 ", text).split())
    if _COMPOUND.fullmatch(plain) is None:
        return None
    total, dimensions = Fraction(0), set()
    for number, unit in _AMOUNT_AND_UNIT.findall(plain):
        size = dimension_of(unit)
        if size is None:
            return None
        dimensions.add(size[0])
        total += Fraction(number) * size[1]
    if len(dimensions) != 1:
        return None
    return Quantity(Formula(str(total)), _BASE_UNITS.get(dimensions.pop(), ""))
