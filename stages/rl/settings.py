"""Settings of the RL loop. No torch here: a recipe is checked without it.

The defaults written here are GRPO's. Another `algorithm` has other defaults for the fields that its row in `algorithms.py`
names; whatever a recipe sets itself stands.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.contract.config import ADDED, EXECUTION, Config
from stages.engine.settings import Checkpoints, DeepSpeedName, Training
from stages.rewards.health import Health
from stages.rl.algorithms import (
    ALGORITHMS,
    AggregationName,
    AlgorithmName,
    Estimator,
    KLPlace,
    PresetName,
    RatioName,
    with_defaults,
)
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


class Critic(Config):
    """PPO's value model, and how advantages come from it."""

    model: Literal["own", "shared"] = "own"
    """`own`: a copy of the policy's start with a head of its own. `shared`: a head on the policy, trained in one loss."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate of an own value model; it follows the policy's schedule."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of a shared head's value loss beside the policy's."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """γ: what a reward is worth one token earlier. Text has no clock: 1."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """λ of the policy's advantages. At 1 the Monte-Carlo return less the value; 0.95, PPO's habit, forgets an answer's end
    after a few dozen tokens (DeepSeek-R1, appendix A.3: clearly worse; VC-PPO, arXiv 2503.01491, why)."""
    lam_critic: float = Field(default=1.0, ge=0, le=1)
    """λ of the returns that the value model learns (VC-PPO decouples it from the policy's: 1)."""
    length_adaptive: float | None = Field(default=None, gt=0)
    """α: λ = 1 − 1/(α × length) for the policy's advantages instead of `lam` (VAPO, arXiv 2504.05118: 0.05)."""
    clip: float | None = Field(default=0.2, gt=0)
    """ε of the clipped value loss; null: not clipped."""
    whiten: bool = True
    """Whether advantages are whitened over all tokens of the rollout."""
    pretrain: int = Field(default=0, ge=0)
    """The first so many of `steps` train the value model alone (VC-PPO: 50); wants an own one."""


class GRPO(Training):
    """Settings of the loop, beside the optimizer's."""

    algorithm: AlgorithmName = "grpo"
    """Which row of the table in stages/rl/algorithms.py: advantage, ratio, aggregation, clip and KL."""
    preset: Annotated[PresetName | None, EXECUTION] = None
    """Named clip and KL over grpo's own: `r1` (ε 10, β 0.001) or `field` (0.2 / 0.28, β 0)."""
    steps: int = Field(default=100, ge=1)
    """Rollouts; each is followed by `epochs` × `minibatches` updates. R1-Zero: 10,400 updates, 16 a rollout."""
    most_tokens: Annotated[int | None, ADDED] = Field(default=None, ge=1)
    """Training ends after the step in which so many tokens were sampled, at the latest after `steps`: the same budget for
    variants whose answers differ in length. A schedule still goes by `steps`. Null: `steps` alone."""
    questions: int = Field(default=32, ge=1)
    """Different problems of a step, over all ranks (R1-Zero: 512, 32 an update); any number goes with any number of ranks."""
    samples: int = Field(default=16, ge=1)
    """Answers to each problem: the group (R1-Zero: 16). All but PPO need two, for one answer has none to be compared with."""
    max_resamples: int = Field(default=0, ge=0)
    """Dynamic sampling (DAPO, arXiv 2503.14476): groups whose rewards are all equal are left out and other problems drawn in
    their place, at most so many times a step; then the step makes do with what it has. 0: every group stays."""
    one_step_off: Annotated[bool, ADDED] = False
    """Sample the next rollout with the policy of before, while it is updated. Off-policy by one step; the default of
    `importance_cap` is then 2, which corrects for it. It is meant for a sampler with a processor of its own (vLLM); its gain
    is not measured."""
    ratio: RatioName = "token"
    """ρ of each token, of the sequence (the geometric mean over an answer), or the product over the whole answer."""
    aggregation: AggregationName = "sample_mean"
    """How tokens are weighed: `sample_mean` each answer alike, `token_mean` each token alike, `constant` each token alike by a
    number that does not depend on any length. With a ratio of whole answers only `sample_mean` weighs answers alike."""
    clip_low: float | None = Field(default=0.2, gt=0)
    """ε below: the ratio is clipped at 1 − ε (the field: 0.2; R1: 10, which never binds below); null: not at all."""
    clip_high: float | None = Field(default=0.2, gt=0)
    """ε above: the ratio is clipped at 1 + ε (the field: 0.2 or 0.28; R1: 10); null: not at all."""
    clip_dual: float | None = Field(default=None, gt=1)
    """c of dual-clip PPO (arXiv 1912.09729: 3): bounds the loss of answers worse than their group; null: none."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Truncated importance weights min(π_trainer/π_sampler, cap) where the sampler is not the trainer's own policy of now (the
    field: 2); null: none."""
    kl: float = Field(default=0.001, ge=0)
    """β: weight of the KL of policy and reference (R1-Zero: 0.001). At 0 no reference model is kept."""
    kl_estimator: Estimator = "k3"
    """The estimate of the KL: k1, k2 or k3 (stages/rl/kl.py says what each is good for)."""
    kl_place: KLPlace = "loss"
    """In the `loss` (GRPO), or off the `reward`: of each token in PPO, of the whole answer elsewhere."""
    kl_correction: bool = False
    """Multiply the KL of the loss by π/π_old, which makes its gradient right (DeepSeek-V3.2)."""
    reference_every: int | None = Field(default=None, ge=1)
    """Steps after which the reference becomes the policy of then (R1-Zero: 400 updates, 25 rollouts); null: never."""
    minibatches: int = Field(default=1, ge=1)
    """Updates per rollout and epoch; its answers are split at random among them (R1-Zero: 16)."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a rollout's answers (R1-Zero: 1). With one epoch of one minibatch every update is on-policy."""
    mask_truncated: bool = False
    """Overlong filter (DAPO): an answer cut at the limit keeps its reward in its group but is not trained on."""
    critic: Critic = Critic()
    """The value model of `algorithm: ppo`."""
    mismatch_alarm: Annotated[float, EXECUTION] = Field(default=1e-3, gt=0)
    """Steps whose sampler and trainer differ by a larger KL are named in the stage's remarks."""
    select: Literal["best", "last"] = "best"
    """Which checkpoint becomes the model: the best held-out reward (the later one on a tie), or the last."""
    evaluation: HeldOut = HeldOut()
    """Held-out evaluation during training."""
    collapse: Collapse = Collapse()
    """When to stop early."""
    health: Annotated[Health, EXECUTION] = Health()
    """When to warn, or stop, because the rewards are being gamed or a verifier fails."""
    deepspeed: DeepSpeedName = "zero0"
    """DeepSpeed settings: `zero0` to `zero3`, or the path of a JSON file."""
    packing: Annotated[Packing, EXECUTION] = Packing()
    """Rows and micro-batches of the update."""
    checkpoints: Annotated[Checkpoints, EXECUTION] = Checkpoints(every=10)
    """When checkpoints are written."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_algorithm(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return with_defaults({"importance_cap": 2.0, **given} if given.get("one_step_off") else given)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        ppo = self.algorithm == "ppo"
        if not ppo and self.critic != Critic():
            raise ValueError(f"`critic` belongs to `algorithm: ppo`; {self.algorithm} has no value model")
        if self.preset and self.algorithm != "grpo":
            raise ValueError(f"preset `{self.preset}` is of grpo's clip and KL; with {self.algorithm} set `preset: null`")
        if self.samples == 1 and not ppo:
            raise ValueError(f"samples must be at least 2: {self.algorithm} compares the answers of a group")
        if self.samples == 1 and self.max_resamples:
            raise ValueError("max_resamples needs groups: one answer to a problem (`samples: 1`) is always like itself")
        if self.one_step_off and self.max_resamples:
            raise ValueError("one_step_off samples while ranks are busy otherwise: set `max_resamples: 0`")
        if self.critic.pretrain and self.critic.model == "shared":
            raise ValueError("critic.pretrain wants `critic.model: own`: training a shared one alone would change the policy")
        if self.critic.pretrain >= self.steps:
            raise ValueError("critic.pretrain must be smaller than steps: the policy is trained in the rest of them")
        if self.clip_dual is not None and ALGORITHMS[self.algorithm].surrogate == "weight":
            raise ValueError(f"clip_dual has no meaning for {self.algorithm}: its gradient is never taken away")
        if self.kl_correction and self.kl_place == "reward":
            raise ValueError("kl_correction is for a KL in the loss; set `kl_place: loss`")
        return self

    @property
    def on_policy(self) -> bool:
        """Whether a rollout has one update: the ratio is 1 by construction."""
        return self.epochs * self.minibatches == 1

    @property
    def taxed(self) -> bool:
        """Whether a KL is taken off the reward."""
        return self.kl > 0 and self.kl_place == "reward"
