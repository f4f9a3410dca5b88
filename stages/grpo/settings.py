"""Settings of GRPO. No torch here: a recipe is checked without it."""

from typing import Annotated, Literal

from pydantic import Field

from stages.engine.settings import Checkpoints, DeepSpeedName, Optimizer
from stages.store.config import EXECUTION, Config
from stages.supervised.settings import Packing


class HeldOut(Config):
    """Held-out evaluation during training: small, always the same problems and random numbers."""

    every: int = Field(default=10, ge=1)
    """Steps between evaluations; the last step is always evaluated."""
    problems: int = Field(default=64, ge=1)
    """Problems, the first of the stage's `held_out`."""
    samples: int = Field(default=1, ge=1)
    """Answers to each."""


class Collapse(Config):
    """When training is stopped because the policy is being destroyed."""

    below: float = Field(default=0.5, ge=0, le=1)
    """Held-out reward under this share of the best one seen counts as collapsed."""
    patience: int = Field(default=2, ge=1)
    """Collapsed evaluations in a row that stop the stage; its best checkpoint stands."""


class GRPO(Optimizer):
    """Settings of the loop, beside the optimizer's."""

    steps: int = Field(default=100, ge=1)
    """Rollouts; each is followed by `minibatches` updates. R1-Zero: 10,400."""
    questions: int = Field(default=32, ge=1)
    """Different problems of a step, over all ranks (R1-Zero: 32); any number is legal for any number of ranks."""
    samples: int = Field(default=16, ge=2)
    """Answers to each problem: the group (R1-Zero: 16). One answer has no group to be compared with."""
    clip_low: float = Field(default=0.2, gt=0)
    """ε below: the ratio is clipped at 1 − ε (the field: 0.2; R1: 10, which never binds below)."""
    clip_high: float = Field(default=0.2, gt=0)
    """ε above: the ratio is clipped at 1 + ε (the field: 0.2 or 0.28; R1: 10)."""
    kl: float = Field(default=0.001, ge=0)
    """β: weight of k3(policy ‖ reference) in the loss (R1-Zero: 0.001). At 0 no reference model is kept."""
    minibatches: int = Field(default=1, ge=1)
    """Updates per rollout; its answers are split at random among them (R1-Zero: 16). At 1 every update is on-policy."""
    select: Literal["best", "last"] = "best"
    """Which checkpoint becomes the model: the best held-out reward (the later one on a tie), or the last."""
    evaluation: HeldOut = HeldOut()
    """Held-out evaluation during training."""
    collapse: Collapse = Collapse()
    """When to stop early."""
    deepspeed: DeepSpeedName = "zero0"
    """DeepSpeed settings: `zero0` to `zero3`, or the path of a JSON file."""
    packing: Annotated[Packing, EXECUTION] = Packing()
    """Rows and micro-batches of the update."""
    checkpoints: Annotated[Checkpoints, EXECUTION] = Checkpoints(every=10)
    """When checkpoints are written."""
