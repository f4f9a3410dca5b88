"""The settings that `evaluate` and `evaluate_model` share: one protocol for every model that is compared."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from stages.contract.config import EXECUTION, StageConfig
from stages.problems.sources import ProblemSource, unjudged_at
from stages.problems.task_files import TaskFile
from stages.problems.templates import Template
from stages.rewards.score import Rewards
from stages.rollout.protocol import Sampling
from stages.rollout.settings import RolloutSettings


class EvaluationConfig(StageConfig):
    """What is asked, how answers are sampled, how they are judged."""

    held_out: ProblemSource
    """Problems that no stage trains on."""
    template: Template = Template()
    """How a question becomes a prompt; the same for every model."""
    sampling: Sampling = Sampling()
    """How answers are sampled. The paper: temperature 0.6, top-p 0.95, 32,768 tokens."""
    samples: int = Field(default=2, ge=1)
    """Answers per problem, k. pass@1 is the mean over them. The paper: 64 for AIME, 16 for MATH-500."""
    rollout: RolloutSettings = RolloutSettings()
    """Which engine samples. Tasks that ask for likelihoods want `torch`."""
    rewards: Rewards = Rewards()
    """How answers are judged. Accuracy, format and language are all measured, whatever their weights."""
    chunk: Annotated[int, EXECUTION] = Field(default=64, ge=1)
    """Problems sampled at once; a stopped stage goes on after its last finished chunk."""
    tasks: tuple[str, ...] = ()
    """Further lm-eval tasks by name (`gsm8k`), run through the same engine with their own settings."""
    task_files: tuple[TaskFile, ...] = ()
    """Further lm-eval tasks as YAML files; their content is part of the fingerprint, and so are what they include,
    the Python files of their `!function`s and the local files of their data."""

    @model_validator(mode="after")
    def _judged(self) -> Self:
        if key := unjudged_at(self.held_out, "held_out"):
            raise ValueError(f"{key} is unjudged, so there is nothing to evaluate: leave it out, or name a verifier for it")
        return self
