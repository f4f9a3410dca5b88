"""Texts of models and users, as a page shows them: readable, bounded, and nothing that turns other text around."""

import unicodedata

_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of what follows, beyond the text they are in."""


def shown(value: object, most: int) -> str:
    """`value` as text of about `most` characters; of what is longer the middle is left out, and how much of it is said.

    Control characters and halves of characters become U+FFFD; escaping for HTML is the template's.
    """
    text = str(value)
    if len(text) > most:
        head, tail = most * 2 // 3, most // 3
        text = f"{text[:head]}\n… {len(text) - head - tail:,} characters left out …\n{text[-tail:]}"
    return "".join("\ufffd" if _hidden(character) else character for character in text)


def _hidden(character: str) -> bool:
    if character in _TURNING:
        return True
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs")


def duration(seconds: float | None) -> str:
    """Seconds as people say them.

    >>> duration(3.21), duration(75), duration(7300), duration(None)
    ('3.2 s', '1 min 15 s', '2 h 1 min', '')
    """
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent; a dash for none."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"
