"""Reflective words: how often a text stops to reconsider. A measure, never a reward."""

import re

WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
"""The ten words whose frequency rises in R1-Zero's training (DeepSeek-R1, appendix)."""

_PATTERN = re.compile(rf"\b({'|'.join(WORDS)})\b", re.IGNORECASE)


def reflective_words(text: str) -> int:
    """How many of them a text has.

    >>> reflective_words("Wait, 3 * 4 is 12. But check: 12, not checked.")
    3
    """
    return len(_PATTERN.findall(text))
