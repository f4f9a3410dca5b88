"""What makes a sampled answer fit to learn from: correct and readable (DeepSeek-R1, sections 2.3.1 and 2.3.3).

The paper names mixed languages, repetition, long paragraphs and code blocks. Its limits are not published: those here are ours,
and the last three filters are used only where a recipe sets them.
"""

import re
from collections import Counter
from typing import Annotated, Self

from pydantic import Field, model_validator

from stages.contract.config import ADDED, Config
from stages.problems.episode import Episode
from stages.rewards.language import readable
from stages.rewards.settings import Rewards
from stages.rewards.tags import thinking

FILTERS = ("finished", "correct", "format", "thinking", "language", "repetition")
"""What every answer must pass, in this order; an answer that fails is counted under the first one it fails."""
OPTIONAL = ("length", "paragraph", "code")
"""What it must pass after them, where it is asked for."""


class Filters(Config):
    """What makes an answer readable. Being correct, well-formed and not truncated is asked for in any case."""

    min_language: float = Field(default=0.98, ge=0, le=1)
    """Least share of the thinking in the rewards' target language."""
    min_thinking: int = Field(default=1, ge=0)
    """Fewest characters of thinking: an answer without thinking shows no reasoning to learn."""
    repetition_words: int = Field(default=8, ge=1)
    """Length of the word sequences whose repetition is counted; words are parted by whitespace and commas."""
    max_repeats: int = Field(default=3, ge=1)
    """Most times such a sequence may stand in the thinking."""
    min_length: Annotated[int | None, ADDED] = Field(default=None, ge=1)
    """Fewest characters of a whole answer, tags included; null: any."""
    max_length: Annotated[int | None, ADDED] = Field(default=None, ge=1)
    """Most characters of a whole answer, tags included; null: any."""
    longest_paragraph: Annotated[int | None, ADDED] = Field(default=None, ge=1)
    """Most characters of the thinking between two empty lines; null: any. The paper drops long paragraphs."""
    code_blocks: Annotated[bool, ADDED] = True
    """Whether a fenced code block (```) may stand in the thinking. The paper drops them."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_length and self.max_length and self.min_length > self.max_length:
            raise ValueError("min_length is larger than max_length")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The filters that are asked for, in their order."""
        asked = {
            "length": self.min_length is not None or self.max_length is not None,
            "paragraph": self.longest_paragraph is not None,
            "code": not self.code_blocks,
        }
        return (*FILTERS, *(name for name in OPTIONAL if asked[name]))


def first_failure(episode: Episode, filters: Filters, rewards: Rewards) -> str | None:
    """The first of the filters that a scored answer fails, or None."""
    thought = (thinking(episode.text) or "").strip()
    passed = {
        "finished": not episode.truncated,
        "correct": episode.scored.verdict == "right",
        "format": episode.scored.parts["format"] == 1.0,
        "thinking": len(thought) >= filters.min_thinking,
        "language": readable(thought, rewards.language_target, filters.min_language, rewards.language_by),
        "repetition": most_repeats(thought, filters.repetition_words) <= filters.max_repeats,
        "length": _within(len(episode.text), filters.min_length, filters.max_length),
        "paragraph": _within(longest_paragraph(thought), None, filters.longest_paragraph),
        "code": filters.code_blocks or "```" not in thought,
    }
    return next((name for name in filters.names if not passed[name]), None)


def _within(number: int, least: int | None, most: int | None) -> bool:
    return (least is None or number >= least) and (most is None or number <= most)


def longest_paragraph(text: str) -> int:
    r"""Characters of the longest paragraph; paragraphs are parted by lines that hold nothing but whitespace.

    >>> longest_paragraph("one\ntwo\n \nthree")
    7
    """
    return max(len(paragraph.strip()) for paragraph in re.split(r"\n[^\S\n]*\n", text))


def most_repeats(text: str, length: int) -> int:
    """How often the most frequent sequence of `length` words stands in a text; 0 when the text is shorter.

    >>> most_repeats("a b a b a b", 2)
    3
    """
    words = [word for word in re.split(r"[\s,]+", text) if word]
    sequences = Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    return max(sequences.values(), default=0)
