"""A whole GRPO step: ours (collect, prepare, update) against TRL's GRPOTrainer, with the same model, problems and rewards."""

from typing import Any

from tests.bench.material import questions, reward_of
from tests.bench.measure import Bench
from tests.bench.sides import Spec
from tests.bench.worker import Turns

ROUNDS_AHEAD = 64
"""Steps for which problems are laid out; then they come again."""


def step(bench: Bench) -> dict[str, Any]:
    """On-policy, one update, 64 tokens."""
    return _language(bench, "step", 64)


def step_256(bench: Bench) -> dict[str, Any]:
    """The same with longer answers. Against one setting of TRL: without checkpointing it takes what small machines lack."""
    return _language(bench, "step-256", 256, checkpointing=bench.extras["trl_checkpointing"][:1])


def step_inner(bench: Bench) -> dict[str, Any]:
    """Four minibatches with old log-probabilities and a reference."""
    return _language(bench, "step-inner", 64, minibatches=4, kl=0.001)


def step_toy(bench: Bench) -> dict[str, Any]:
    """The quickstart's step with its sizes and micro-batches, whose answers end by themselves: compared per token."""
    sizes = {"questions": bench.size(16, 4), "samples": bench.size(16, 4), "tokens": bench.size(64, 12)}
    place, packing = {"model": str(bench.toy), "problems": str(bench.toy_problems)}, {"micro_tokens": 4096}
    return _compare(bench, "step-toy", {**place, **sizes, "forced": False, "steps": bench.size(3, 1), "packing": packing})


def one_step_off(bench: Bench) -> dict[str, Any]:
    """Our step with the next rollout sampled meanwhile, against our step: here both have the same processors."""
    options = {
        "questions": 2,
        "samples": bench.size(8, 4),
        "tokens": bench.size(64, 8),
        "forced": True,
        "steps": bench.size(3, 1),
    }
    options |= {"model": str(bench.model), "problems": str(bench.problems)}
    what = (
        f"{options['questions']} problems × {options['samples']} samples × {options['tokens']} tokens, one step off / on-policy"
    )
    ahead = Spec("step", "ours", {**options, "one_step_off": True})
    return bench.compare("one-step-off", what, ahead, {"on-policy": Spec("step", "ours", options)})


def step_ppo(bench: Bench) -> dict[str, Any]:
    """What a value model costs: a step of GRPO against one of PPO, whose value model is its own or a head on the policy."""
    options = {"questions": 2, "samples": bench.size(8, 4), "tokens": bench.size(64, 8), "forced": True, "steps": 1}
    options |= {"model": str(bench.model), "problems": str(bench.problems)}
    what = f"{options['questions']} problems × {options['samples']} samples × {options['tokens']} tokens, β 0, GRPO / PPO"
    peers = {
        name: Spec("step", "ours", {**options, "algorithm": "ppo", "critic": {"model": model}})
        for name, model in (("PPO", "own"), ("PPO with a shared head", "shared"))
    }
    return bench.compare("step-ppo", what, Spec("step", "ours", options), peers)


def _language(bench: Bench, name: str, tokens: int, checkpointing: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    sizes = {"questions": 2, "samples": bench.size(8, 4), "tokens": bench.size(tokens, 8)}
    place = {"model": str(bench.model), "problems": str(bench.problems)}
    return _compare(bench, name, {**place, **sizes, "forced": True, "steps": 1, **settings}, checkpointing)


def _compare(bench: Bench, name: str, options: dict[str, Any], settings: list[str] | None = None) -> dict[str, Any]:
    peers = {}
    for checkpointing in settings or bench.extras["trl_checkpointing"]:
        peer = "TRL" if checkpointing == "on" else "TRL without checkpointing"
        own = {"checkpointing": checkpointing == "on", "folder": str(bench.out / "trl")}
        peers[peer] = Spec("step", "trl", {**options, **own})
    what = (
        f"{options['questions']} problems × {options['samples']} samples × {'' if options['forced'] else 'at most '}"
        f"{options['tokens']} tokens, {options.get('minibatches', 1)} updates, β {options.get('kl', 0.0):g}"
    )
    return bench.compare(name, what, Spec("step", "ours", options), peers)


def _ours(options: dict[str, Any], turns: Turns) -> None:
    from stages.engine import distributed
    from tests.bench.ours import Stepper

    known = ("questions", "samples", "tokens", "forced", "minibatches", "kl", "packing", "one_step_off")
    known += ("algorithm", "critic")
    taken = {key: options[key] for key in known if key in options}
    asked = questions(options["problems"], options["questions"] * ROUNDS_AHEAD)
    stepper = Stepper(options["model"], asked, **taken)
    turns.gather = distributed.gather
    turns.settings = {"processes": stepper.policy.world_size}

    def work() -> dict[str, Any]:
        taken = [stepper.step() for _ in range(options["steps"])]
        stepper.settle()
        return {key: sum(step[key] for step in taken) for key in ("tokens", "samples")}

    turns.each(work)


def _trl(options: dict[str, Any], turns: Turns) -> None:
    """TRL's own training loop, held at the begin of every rollout until it is its turn.

    Its gradient checkpointing is on by default; bf16, which is too, is off: float32 on both sides. Nothing is logged or saved.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    updates, sampled = options.get("minibatches", 1), [0, 0]
    every = updates * options["steps"]

    class Held(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0 and not turns.wait():
                raise SystemExit

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0:
                turns.done(tokens=sampled[0], samples=sampled[1])
                sampled[:] = [0, 0]

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        sampled[0] += sum(map(len, completion_ids))
        sampled[1] += len(completion_ids)
        return [reward_of(ids) for ids in completion_ids]

    settings: dict[str, Any] = {
        "per_device_train_batch_size": options["questions"] * options["samples"] // updates,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": updates,
        "num_iterations": 1,
        "num_generations": options["samples"],
        "max_completion_length": options["tokens"],
        "beta": options.get("kl", 0.0),
        "loss_type": "grpo",
        "gradient_checkpointing": options["checkpointing"],
        "bf16": False,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    if options["forced"]:
        settings["generation_kwargs"] = {"min_new_tokens": options["tokens"]}
    quiet: dict[str, Any] = {
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    asked = questions(options["problems"], options["questions"] * ROUNDS_AHEAD)
    trainer = GRPOTrainer(
        model=options["model"],
        reward_funcs=rewards,
        args=GRPOConfig(
            options["folder"],
            **settings,
            **quiet,
            max_steps=10**6,
            shuffle_dataset=False,
            model_init_kwargs={"dtype": torch.float32},
        ),
        train_dataset=Dataset.from_dict({"prompt": asked}),
        processing_class=AutoTokenizer.from_pretrained(options["model"]),
        callbacks=[Held()],
    )
    turns.settings = settings
    trainer.train()


SIDES = {"ours": _ours, "trl": _trl}
