"""The nouns that travel: `Problem` -> `Group` of `Episode`s, each with a `Reward`."""

from dataclasses import dataclass, field
from typing import Literal

from stages.store.unicode_text import replace_surrogates

Verdict = Literal["right", "wrong", "none", "unjudged"]
"""`none`: the verifier had no verdict (time-out, unparsable reference). Counted apart; never trains as wrong. `unjudged`: there
is nothing to check, and the answer trains on its other parts."""

Verifier = Literal["exact", "numeric", "math", "reasoning_gym", "code"]
"""What judges a final answer; the table is in stages/rewards/answers/verifiers.py."""

ProblemVerifier = Literal[Verifier, "unjudged"]
"""What a source of problems can ask for: a verifier, or that nothing judges its answers."""


PARTS = ("accuracy", "format", "language", "overlong", "repetition", "preference", "random")
"""Parts that a reward can have, beside those of the user's own functions."""


@dataclass(frozen=True)
class Problem:
    """A question with a reference answer that a rule can check, or one that has none and is `unjudged`."""

    id: str
    """Stable and unique within its source, such as `gsm8k_test:17`; part of the seed of its samples."""
    question: str
    answer: str
    """The reference answer alone, such as `18`; may be empty where nothing compares with it."""
    source: str
    """Name of where it came from."""
    metadata: str | None = None
    """What its own verifier needs besides the answer, as JSON; reasoning-gym: see stages/problems/gym.py."""
    verifier: ProblemVerifier | None = None
    """What judges its answers; None: the stage's `rewards.verifier`."""

    @property
    def judged(self) -> bool:
        """Whether its answers have an accuracy at all."""
        return self.verifier != "unjudged"


@dataclass(frozen=True)
class Reward:
    """What an answer earned."""

    total: float
    """Weighted sum of the parts: what GRPO sees."""
    parts: dict[str, float]
    """Unweighted parts by name, of `PARTS` or the user's. A part that cannot be measured, or that nothing asks for, is
    left out."""
    verdict: Verdict


@dataclass
class Episode:
    """One sampled answer."""

    problem: Problem
    sample: int
    """Number of this answer among its problem's answers, from 0."""
    prompt: str
    prompt_ids: list[int]
    completion_ids: list[int]
    """With the end token when it was sampled."""
    logprobs: list[float]
    """The sampler's log-probability of each completion token, at the temperature of the sampling."""
    text: str
    """What rewards read: the part of the answer that the template has opened (such as `<think>`), then the answer. Lone
    surrogates are replaced by U+FFFD, so that the text can be encoded wherever it goes."""
    finish: Literal["stop", "length"]
    """`length`: cut at the limit. Truncated thinking is no answer."""
    reward: Reward | None = None
    faults: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Function of the user's -> why it has no value for this answer. Not in the records."""

    def __post_init__(self) -> None:
        self.text = replace_surrogates(self.text)

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut at the limit."""
        return self.finish == "length"

    @property
    def scored(self) -> Reward:
        """The reward, which must have been given."""
        assert self.reward is not None, "the episode was not scored"
        return self.reward


@dataclass
class Group:
    """All answers to one problem in one step."""

    problem: Problem
    episodes: list[Episode] = field(default_factory=list)
