"""The language-consistency reward: the share of the thinking that is in the target language (DeepSeek-R1, section 3.2).

The paper divides the words of the chain of thought in the target language by all its words.
"""

import re
from typing import Literal

Language = Literal["english", "digits"]

# A character of a script that is written without spaces (kana, Han) counts as a word of its own; Hangul has spaces.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+(?:['’][^\W\d_{_UNSPACED}]+)*")
_GREEK = re.compile("[\u0370-\u03ff]")


def language_share(thought: str, language: Language) -> float | None:
    """Units of the target language / all units, 0 to 1; None when there is nothing to count.

    `english` goes by script: a word counts as English when all its letters are ASCII Latin, so French without accents
    passes and `naïve` does not. Text without letters (`4*3=12`) is neutral and left out, as is a single Greek letter (a
    mathematical symbol). `digits` is for the toy's two scripts: the characters 0-9 against a-z.

    >>> language_share("so the sum 4*3=12 是 twelve", "english")
    0.8
    >>> language_share("4*3=5,f+c=a", "digits")
    0.5
    """
    if language == "digits":
        target, other = len(re.findall("[0-9]", thought)), len(re.findall("[a-z]", thought))
    else:
        words = [w for w in _WORD.findall(thought) if not (len(w) == 1 and _GREEK.match(w))]
        target = sum(word.replace("’", "'").isascii() for word in words)
        other = len(words) - target
    return target / (target + other) if target + other else None


def readable(thought: str, language: Language, threshold: float) -> bool:
    """Whether at least `threshold` of the thinking is in the target language; text without any unit passes."""
    share = language_share(thought, language)
    return share is None or share >= threshold
