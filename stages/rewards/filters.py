"""What makes a sampled answer fit to learn from: correct and readable (DeepSeek-R1, sections 2.3.1 and 2.3.3)."""

import re
from collections import Counter

from pydantic import Field

from stages.problems.episode import Episode
from stages.rewards.language import readable
from stages.rewards.settings import Rewards
from stages.rewards.tags import thinking
from stages.store.config import Config

FILTERS = ("finished", "correct", "format", "thinking", "language", "repetition")
"""What an answer must pass, in this order; an answer that fails is counted under the first one it fails."""


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


def first_failure(episode: Episode, filters: Filters, rewards: Rewards) -> str | None:
    """The first of `FILTERS` that a scored answer fails, or None."""
    thought = (thinking(episode.text) or "").strip()
    passed = {
        "finished": not episode.truncated,
        "correct": episode.scored.verdict == "right",
        "format": episode.scored.parts["format"] == 1.0,
        "thinking": len(thought) >= filters.min_thinking,
        "language": readable(thought, rewards.language_target, filters.min_language, rewards.language_by),
        "repetition": most_repeats(thought, filters.repetition_words) <= filters.max_repeats,
    }
    return next((name for name in FILTERS if not passed[name]), None)


def most_repeats(text: str, length: int) -> int:
    """How often the most frequent sequence of `length` words stands in a text; 0 when the text is shorter.

    >>> most_repeats("a b a b a b", 2)
    3
    """
    words = [word for word in re.split(r"[\s,]+", text) if word]
    sequences = Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    return max(sequences.values(), default=0)
