"""Answers in words: names, yes and no, dates."""

import re

from stages.rewards.answers.forms import Form, Read, Words

BARE_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_PROSE = re.compile(r"[A-Za-z0-9À-ɏ\s'\-.,/&?!\"]*")
MATH_WORDS = frozenset([
    "sincostancotseccscarcsinarccosarctansinhcoshtanhloglnlgexpsqrtpiinfinityinftyabsmaxmingcdlcmalphabet",
    "agammadeltathetalambdamuphiomegasigma",
])  # fmt: skip
_SHORT_WORDS = frozenset([
    "am", "an", "as", "at", "be", "by", "do", "go", "he", "if", "in", "is", "it", "me", "my", "no", "of", "on",
    "or", "so", "to", "up", "us", "we",
])  # fmt: skip
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
_DATE = re.compile(
    r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?(?:(?P<m>[a-z]{3,9})\.?\s+(?P<d>[0-9]{1,2})(?:st"
    r"|nd|rd|th)?|(?:the\s+)?(?P<d2>[0-9]{1,2})(?:st|nd|rd"
    r"|th)?(?:\s+of)?\s+(?P<m2>[a-z]{3,9})\.?)(?:,?\s+(?P<y>[0-9]{4}))?"
)


def words_in(text: str, read: Read) -> Form | None:  # noqa: ARG001 - as the other readers
    """Read a text as words, where it can be no formula."""
    plain = BARE_TEXT.sub(r"\1", text)
    if _PROSE.fullmatch(plain) is None:
        return None if r"\text" not in text or any(c in text for c in "^_=+") else Words(plain)
    letters = re.findall(r"[A-Za-zÀ-ɏ]+", plain)
    if not any(len(word) >= 2 for word in letters):
        return None
    if all(word in MATH_WORDS or len(word) == 1 for word in letters):
        return None
    if (
        r"\text" not in text
        and len(letters) == 1
        and ((len(plain) == 2 and plain not in _SHORT_WORDS) or (re.search("[0-9]", plain) and " " not in plain))
    ):
        return None  # a product such as `ab` or `2xy`
    if r"\text" not in text and re.search(r"[0-9/]", plain) and all(len(w) < 3 or w in MATH_WORDS for w in letters):
        return None
    return Words(plain)


def date_of(text: str) -> tuple[int, int, int] | None:
    """Month, day and year (0: none given) of a date in words."""
    match = _DATE.fullmatch(BARE_TEXT.sub(r"\1", text).strip().casefold())
    if match is None:
        return None
    month, day = match["m"] or match["m2"], int(match["d"] or match["d2"])
    number = next((n for n, name in enumerate(_MONTHS, 1) if month in (name, name[:3], name[:4])), None)
    return (number, day, int(match["y"] or 0)) if number is not None and 1 <= day <= 31 else None


def words_key(text: str) -> str:
    """What two texts have in common when they say the same: letters and digits in lower case, dates in one form, no article.

    >>> words_key("North-East."), words_key("20th of June") == words_key("June 20")
    ('northeast', True)
    """
    plain = BARE_TEXT.sub(r"\1", text)
    if (date := date_of(plain)) is not None:
        return "date {} {} {}".format(*date)
    folded = re.sub(r"^(?:the|a|an)\s+(?=\S)", "", plain.strip().casefold())
    return "".join(char for char in folded if char not in " -.,'\"!?\\{}")
