r"""The form of a final answer: what its outermost signs make of it, before any algebra.

A list, a set, a tuple, an interval, a relation, a quantity with its unit, a clock time, a ratio, words; the innermost parts are
`Formula`s, texts that `stages.rewards.formula` reads.

>>> read_form("x=1, y=2")
Several(items=(Relation(sides=(Formula(text='x'), Formula(text='1')), signs=('=',)), Relation(sides=(Formula(text='y'), Formula(text='2')), signs=('=',))), joined=',')
>>> read_form("[2, 5)")
Interval(left=Formula(text='2'), right=Formula(text='5'), left_closed=True, right_closed=False)
"""

import re
from dataclasses import dataclass
from typing import Literal

from stages.rewards.answer_text import closing
from stages.rewards.units import ABBREVIATIONS, CURRENCIES, SCALES, UNITS, singular

DEEPEST = 30
"""Brackets within brackets that are read; deeper text is a `Formula`, which cannot be read."""


@dataclass(frozen=True)
class Formula:
    text: str


@dataclass(frozen=True)
class Words:
    """Text that is no mathematics."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A letter of multiple choice, `(C)`, perhaps with what stands behind it: `(C) 12`."""

    letter: str
    content: "Form | None" = None


@dataclass(frozen=True)
class Quantity:
    """An amount with its unit; `%`, `deg` and currencies are units."""

    amount: "Form"
    unit: str


@dataclass(frozen=True)
class Clock:
    """A time of day, or hours and minutes, or minutes and seconds."""

    parts: tuple[int, ...]
    half: Literal["", "am", "pm"]


@dataclass(frozen=True)
class Ratio:
    parts: tuple["Form", ...]


@dataclass(frozen=True)
class Based:
    """Digits in a base: `52_8`."""

    digits: str
    base: int


@dataclass(frozen=True)
class Several:
    """Answers side by side, in any order; `joined` is `,`, `or`, `and`, or `dots` where some are left out."""

    items: tuple["Form", ...]
    joined: str


@dataclass(frozen=True)
class Braces:
    """A set written by its elements."""

    items: tuple["Form", ...]


@dataclass(frozen=True)
class Builder:
    """A set written by a condition."""

    variable: str
    condition: "Form"


@dataclass(frozen=True)
class Sequence:
    """A tuple, point or vector: ordered. `square`: written in square brackets."""

    items: tuple["Form", ...]
    square: bool = False


@dataclass(frozen=True)
class Interval:
    """An interval that is no pair; an open one in round brackets is a `Sequence` of two."""

    left: "Form"
    right: "Form"
    left_closed: bool
    right_closed: bool


@dataclass(frozen=True)
class Operation:
    """Sets joined by `\\cup`, `\\cap` or `\\setminus`."""

    sign: str
    parts: tuple["Form", ...]


@dataclass(frozen=True)
class NamedSet:
    """`R`, `Z`, `N`, `Q`, `C`, or `empty`."""

    name: str


@dataclass(frozen=True)
class Relation:
    """A chain of sides with the signs between them: `=`, `<`, `>`, `<=`, `>=`, `!=`, `in`."""

    sides: tuple["Form", ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple["Form", ...], ...]


Form = Formula | Words | Choice | Quantity | Clock | Ratio | Based | Several | Braces | Builder | Sequence | Interval | Operation | NamedSet | Relation | Matrix  # fmt: skip

_SEPARATOR = re.compile(
    r"\s*(?:[,;]\s*)?(?P<word>(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\lor(?![A-Za-z])|\\land(?![A-Za-z])))\s*"
    r"|\s*[,;]\s*(?=\S)"
)
_GROUPED = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?![0-9]|,[0-9])")
_SIGNS = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|\\in(?![A-Za-z])|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])|:=|==|=|<|>|≡")  # fmt: skip
_SIGN_NAMES = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\approx": "=", ":=": "=", "==": "="}
_SETS = re.compile(r"\\cup(?![A-Za-z])|\\cap(?![A-Za-z])|\\setminus(?![A-Za-z])|(?<=[\])}])\s*U\s*(?=[\[({\\])")
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?\s*(?:\\text\{\s*)?(?:([aApP])\.?\s?[mM]\.?)?\s*\}?|([0-9]{1,2})\s*(?:\\text\{\s*)?([aApP])\.?\s?[mM]\.?\s*\}?")  # fmt: skip
_BASED = re.compile(r"([0-9A-Za-z]+)_(?:\{\s*([0-9]{1,2}|\\text\{[a-z]+\})\s*\}|([0-9]))")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12, "sixteen": 16}  # fmt: skip
_CHOICE = re.compile(r"(?:(?:option|choice|answer|letter)\s+)?\(\s*(?:\\text\{\s*)?([A-J])(?:\s*\})?\s*\)\s*(.*)|(?:option|choice|letter)\s+([A-J])|([A-J])\)\s*(.*)|([A-J])\s*[.:]\s+(.+)", re.IGNORECASE)  # fmt: skip
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}")
_BARE_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_PROSE = re.compile(r"[A-Za-z0-9À-ɏ\s'\-.,/&?!\"]*")
_MATH_WORDS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt pi infinity infty abs max min gcd lcm alpha beta gamma delta theta lambda mu phi omega sigma".split())  # fmt: skip
_SHORT_WORDS = frozenset("am an as at be by do go he if in is it me my no of on or so to up us we".split())
_EMPTY = frozenset(["nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset", "theemptyset", "thereisnosolution", "therearenosolutions", "nosuchx"])  # fmt: skip
_REALS = frozenset(
    ["allrealnumbers", "allreals", "allrealx", "anyrealnumber", "therealnumbers", "realnumbers", "allrealvalues"]
)
_CURRENCY = re.compile("|".join(re.escape(name) for name in sorted(CURRENCIES, key=len, reverse=True)))
_UNIT_WORD = r"(?:[A-Za-zμΩ¢]+\.?(?:\s*\^\s*\{?\s*-?[1-9]\s*\}?)?)"
_UNIT = re.compile(rf"{_UNIT_WORD}(?:\s*[/*\s-]\s*{_UNIT_WORD})*")


def read_form(text: str, depth: int = 0) -> Form:
    """Find the form of a text in the notation of `plain_text`."""
    text = text.strip()
    if depth > DEEPEST:
        return Formula(text)
    return _phrase(text) or _joined(text, depth) or _single(text, depth)


def _phrase(text: str) -> Form | None:
    key = "".join(char for char in _BARE_TEXT.sub(r"\1", text) if char.isalpha()).casefold()
    if text in (r"\emptyset", r"\{\}", r"\{ \}") or (key in _EMPTY and "=" not in text):
        return NamedSet("empty")
    if (match := re.fullmatch(r"\\mathbb\{([RZNQC])\}", text)) is not None:
        return NamedSet(match[1])
    if key in _REALS:
        return NamedSet("R")
    return None


def _joined(text: str, depth: int) -> Form | None:
    parts, words = split(text)
    if len(parts) < 2:
        if r"\pm" in text and _SIGNS.search(text) is None and depth < DEEPEST and text.count(r"\pm") == 1:
            signs = [text.replace(r"\pm", a).replace(r"\mp", b) for a, b in (("+", "-"), ("-", "+"))]
            return Several(tuple(read_form(s, depth + 1) for s in signs), ",")
        if (match := re.fullmatch(r"([^=]*[A-Za-z}])\s*=\s*([^=]*\\pm[^=]*)", text)) is not None:
            signs = [text.replace(r"\pm", a).replace(r"\mp", b) for a, b in (("+", "-"), ("-", "+"))]
            return Several(tuple(read_form(s, depth + 1) for s in signs), "or")
        return None
    if _date(text) is not None:
        return Words(text)
    if any(part == r"\ldots" for part in parts):
        joined = "dots"
    else:
        joined = "or" if "or" in words else "and" if "and" in words else ","
    if re.match(r"[^=<>]*=", parts[0]) and not any(_SIGNS.search(part) for part in parts[1:]) and closed(parts[0]):
        # `n = 2, 3, 4`: the name holds for all of them.
        name, _, first = parts[0].partition("=")
        if re.fullmatch(r"\s*\\?[A-Za-z]+\s*(?:_\{?[A-Za-z0-9]+\}?)?\s*", name):
            parts = [f"{name.strip()}={part}" for part in (first, *parts[1:])]
    items: list[Form] = []
    for part in parts:
        form = read_form(part, depth + 1)
        items.extend(form.items if isinstance(form, Several) and joined != "dots" else [form])
    return Several(tuple(items), joined)


def closed(text: str) -> bool:
    """Whether every bracket of a text is closed."""
    return all(text.count(left) == text.count(right) for left, right in ("()", "[]", "{}"))


def split(text: str, *, grouped: bool = True) -> tuple[list[str], list[str]]:
    """Cut a text at the commas, semicolons and words `and`, `or` outside all brackets.

    Args:
        text: What to cut.
        grouped: Whether the comma of `1,234` parts thousands; inside brackets it parts elements.

    Returns:
        The parts, without empty ones, and the words between them (`and`, `or`, or an empty text).
    """
    parts, words, start, position, depth = [], [], 0, 0, 0
    while position < len(text):
        char = text[position]
        if char == "\\":
            if (match := _SEPARATOR.match(text, position)) is not None and depth == 0 and position:
                parts.append(text[start:position])
                words.append("or" if "or" in match[0] else "and")
                start = position = match.end()
                continue
            if text.startswith((r"\begin{", r"\{", r"\langle", r"\lfloor", r"\lceil"), position):
                depth += 1
            elif text.startswith((r"\end{", r"\}", r"\rangle", r"\rfloor", r"\rceil"), position):
                depth = max(depth - 1, 0)
            position += 2
            continue
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth = max(depth - 1, 0)
        elif grouped and char.isascii() and char.isdigit() and (position == 0 or text[position - 1] not in "0123456789.,"):
            match = _GROUPED.match(text, position)
            if match is not None:
                position = match.end()
                continue
        elif depth == 0 and (match := _SEPARATOR.match(text, position)) is not None:
            parts.append(text[start:position])
            word = match["word"] or ""
            words.append("or" if "or" in word else "and" if word else "")
            start = position = match.end()
            continue
        position += 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()], words


def _single(text: str, depth: int) -> Form:
    for reader in (_choice, _clock, _set_operation, _relation, _bracketed, _ratio, _based, _quantity, _words):
        if (form := reader(text, depth)) is not None:
            return form
    return Formula(text)


def _choice(text: str, depth: int) -> Form | None:
    text = _BARE_TEXT.sub(r"\1", text)
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None
    letter = next(match[n] for n in (1, 3, 4, 6) if match[n])
    rest = (match[2] or match[5] or match[7] or "").strip()
    if match[1] and not text.lower().startswith(("option", "choice", "answer", "letter")):
        if letter.islower() or (
            rest and not rest[0].isspace() and text[text.index(")") + 1 : text.index(")") + 2].strip() and not rest[0].isalnum()
        ):
            return None
    elif letter.islower() and not match[3]:
        return None
    return Choice(letter.upper(), read_form(rest, depth + 1) if rest else None)


def _clock(text: str, depth: int) -> Form | None:  # noqa: ARG001 - a reader
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    if match[5]:
        return Clock((int(match[5]), 0), "am" if match[6] in "aA" else "pm")
    parts = tuple(int(part) for part in match.group(1, 2, 3) if part is not None)
    if any(part > 59 for part in parts[1:]):
        return None
    return Clock(parts, "" if match[4] is None else "am" if match[4] in "aA" else "pm")


def outside(text: str, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """The matches of a pattern outside all brackets."""
    matches, position, depth = [], 0, 0
    while position < len(text):
        match = pattern.match(text, position) if depth == 0 else None
        if match is not None and match.end() > position:
            matches.append(match)
            position = match.end()
            continue
        char = text[position]
        if char == "\\":
            if text.startswith((r"\begin{", r"\{", r"\langle"), position):
                depth += 1
            elif text.startswith((r"\end{", r"\}", r"\rangle"), position):
                depth = max(depth - 1, 0)
            position += 2
            continue
        depth = max(depth + (char in "([{") - (char in ")]}"), 0)
        position += 1
    return matches


def _set_operation(text: str, depth: int) -> Form | None:
    # The brackets of half-open intervals do not match as such, so all brackets are looked over.
    signs = list(_SETS.finditer(text))
    if not signs or r"\{" in text and r"\mid" in text:
        return None
    if _SIGNS.search(text[: signs[0].start()]):
        return None
    parts = [text[a:b] for a, b in zip([0, *(m.end() for m in signs)], [*(m.start() for m in signs), len(text)], strict=True)]
    names = {"cup" if "U" in m[0] else m[0].strip().lstrip("\\") for m in signs}
    if len(names) > 1 or not all(part.strip() for part in parts):
        return None
    return Operation(names.pop(), tuple(read_form(part, depth + 1) for part in parts))


def _relation(text: str, depth: int) -> Form | None:
    signs = outside(text, _SIGNS)
    if not signs:
        return None
    sides = [
        text[a:b].strip() for a, b in zip([0, *(m.end() for m in signs)], [*(m.start() for m in signs), len(text)], strict=True)
    ]
    names = tuple(_SIGN_NAMES.get(m[0], m[0]) for m in signs)
    if len(sides) == 2 and not sides[0] and names[0] == "=":
        return read_form(sides[1], depth + 1)
    if not all(sides):
        return None
    return Relation(tuple(read_form(side, depth + 1) for side in sides), names)


def _bracketed(text: str, depth: int) -> Form | None:
    if (match := _MATRIX.fullmatch(text)) is not None:
        rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
        return Matrix(tuple(tuple(read_form(cell, depth + 1) for cell in row.split("&")) for row in rows))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _braces(text[2:-2].strip(), depth)
    if text.startswith((r"\langle", "<")) and text.endswith((r"\rangle", ">")):
        inner = text.removeprefix(r"\langle").removesuffix(r"\rangle").strip("<>")
        return Sequence(tuple(read_form(part, depth + 1) for part in split(inner, grouped=False)[0]))
    if len(text) < 2 or text[0] not in "([]" or text[-1] not in ")][":
        return None
    inner = text[1:-1]
    if not _balanced(inner):
        return None
    parts, words = split(inner, grouped=False)
    if len(parts) == 1:
        if text[0] == "(" and text[-1] == ")" and r"\pm" not in inner:
            form = read_form(inner, depth + 1)
            return None if isinstance(form, Formula) else form
        return None
    if any(words):
        return None
    items = tuple(read_form(part, depth + 1) for part in parts)
    ends = text[0] + text[-1]
    if ends in ("()", "[]"):
        return Sequence(items, square=ends == "[]")
    return Interval(*items, left_closed=text[0] == "[", right_closed=text[-1] == "]") if len(items) == 2 else None


def _balanced(text: str) -> bool:
    """Whether the brackets of a text close each other: `(1,2),(3,4)` has none around it."""
    depth = 0
    for char in text.replace(r"\{", "{").replace(r"\}", "}"):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _braces(inner: str, depth: int) -> Form | None:
    if not _balanced(inner):
        return None
    if (
        match := re.fullmatch(r"\s*(\\?[A-Za-z]+)\s*(\\in\s*\\mathbb\{R\})?\s*(?:\\mid(?![A-Za-z])|\||:)\s*(.+)", inner)
    ) is not None:
        return Builder(match[1], read_form(match[3], depth + 1))
    return Braces(tuple(read_form(part, depth + 1) for part in split(inner, grouped=False)[0]))


def _ratio(text: str, depth: int) -> Form | None:
    if ":" not in text or not re.fullmatch(r"[^:]+(?::[^:]+)+", text) or "|" in text:
        return None
    parts = [part.strip() for part in text.split(":")]
    if not all(parts) or not all(_balanced(part) for part in parts):
        return None
    return Ratio(tuple(read_form(part, depth + 1) for part in parts))


def _based(text: str, depth: int) -> Form | None:  # noqa: ARG001 - a reader
    match = _BASED.fullmatch(text.replace(r"_\text", r"_{\text").replace("}", "}}") if r"_\text" in text else text)
    if match is None or not match[1][:1].isalnum() or (match[1].isalpha() and len(match[1]) == 1):
        return None
    written = (match[2] or match[3]).strip()
    base = _BASES.get(written.removeprefix(r"\text{").removesuffix("}")) if written.startswith("\\") else int(written)
    if base is None or not 2 <= base <= 36 or not (re.search("[0-9]", match[1]) or (base > 10 and match[1].isupper())):
        return None
    digits = match[1].upper().lstrip("0") or "0"
    return Based(digits, base) if all(int(d, 36) < base for d in digits) else None


def _quantity(text: str, depth: int) -> Form | None:
    """An amount and its unit, where the amount is a formula that begins with a digit, a sign or a command."""
    if (match := re.fullmatch(rf"([+-]?)\s*({_CURRENCY.pattern})\s*(.+)", text)) is not None:
        return Quantity(read_form(match[1] + match[3], depth + 1), CURRENCIES[match[2]])
    if (match := re.fullmatch(rf"(.*[0-9}})])\s*({_CURRENCY.pattern})", text)) is not None:
        return Quantity(read_form(match[1], depth + 1), CURRENCIES[match[2]])
    if (
        match := re.fullmatch(r"(.*?[^\\\s])\s*(?:\\?%|\\text\{\s*(?:percent|\\?%)\s*\}|(?<![A-Za-z])percent)", text)
    ) is not None:
        return Quantity(read_form(match[1], depth + 1), "%")
    if (match := re.fullmatch(r"([^A-Za-z]*?|.*[0-9})])\s*(?:\^?\s*\\circ|(?<![A-Za-z])degrees?|\\text\{\s*degrees?\s*\})\s*([CF]|\\text\{[CF]\})?", text)) is not None and match[1].strip():  # fmt: skip
        if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", match[1]):
            return Quantity(read_form(match[1], depth + 1), "deg" + (match[2] or "").strip("\\tex{}"))
    plain = _BARE_TEXT.sub(r" \1 ", text).strip() if r"\text" in text else text
    amount = re.match(r"[+-]?\s*(?:\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:\s*(?:[0-9]+/[0-9]+|/\s*[0-9]+|\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\\sqrt\s*\{[^{}]*\}|\\pi(?![A-Za-z])|\\(?:times|cdot)\s*10\s*\^\s*\{?-?[0-9]+\}?))*", plain)  # fmt: skip
    if amount is None or not (unit := plain[amount.end() :].strip()):
        return None
    spaced = plain[amount.end() : amount.end() + 1].isspace()
    if unit.startswith(("/", "per ")) and (match := re.fullmatch(r"(?:/|per)\s*([A-Za-z]{2,}(?:\s+[A-Za-z]+)*)", unit)):
        return Quantity(read_form(amount[0], depth + 1), "/" + match[1])
    scale = unit.split(maxsplit=1)
    if scale[0].casefold() in SCALES:
        form = read_form(f"{amount[0].strip()} \\cdot {SCALES[scale[0].casefold()]}", depth + 1)
        return Quantity(form, scale[1]) if len(scale) > 1 else form
    if _UNIT.fullmatch(unit) is None:
        return None
    words = [word for word in re.split(r"[^A-Za-zμΩ¢]+", unit) if word]
    if any(word in _MATH_WORDS for word in words) or not words:
        return None
    known = all(word in UNITS or singular(word) in UNITS or word.casefold() in UNITS for word in words if word not in ("per", "square", "cubic", "sq", "cu"))  # fmt: skip
    marked = r"\text" in text
    if marked or (spaced and max(map(len, words)) > 2) or (known and (spaced or unit.split("^")[0].split("/")[0].strip() in ABBREVIATIONS and (len(unit) > 1))):  # fmt: skip
        return Quantity(read_form(amount[0], depth + 1), unit)
    return None


def _words(text: str, depth: int) -> Form | None:  # noqa: ARG001 - a reader
    plain = _BARE_TEXT.sub(r"\1", text)
    if _PROSE.fullmatch(plain) is None:
        return None if r"\text" not in text or any(c in text for c in "^_=+") else Words(plain)
    letters = re.findall(r"[A-Za-zÀ-ɏ]+", plain)
    if not any(len(word) >= 2 for word in letters):
        return None
    if all(word in _MATH_WORDS or len(word) == 1 for word in letters):
        return None
    if r"\text" not in text and len(letters) == 1 and ((len(plain) == 2 and plain not in _SHORT_WORDS) or re.search("[0-9]", plain) and " " not in plain):
        return None  # a product such as `ab` or `2xy`
    if r"\text" not in text and re.search(r"[0-9/]", plain) and all(len(w) < 3 or w in _MATH_WORDS for w in letters):
        return None
    return Words(plain)


_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december")  # fmt: skip
_DATE = re.compile(r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?(?:(?P<m>[a-z]{3,9})\.?\s+(?P<d>[0-9]{1,2})(?:st|nd|rd|th)?|(?:the\s+)?(?P<d2>[0-9]{1,2})(?:st|nd|rd|th)?(?:\s+of)?\s+(?P<m2>[a-z]{3,9})\.?)(?:,?\s+(?P<y>[0-9]{4}))?")  # fmt: skip


def _date(text: str) -> tuple[int, int, int] | None:
    """Month, day and year (0: none given) of a date in words."""
    match = _DATE.fullmatch(_BARE_TEXT.sub(r"\1", text).strip().casefold())
    if match is None:
        return None
    month, day = match["m"] or match["m2"], int(match["d"] or match["d2"])
    number = next((n for n, name in enumerate(_MONTHS, 1) if month in (name, name[:3], name[:4])), None)
    return (number, day, int(match["y"] or 0)) if number is not None and 1 <= day <= 31 else None


def words_key(text: str) -> str:
    """What two texts have in common when they say the same: letters and digits in lower case, dates in one form, no article."""
    plain = _BARE_TEXT.sub(r"\1", text)
    if (date := _date(plain)) is not None:
        return "date {} {} {}".format(*date)
    folded = re.sub(r"^(?:the|a|an)\s+(?=\S)", "", plain.strip().casefold())
    return "".join(char for char in folded if char not in " -.,'\"!?\\{}")
