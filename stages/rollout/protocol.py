"""What an engine that samples must be able to do, and the settings of sampling."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import Field

from stages.contract.config import Config


class Sampling(Config):
    """How answers are sampled."""

    temperature: float = Field(default=1.0, ge=0)
    """0 takes the most likely token. R1-Zero trains at 1.0; the paper evaluates at 0.6."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; training wants 1.0, because a cut distribution biases the ratio."""
    max_tokens: int = Field(default=512, ge=1)
    """Longest answer in tokens; a longer one is cut and counted as truncated."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer (they stay in it), beside the model's own end tokens."""


@dataclass(frozen=True)
class Request:
    """A prompt to be answered `samples` times."""

    key: str
    """Identifies the prompt in the seed of its samples: the question, which unlike an id is the same wherever it lies."""
    prompt_ids: tuple[int, ...]
    samples: int
    first_sample: int = 0
    """Number of the first sample: sample 3 of a problem is the same whether drawn alone or with the others."""


@dataclass
class Completion:
    """One sampled answer."""

    ids: list[int] = field(default_factory=list)
    """Sampled tokens, the end token included when it came."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each sampled token under the sampling temperature: before top-p, but from vLLM after it. Training
    wants top-p 1, where they are the same."""
    text: str = ""
    """Decoded without special tokens."""
    finish: Literal["stop", "length"] = "length"


Done = Callable[[int, list[Completion]], None]
"""Told the number of a request whose answers are all there, and these."""


class Rollout(Protocol):
    """An engine that samples from the current policy."""

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a prompt."""
        ...

    def sample(
        self, requests: list[Request], sampling: Sampling, *, seed: int, purpose: str, step: int, done: Done | None = None
    ) -> list[list[Completion]]:
        """Answer every request; per request, its samples in order. `done` is told of each request while others go on.

        The random numbers of a sample depend on (seed, purpose, step, request key, sample number) alone.
        """
        ...
