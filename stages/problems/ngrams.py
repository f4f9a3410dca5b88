"""Finds questions in other texts although case, punctuation and white space differ: by word n-grams, short ones whole.

The usual rule (GPT-3, appendix C, n = 13): two texts that share n words in a row are the same problem. Phrases are excepted
(`where m and n are relatively prime positive integers find m`): n words that several different questions have, or more than 10
different texts (GPT-3's number). A whole question is always found, however often it is there. One question may be there several
times, with other words around it (a prompt) or in two evaluations: that makes no phrase of it.

What the rule cannot judge is a question of fewer than n words. Such a one is looked for whole, numbers and signs of arithmetic
included (`3 + 5` is not `3 - 5`): from 8 words and signs on anywhere, shorter ones only where sentences begin and end, because
"What is 2 + 3" stands in many honest questions.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

SHORTEST_ANYWHERE = 8
"""Words and signs of the shortest question that is looked for inside sentences (the least n that GPT-3 used)."""
COMMON = 10
"""Texts that may share n words with a question, and questions that may share a text; what more of them have is a phrase."""
ANCHOR = 24
"""Characters by which whole questions are looked up, before they are compared."""

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # each sign counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_TOKEN = re.compile(rf"\d+(?:\.\d+)+|[{_CJK}]|[^\W_{_CJK}]+|[-+*/^=<>|%!()]|\S")
_SIGNS = "-+*/^=<>|%!()"
_SAME = {"−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "÷": "/", "’": "'", "‘": "'", "`": "'", "´": "'"}
_SENTENCE = re.compile(r"(?<=[.?!:;])[$*_]*\s+|\n+|[\"“”«»]|\$\$|\\\[|\\\]")


@dataclass(frozen=True)
class Found:
    """Where a text was found."""

    name: str
    """Name under which the question was added."""
    words: str
    """The words that both have."""


def words(text: str) -> list[str]:
    """The words of a text, in small letters, without punctuation; `1,000` is one word, `3.5` two, `Tom's` one.

    >>> words("Tom's  9-kilometer walk: $1,000!")
    ['toms', '9', 'kilometer', 'walk', '1000']
    """
    return _WORD.findall(_plain(text))


def tokens(text: str) -> list[str]:
    """The words of a text and its signs of arithmetic, decimals whole. A sign counts beside a number, letter or bracket.

    >>> tokens("Is a well-known f(x) = 3.5x - 2 (in cm) odd?")
    ['is', 'a', 'well', 'known', 'f', '(', 'x', ')', '=', '3.5', 'x', '-', '2', 'in', 'cm', 'odd']
    """
    return _tokens(_plain(text))


def _tokens(plain: str) -> list[str]:
    found = [(match[0], match.start(), match.end()) for match in _TOKEN.finditer(plain)]
    kept = []
    for index, (part, start, end) in enumerate(found):
        before = found[index - 1] if index else ("", -1, -1)
        after = found[index + 1] if index + 1 < len(found) else ("", -1, -1)
        if (part in _SIGNS and _counts(part, start, end, before, after)) or _WORD.match(part):
            kept.append(part)
    return kept


def _counts(sign: str, start: int, end: int, before: tuple[str, int, int], after: tuple[str, int, int]) -> bool:
    """Whether a sign is one of arithmetic, from what stands before and after it (text, start, end)."""
    if sign == "-":
        hyphen = len(before[0]) > 1 and before[0].isalpha() and before[2] == start and after[1] == end
        return _mathematical(after[0]) and not hyphen
    if sign == "!":  # a factorial
        return _mathematical(before[0]) and before[0] not in "!$" and before[2] == start
    if sign in "%)":
        return _mathematical(before[0])
    return _mathematical(after[0]) or (sign != "(" and _mathematical(before[0]))


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    for sign, same in _SAME.items():  # `translate` takes ten times as long
        folded = folded.replace(sign, same)
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", folded.replace("'", ""))


def _mathematical(token: str) -> bool:
    return token[:1].isdecimal() or token in ("\\", "$") or (len(token) == 1 and (token.isalpha() or token in _SIGNS))


def _key(parts: Iterable[str]) -> str:
    """Tokens in one, so that it does not matter where a text parts its words; numbers stay apart."""
    key, after_number = [], False
    for part in parts:
        key.append(f" {part}" if after_number and part[:1].isdecimal() else part)
        after_number = part[-1:].isdecimal()
    return "".join(key)


class Questions:
    """The questions that are looked for."""

    def __init__(self, n: int) -> None:
        """`n`: words in a row that make two texts the same."""
        self.n = n
        self._known: set[tuple[str, str]] = set()
        self._named: dict[str, dict[str, None]] = {}
        self._told_by: dict[str, str] | None = None
        self._whole: dict[str, list[tuple[str, str]]] = {}
        self._short: dict[str, str] = {}
        self._middle: dict[int, dict[str, list[tuple[str, str]]]] = {}
        self._longest = 0

    def add(self, name: str, question: str) -> None:
        """Look for this question too; one that is there already keeps its first name.

        Several texts under one name are one question, as are texts of which one contains the other.
        """
        plain = _plain(question)
        found, exact = _WORD.findall(plain), _tokens(plain)
        whole = "".join(found)
        if len(found) >= self.n:
            self._named.setdefault(" ".join(found), {})[name] = None
            self._told_by = None
        if (whole, _key(exact)) in self._known:
            return
        self._known.add((whole, _key(exact)))
        if len(found) >= self.n and len(whole) >= ANCHOR:
            self._whole.setdefault(whole[:ANCHOR], []).append((whole, name))
        elif exact:
            self._short.setdefault(_key(exact), name)
            self._longest = max(self._longest, len(exact))
            if found and len(exact) >= SHORTEST_ANYWHERE:
                self._middle.setdefault(len(found), {}).setdefault(" ".join(found), []).append((_key(exact), name))

    def find(self, texts: Sequence[str]) -> list[Found | None]:
        """What each of the texts has of the questions, if anything."""
        if self._told_by is None:
            self._told_by = self._index()
        told_by = self._told_by
        whole: list[Found | None] = []
        shared: list[list[str]] = []
        distinct: dict[str, list[str]] = {}  # a text that is there often, as prompts of several answers are, makes no phrase
        for text in texts:
            found = words(text)
            whole.append(self._find_whole(found) or self._find_sentences(text) or self._find_middle(text, found))
            shared.append([ngram for ngram in self._ngrams_of(found) if ngram in told_by])
            if shared[-1]:
                distinct[" ".join(found)] = shared[-1]
        often = Counter(ngram for ngrams in distinct.values() for ngram in ngrams)
        told = [next((Found(told_by[ngram], ngram) for ngram in ngrams if often[ngram] <= COMMON), None) for ngrams in shared]
        return [w or t for w, t in zip(whole, told, strict=True)]

    def _index(self) -> dict[str, str]:
        """The n-grams that tell a question, and its name. What is in different questions tells none of them."""
        owners: dict[str, tuple[str, str] | None] = {}
        # The shortest first: whatever else has the n-gram must contain that one, or be of the same document.
        for text, names in sorted(self._named.items(), key=lambda item: len(item[0])):
            padded = f" {text} "
            for ngram in self._ngrams_of(text.split(" ")):
                owner = owners.setdefault(ngram, (next(iter(names)), padded))
                apart = owner is not None and owner[0] not in names and owner[1] not in padded
                if apart or len(names) > COMMON:  # the instructions of a task, say
                    owners[ngram] = None
        return {ngram: owner[0] for ngram, owner in owners.items() if owner is not None}

    def _ngrams_of(self, found: list[str]) -> list[str]:
        """The different n-grams of a text's words, in order."""
        return list(dict.fromkeys(" ".join(found[start : start + self.n]) for start in range(len(found) - self.n + 1)))

    def _find_whole(self, found: list[str]) -> Found | None:
        """A whole question, its words parted anyhow (`9 kilometer`, `9kilometer`)."""
        if not self._whole:
            return None
        text, ends = "".join(found), set(accumulate(map(len, found)))
        for start in (0, *sorted(ends)):
            for whole, name in self._whole.get(text[start : start + ANCHOR], ()):
                if text.startswith(whole, start) and start + len(whole) in ends:
                    return Found(name, whole)
        return None

    def _find_sentences(self, text: str) -> Found | None:
        """A short question that is the whole text, or one or several sentences of it."""
        if not self._short:
            return None
        exact = tokens(text)
        if name := self._short.get(_key(exact)):  # signs at the end of a line stand beside what the next begins with
            return Found(name, " ".join(exact))
        sentences = [exact for part in _SENTENCE.split(text) if part and (exact := tokens(part))]
        for first in range(len(sentences)):
            run: list[str] = []
            for sentence in sentences[first:]:
                run = run + sentence
                if len(run) > 2 * self._longest:  # twice: a text may part its words more often than the question did
                    break
                if name := self._short.get(_key(run)):
                    return Found(name, " ".join(run))
        return None

    def _find_middle(self, text: str, found: list[str]) -> Found | None:
        """A question of nearly n words anywhere in the text."""
        exact = cache(lambda: _key(tokens(text)))
        for length, questions in self._middle.items():
            for start in range(len(found) - length + 1):
                for key, name in questions.get(" ".join(found[start : start + length]), ()):
                    if _stands_alone(key, exact()):
                        return Found(name, " ".join(found[start : start + length]))
        return None


def _stands_alone(key: str, text: str) -> bool:
    """Whether `key` is in the text, and no number or formula of it goes on beyond it there."""
    start = text.find(key)
    while start >= 0:
        before, after = text[:start][-1:], text[start + len(key) :][:1]
        longer_number = (before.isdecimal() and key[0].isdecimal()) or (after.isdecimal() and key[-1].isdecimal())
        if not longer_number and not (before and before in _SIGNS) and not (after and after in _SIGNS):
            return True
        start = text.find(key, start + 1)
    return False
