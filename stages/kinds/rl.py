"""Reinforcement learning from verifiable rewards: R1-Zero, reasoning, all scenarios (DeepSeek-R1, section 2).

R1-Zero starts from a base model with accuracy and format rewards alone; the reasoning stage starts from the cold-start model
and adds the language-consistency reward. Both are this kind.
"""

import contextlib
from typing import Annotated, Any, Literal, Self

from pydantic import model_validator

from stages.contract.config import ADDED, ModelRef
from stages.contract.errors import UserError
from stages.engine.settings import Lora
from stages.evals.contamination import decontaminated
from stages.problems.decontamination import Decontaminated
from stages.problems.sources import ProblemSource, load_problem_set, unjudged_at, verifiers_asked
from stages.problems.templates import Template
from stages.rewards.answers.verifiers import used
from stages.rewards.score import Rewards
from stages.rl.settings import GRPO
from stages.rollout.protocol import Sampling
from stages.rollout.settings import RolloutSettings
from stages.store.stage import Result, StageContext, StageKind, warn


class RLConfig(Decontaminated, GRPO):
    """Policy, problems, rewards and the settings of GRPO."""

    kind: Literal["rl"]
    """This kind."""
    policy: ModelRef
    """The stage whose model is trained."""
    problems: ProblemSource
    """Problems to train on."""
    held_out: ProblemSource
    """Problems for the evaluation during training, never trained on."""
    template: Template = Template()
    """How a question becomes a prompt."""
    sampling: Sampling = Sampling()
    """How answers are sampled; R1-Zero: temperature 1, at most 32,768 tokens."""
    rewards: Rewards = Rewards()
    """What an answer earns."""
    rollout: RolloutSettings = RolloutSettings()
    """Which engine samples. With `vllm` the default of `importance_cap` is 2: it rounds otherwise than the trainer."""

    lora: Annotated[Lora | None, ADDED] = None
    """Train low-rank adapters instead of all weights; the engine `torch` samples with them in place. A value model of its own
    is trained whole. Null: all weights."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_engine(cls, given: Any) -> Any:
        return {"importance_cap": 2.0, **given} if isinstance(given, dict) and _samples_elsewhere(given) else given

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.sampling.top_p < 1:
            raise ValueError("sampling.top_p must be 1 in training: a cut distribution biases the ratio")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0 in training: greedy answers of a group are all the same")
        if self.rewards.overlong_buffer is not None and self.rewards.overlong_buffer > self.sampling.max_tokens:
            raise ValueError("rewards.overlong_buffer must not be larger than sampling.max_tokens")
        unjudged = unjudged_at(self.problems, "problems") or unjudged_at(self.held_out, "held_out")
        if unjudged and not self.rewards.beside_accuracy:
            what = f"{unjudged} is unjudged, and its answers can earn nothing but accuracy, which they do not have"
            raise ValueError(f"{what}: give `rewards.preference` (with its model) or another part a weight")
        return self


def _samples_elsewhere(given: dict[str, Any]) -> bool:
    """Whether the settings name another engine than the trainer's own model."""
    rollout = given.get("rollout")
    return (rollout.get("engine") if isinstance(rollout, dict) else getattr(rollout, "engine", None)) == "vllm"


def run(context: StageContext[RLConfig]) -> Result:
    """Train the policy."""
    from stages.engine.adapters import adapted, merged
    from stages.engine.deepspeed_engine import Engine
    from stages.engine.scorer import TokenScorer, TokenValueScorer, ValueScorer
    from stages.rl.reference import Reference
    from stages.rl.train import Trainer
    from stages.rl.weight_sync import follow_policy, vllm_remark
    from stages.rollout.sampled_check import check_prompts_fit
    from stages.rollout.torch_engine import TorchRollout, load_model, load_tokenizer, pick_device

    config = context.config
    remarks = config.rewards.remarks(used(verifiers_asked(config.problems, config.held_out), config.rewards.verifier))
    problems = load_problem_set(config.problems, "problems")
    held_out = load_problem_set(config.held_out, "held_out")
    kept_back = {problem.question for problem in held_out.problems}
    trained = [problem for problem in problems.problems if problem.question not in kept_back]
    if not trained:
        raise UserError("every problem is held out", where="problems", mend="train on others than `held_out`")
    cleaned = decontaminated(config, trained, held_out.problems, config.template.examples)
    folder = context.inputs["policy"]
    tokenizer = load_tokenizer(folder)
    device = pick_device(config.compute.device)
    ppo, shared = config.algorithm == "ppo", config.critic.model == "shared"
    scorer = TokenValueScorer if ppo and shared else TokenScorer

    def start() -> Any:
        return adapted(load_model(folder), config.lora, config.seed)

    model = start()
    prompts = [config.template.render(problem.question) for problem in (*cleaned.problems, *held_out.problems)]
    encode = TorchRollout(model, tokenizer).encode
    check_prompts_fit(model, encode, prompts, config.sampling.max_tokens, trained=True)
    policy = Engine(scorer(model), config, config.deepspeed, device)
    reference = Reference(start(), policy.device) if config.kl > 0 else None
    # A value model has a new head, so what its first weights lose when an adapter is merged in 16 bits does not matter.
    critic = Engine(ValueScorer(merged(load_model(folder))), config, config.deepspeed, device) if ppo and not shared else None
    with contextlib.ExitStack() as stack:
        follower = None
        if config.rollout.engine == "vllm":
            follower = stack.enter_context(follow_policy(config.rollout, policy, tokenizer, folder, context.folder))
        trainer = Trainer(context, policy, tokenizer, cleaned.problems, held_out.problems, reference, critic, follower)
        check = trainer.check(prompts)
        warn(check.warnings, main=context.main)
        result = trainer.run()
    result.metrics |= check.metrics
    result.remarks += check.warnings
    if config.lora is not None and config.rollout.engine == "vllm":
        result.remarks.append(vllm_remark(policy.model.dtype))
    result.remarks += [*remarks, *problems.remarks("problems"), *held_out.remarks("held_out")]
    if both := len(problems.problems) - len(trained):
        result.remarks.append(f"problems: {both} not trained on, because they are held out")
    result.remarks += cleaned.remarks("problems")
    result.notes["problems"] = problems.report() | {"held_out_word_for_word": both, "decontaminated": cleaned.report()}
    return result


KIND = StageKind(name="rl", version=3, config=RLConfig, output="model", run=run, distributed=True)
