"""The language-consistency reward: the share of the thinking that is in the target language (DeepSeek-R1, section 3.2).

The paper divides the words of the chain of thought in the target language by all its words.
"""

import functools
import re
from collections import Counter
from typing import Any, Literal

Language = Literal[
    "english", "chinese", "japanese", "korean", "russian", "arabic", "german", "french", "spanish", "italian", "portuguese",
    "digits",
]  # fmt: skip
Detection = Literal["script", "sentence"]

CODES = {
    "english": "en", "chinese": "zh", "japanese": "ja", "korean": "ko", "russian": "ru", "arabic": "ar", "german": "de",
    "french": "fr", "spanish": "es", "italian": "it", "portuguese": "pt",
}  # fmt: skip
"""What py3langid calls them; it chooses among these alone."""
FEWEST_WORDS = 4
"""A sentence of fewer words goes by its script: nobody can tell its language."""

# A character of a script that is written without spaces (kana, Han) counts as a word of its own; Hangul has spaces.
_HAN, _KANA = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff", "\u3040-\u30ff"
_UNSPACED = _KANA + _HAN
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W\d_{_UNSPACED}]+(?:['’][^\W\d_{_UNSPACED}]+)*")
_LATIN = "A-Za-z\u00aa\u00ba\u00c0-\u024f'’"
_SCRIPTS = {
    name: re.compile(rf"[{letters}]+")
    for name, letters in {
        "english": "A-Za-z'’", "chinese": _HAN, "japanese": _UNSPACED, "korean": "\u1100-\u11ff\uac00-\ud7a3",
        "russian": "\u0400-\u052f", "arabic": "\u0600-\u06ff\u0750-\u077f", "german": _LATIN, "french": _LATIN,
        "spanish": _LATIN, "italian": _LATIN, "portuguese": _LATIN,
    }.items()
}  # fmt: skip
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|[\n。！？]+")


def language_share(thought: str, language: Language, by: Detection = "script") -> float | None:
    """Units of the target language / all units, 0 to 1; None when there is nothing to count.

    `by="script"`: a word counts when all its letters are of the language's script; English has ASCII letters alone, so French
    without accents passes as English and `naïve` does not. `by="sentence"`: it must stand in a sentence of the language too.
    Text without letters (`4*3=12`) is neutral and left out, as is a single Greek letter (a mathematical symbol). `digits` is
    for the toy's two scripts: the characters 0-9 against a-z.

    >>> language_share("so the sum 4*3=12 是 twelve", "english")
    0.8
    >>> language_share("4*3=5,f+c=a", "digits")
    0.5
    >>> mixed = "We add the two numbers first. Ensuite nous divisons le tout par deux."
    >>> language_share(mixed, "english"), language_share(mixed, "english", "sentence")
    (1.0, 0.46153846153846156)
    """
    if language == "digits":
        target, other = len(re.findall("[0-9]", thought)), len(re.findall("[a-z]", thought))
        return target / (target + other) if target + other else None
    hits = total = 0
    for sentence in [thought] if by == "script" else _SENTENCE_END.split(thought):
        words = [w for w in _WORD.findall(sentence) if not (len(w) == 1 and "\u0370" <= w <= "\u03ff")]  # no Greek letters
        total += len(words)
        if by == "script" or len(words) < FEWEST_WORDS or _detected(" ".join(words), language):
            hits += sum(n for word, n in Counter(words).items() if _SCRIPTS[language].fullmatch(word))
    return hits / total if total else None


def readable(thought: str, language: Language, threshold: float, by: Detection = "script") -> bool:
    """Whether at least `threshold` of the thinking is in the target language; text without any unit passes."""
    share = language_share(thought, language, by)
    return share is None or share >= threshold


def _detected(text: str, language: Language) -> bool:
    return bool(_identifier().classify(text)[0] == CODES[language])


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    found = LanguageIdentifier.from_model_file(MODEL_FILE)
    found.set_languages(list(CODES.values()))
    return found
