r"""Find the form of a final answer: what its outermost signs make of it, before any algebra.

The innermost parts are `Formula`s, texts that formula.py reads.

>>> read_form("x=1, y=2").joined, len(read_form("(1, 2, 3)").items)
(',', 3)
>>> read_form("[2, 5)")
Interval(left=Formula(text='2'), right=Formula(text='5'), left_closed=True, right_closed=False)
"""

import re

from stages.rewards.answers.amounts import based_in, clock_in, compound_in, quantity_in
from stages.rewards.answers.forms import (
    Braces,
    Builder,
    Choice,
    Form,
    Formula,
    Interval,
    Matrix,
    NamedSet,
    Operation,
    Ratio,
    Read,
    Relation,
    Sequence,
    Several,
    Words,
)
from stages.rewards.answers.words import BARE_TEXT, date_of, words_in

DEEPEST = 30
"""Brackets within brackets that are read; deeper text is a `Formula`, which cannot be read."""


_SEPARATOR = re.compile(
    r"\s*(?:[,;]\s*)?(?P<word>(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\lor(?![A-Za-z])|\\land(?![A-Za-z])))\s*"
    r"|\s*[,;]\s*(?=\S)"
)
_GROUPED = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?![0-9]|,[0-9])")
_SIGNS = re.compile(
    r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|\\in(?![A-Za-z])|\\approx(?![A-Za-z])"
    r"|\\equiv(?![A-Za-z])|:=|==|=|<|>|≡"
)
_SIGN_NAMES = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\approx": "=", ":=": "=", "==": "="}
_SETS = re.compile(r"\\cup(?![A-Za-z])|\\cap(?![A-Za-z])|\\setminus(?![A-Za-z])|(?<=[\])}])\s*U\s*(?=[\[({\\])")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer|letter)\s+)?\(\s*(?:\\text\{\s*)?([A-J])(?:\s*\})?\s*\)\s*(.*)|(?:option"
    r"|choice|letter)\s+([A-J])|([A-J])\)\s*(.*)|([A-J])\s*[.:]\s+(.+)",
    re.IGNORECASE,
)
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}")
_EMPTY = frozenset(["nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset",
    "theemptyset", "thereisnosolution", "therearenosolutions", "nosuchx"])  # fmt: skip
_REALS = frozenset(
    ["allrealnumbers", "allreals", "allrealx", "anyrealnumber", "therealnumbers", "realnumbers", "allrealvalues"]
)


def read_form(text: str, depth: int = 0) -> Form:
    """Find the form of a text in the notation of `plain_text`."""
    text = text.strip()
    if depth > DEEPEST:
        return Formula(text)

    def read(part: str) -> Form:
        return read_form(part, depth + 1)

    return _phrase(text) or compound_in(text) or _joined(text, read) or _single(text, read)


def _phrase(text: str) -> Form | None:
    key = "".join(char for char in BARE_TEXT.sub(r"\1", text) if char.isalpha()).casefold()
    if text in (r"\emptyset", r"\{\}", r"\{ \}") or (key in _EMPTY and "=" not in text):
        return NamedSet("empty")
    if (match := re.fullmatch(r"\\mathbb\{([RZNQC])\}", text)) is not None:
        return NamedSet(match[1])
    if key in _REALS:
        return NamedSet("R")
    if key in ("integers", "allintegers", "theintegers"):
        return NamedSet("Z")
    return None


def _joined(text: str, read: Read) -> Form | None:
    parts, words = split(text)
    if len(parts) < 2:
        if r"\pm" in text and _SIGNS.search(text) is None and text.count(r"\pm") == 1:
            signs = [text.replace(r"\pm", a).replace(r"\mp", b) for a, b in (("+", "-"), ("-", "+"))]
            return Several(tuple(read(s) for s in signs), ",")
        if re.fullmatch(r"[^=]*[A-Za-z}]\s*=\s*[^=]*\\pm[^=]*", text) is not None:
            signs = [text.replace(r"\pm", a).replace(r"\mp", b) for a, b in (("+", "-"), ("-", "+"))]
            return Several(tuple(read(s) for s in signs), "or")
        return None
    if date_of(text) is not None:
        return Words(text)
    joined = next((word for word in ("or", "and") if word in words), ",")
    joined = "dots" if r"\ldots" in parts else joined
    if re.match(r"[^=<>]*=", parts[0]) and not any(_SIGNS.search(part) for part in parts[1:]) and closed(parts[0]):
        # `n = 2, 3, 4`: the name holds for all of them.
        name, _, first = parts[0].partition("=")
        if re.fullmatch(r"\s*\\?[A-Za-z]+\s*(?:_\{?[A-Za-z0-9]+\}?)?\s*", name):
            parts = [f"{name.strip()}={part}" for part in (first, *parts[1:])]
    items: list[Form] = []
    for part in parts:
        form = read(part)
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


def _single(text: str, read: Read) -> Form:
    for reader in (_choice, clock_in, _set_operation, _relation, _bracketed, _ratio, based_in, quantity_in, words_in):
        if (form := reader(text, read)) is not None:
            return form
    return Formula(text)


def _choice(text: str, read: Read) -> Form | None:
    text = BARE_TEXT.sub(r"\1", text)
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
    return Choice(letter.upper(), read(rest) if rest else None)


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


def _set_operation(text: str, read: Read) -> Form | None:
    # The brackets of half-open intervals do not match as such, so all brackets are looked over.
    signs = list(_SETS.finditer(text))
    if not signs or (r"\{" in text and r"\mid" in text):
        return None
    if _SIGNS.search(text[: signs[0].start()]):
        return None
    parts = [text[a:b] for a, b in zip([0, *(m.end() for m in signs)], [*(m.start() for m in signs), len(text)], strict=True)]
    names = {"cup" if "U" in m[0] else m[0].strip().lstrip("\\") for m in signs}
    if len(names) > 1 or not all(part.strip() for part in parts):
        return None
    return Operation(names.pop(), tuple(read(part) for part in parts))


def _relation(text: str, read: Read) -> Form | None:
    signs = outside(text, _SIGNS)
    if not signs:
        return None
    sides = [
        text[a:b].strip() for a, b in zip([0, *(m.end() for m in signs)], [*(m.start() for m in signs), len(text)], strict=True)
    ]
    names = tuple(_SIGN_NAMES.get(m[0], m[0]) for m in signs)
    if len(sides) == 2 and not sides[0] and names[0] == "=":
        return read(sides[1])
    if not all(sides):
        return None
    return Relation(tuple(read(side) for side in sides), names)


def _bracketed(text: str, read: Read) -> Form | None:
    if (match := _MATRIX.fullmatch(text)) is not None:
        rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
        return Matrix(tuple(tuple(read(cell) for cell in row.split("&")) for row in rows))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _braces(text[2:-2].strip(), read)
    if text.startswith((r"\langle", "<")) and text.endswith((r"\rangle", ">")):
        inner = text.removeprefix(r"\langle").removesuffix(r"\rangle").strip("<>")
        return Sequence(tuple(read(part) for part in split(inner, grouped=False)[0]))
    if len(text) < 2 or text[0] not in "([]" or text[-1] not in ")][":
        return None
    inner = text[1:-1]
    if not _balanced(inner):
        return None
    parts, words = split(inner, grouped=False)
    if len(parts) == 1:
        if text[0] == "(" and text[-1] == ")" and r"\pm" not in inner:
            form = read(inner)
            return None if isinstance(form, Formula) else form
        return None
    if any(words):
        return None
    items = tuple(read(part) for part in parts)
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


def _braces(inner: str, read: Read) -> Form | None:
    if not _balanced(inner):
        return None
    if (
        match := re.fullmatch(r"\s*(\\?[A-Za-z]+)\s*(\\in\s*\\mathbb\{R\})?\s*(?:\\mid(?![A-Za-z])|\||:)\s*(.+)", inner)
    ) is not None:
        return Builder(match[1], read(match[3]))
    return Braces(tuple(read(part) for part in split(inner, grouped=False)[0]))


def _ratio(text: str, read: Read) -> Form | None:
    if ":" not in text or not re.fullmatch(r"[^:]+(?::[^:]+)+", text) or "|" in text:
        return None
    parts = [part.strip() for part in text.split(":")]
    if not all(parts) or not all(_balanced(part) for part in parts):
        return None
    return Ratio(tuple(read(part) for part in parts))
