"""Check an RL stage before its first step: the trainer's path, and the engine that samples.

It comes before a checkpoint is restored, so that a resumed run decides by the same weights as an uninterrupted one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.pack import row
from stages.engine.self_check import TrainingCheck, check_engine, check_prompts, check_texts, largest_of_ranks
from stages.rollout.protocol import Completion, Rollout
from stages.rollout.sampled_check import check_sampler, checked_temperature


@dataclass
class StartCheck:
    """The outcome, for the stage's manifest."""

    metrics: dict[str, float]
    warnings: list[str]


def check_policy(policy: Engine, rollout: Rollout, prompts: Sequence[Sequence[int]], temperature: float) -> StartCheck:
    """Set the path of the policy's engine, and see that the engine that samples agrees. Every rank calls it.

    rollout: the engine that samples, with the policy's weights; prompts: token ids of the stage's prompts.
    Raises UserError when trainer or sampler do not compute the model's own log-probabilities.
    """
    model, chosen, temperature = policy.model, check_prompts(policy.model, prompts), checked_temperature(temperature)
    checks: list[TrainingCheck] = []

    def own(answers: list[Completion]) -> tuple[list[Tensor], float]:
        texts = check_texts(model, chosen, [answer.ids for answer in answers])
        if not checks:
            checks.append(check_engine(policy, texts, temperature))
            return checks[0].own, checks[0].tolerance
        with torch.no_grad():
            logps = [policy.score(row([text], [0]), temperature, own=True)[0].cpu() for text in texts]
        return logps, checks[0].tolerance

    sampled = check_sampler(rollout, model, chosen, temperature, own, largest_of_ranks)
    (trained,) = checks
    warnings = [warning for warning in (trained.warning, sampled.warning) if warning]
    return StartCheck(trained.metrics | sampled.metrics, warnings)
