"""How the stages of a recipe train, as the cost model wants to know it."""

from typing import Any

from stages.costs.steps import Loop
from stages.engine.settings import deepspeed_settings


def rl_loop(config: Any) -> Loop:
    """How an `rl` stage trains."""
    ppo = config.algorithm == "ppo"
    apart = ppo and config.critic.model == "own"
    return Loop(
        processes=config.compute.processes,
        micro_tokens=config.packing.micro_tokens,
        zero=zero_stage(config),
        recompute=config.gradient_checkpointing,
        minibatches=config.minibatches,
        epochs=config.epochs,
        readings=int(config.taxed or not config.on_policy) + int(config.kl > 0) + int(apart),
        critics=int(apart),
    )


def supervised_loop(config: Any) -> Loop:
    """How a supervised stage trains."""
    return Loop(
        processes=config.compute.processes,
        micro_tokens=config.packing.micro_tokens,
        zero=zero_stage(config),
        recompute=config.gradient_checkpointing,
    )


def zero_stage(config: Any) -> int:
    """The ZeRO stage that a training stage asks for."""
    return int(deepspeed_settings(config.deepspeed).get("zero_optimization", {}).get("stage", 0))
