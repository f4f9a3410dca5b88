"""The RL loop: collect, prepare, update; held-out evaluation, checkpoints, the choice of the best.

It departs from the paper in three ways: the default clip is the field's (0.2, not R1's 10), the checkpoint is chosen by
held-out reward instead of being the last, and training stops when that reward collapses.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from stages.engine import checkpoints, ranks
from stages.engine.deepspeed_engine import Engine
from stages.engine.scorer import TokenScorer
from stages.grpo.collect import collect
from stages.grpo.metrics import reward_metrics, rollout_metrics
from stages.grpo.prepare import prepare
from stages.grpo.sampler import ProblemSampler
from stages.grpo.select import Selection
from stages.grpo.update import update
from stages.problems.episode import Group, Problem
from stages.rollout.records import write_groups
from stages.rollout.torch_engine import TorchRollout
from stages.store.errors import Interrupted
from stages.store.files import whole_folder
from stages.store.stage import Result, StageContext
from stages.tracking.journal import Journal


class Trainer:
    """One RL stage on one rank."""

    def __init__(
        self,
        context: StageContext[Any],
        engine: Engine,
        tokenizer: Any,
        problems: Sequence[Problem],
        held_out: Sequence[Problem],
        reference: Any = None,
    ) -> None:
        """`reference`: a model with frozen weights for the KL term; None without one."""
        self.context, self.config, self.engine, self.tokenizer = context, context.config, engine, tokenizer
        self.sampler = ProblemSampler(problems, self.config.questions, self.config.seed)
        self.held_out = list(held_out[: self.config.evaluation.problems])
        self.reference = TokenScorer(reference.to(engine.device)).eval() if reference is not None else None
        self.selection = Selection()
        self.tokens = 0
        self.best = context.folder.path / "best"

    def run(self) -> Result:
        """Train, and write the chosen model as the stage's output.

        Raises Interrupted after a checkpoint when a stop was asked for.
        """
        config, folder, main = self.config, self.context.folder, self.context.main
        state = checkpoints.restore(folder.checkpoints, self.engine.load, self.engine.layout, main=main)
        first = state["step"] if state else 0
        if state:
            self.selection, self.tokens = Selection.restored(state["selection"]), state["tokens"]
        journal = Journal(folder.journal, keep_through=first) if main else None
        step = first
        while step < config.steps and not self.selection.stop(config.collapse):
            groups, metrics = self.step(step)
            step += 1
            last = step == config.steps
            if last or step % config.evaluation.every == 0:
                metrics |= self.evaluate(step)
            if journal:
                write_groups(folder.rollouts / f"step-{step:06d}.parquet", groups)
                journal.append(step, config.steps, metrics)
            stop = ranks.any_rank(self.context.stop.requested)
            if last or stop or step % config.checkpoints.every == 0:
                self.checkpoint(step)
            if stop and not last:
                raise Interrupted
        self.publish()
        return Result(
            metrics={
                "steps": float(step),
                "best_step": float(self.selection.best_step),
                "best_reward": self.selection.best_reward,
            },
            remarks=[self._collapse(step)] if self.selection.stop(config.collapse) else [],
            tokens=self.tokens,
        )

    def _collapse(self, step: int) -> str:
        best = f"step {self.selection.best_step} (reward {self.selection.best_reward:.3f})"
        return f"stopped at step {step}: the policy collapsed; its best was {best}"

    def rollout(self) -> TorchRollout:
        """The sampler, with the weights of now."""
        return TorchRollout(self.engine.sampling_model(), self.tokenizer)

    def sample(self, problems: Sequence[Problem], samples: int, purpose: str, step: int) -> list[Group]:
        """Scored groups, the same on every rank."""
        c = self.config
        where = {"rank": self.context.rank, "world_size": self.context.world_size}
        return collect(
            self.rollout(),
            problems,
            c.template,
            c.sampling,
            c.rewards,
            samples,
            seed=c.seed,
            purpose=purpose,
            step=step,
            **where,
        )

    def step(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """One rollout and its updates; `step` counts from 0."""
        config, temperature = self.config, self.config.sampling.temperature
        started = time.monotonic()
        groups = self.sample(self.sampler.draw(step), config.samples, "train", step)
        sampled = time.monotonic()
        lr = config.lr_at(step, config.steps)
        batches = prepare(
            groups, config, self.engine, seed=config.seed, step=step, temperature=temperature, reference=self.reference
        )
        stats = [update(self.engine, batch, config, lr=lr, temperature=temperature) for batch in batches]
        done = time.monotonic()
        episodes = [episode for group in groups for episode in group.episodes]
        tokens = sum(len(e.completion_ids) for e in episodes)
        self.tokens += tokens
        every = [s.metrics() for s in stats]
        updates = {name: fmean(m[name] for m in every if name in m) for name in {n for m in every for n in m}}
        if "train/mismatch_max" in updates:
            updates["train/mismatch_max"] = max(m["train/mismatch_max"] for m in every if "train/mismatch_max" in m)
        return groups, {
            **dict(sorted(updates.items())),
            "train/lr": lr,
            **reward_metrics(episodes),
            **rollout_metrics(groups),
            "time/sample": sampled - started,
            "time/update": done - sampled,
            "time/step": done - started,
            "time/tokens_per_second": tokens / (done - started),
        }

    def evaluate(self, step: int) -> dict[str, float]:
        """Sample the held-out problems, always with the same random numbers; keep the model when it is the best so far."""
        started = time.monotonic()
        groups = self.sample(self.held_out, self.config.evaluation.samples, "held_out", 0)
        episodes = [episode for group in groups for episode in group.episodes]
        found = {f"eval/{name.removeprefix('reward/')}": value for name, value in reward_metrics(episodes).items()}
        found["eval/reward"] = found.pop("eval/total")
        del found["eval/std"]
        found["eval/length"] = fmean(len(e.completion_ids) for e in episodes)
        found["time/eval"] = time.monotonic() - started
        if self.selection.see(step, found["eval/reward"], self.config.collapse) and self.config.select == "best":
            self._keep(self._best_folder(step))
        return found

    def checkpoint(self, step: int) -> None:
        """Write a checkpoint of `step` finished steps; kept models that no checkpoint names any more are removed."""
        state = {"selection": self.selection.state(), "tokens": self.tokens}
        folder, keep = self.context.folder.checkpoints, self.config.checkpoints.keep
        checkpoints.write(folder, step, state, self.engine.save, self.engine.layout, main=self.context.main, keep=keep)
        if self.context.main:
            named = {state["selection"]["best_step"] for state in checkpoints.states(folder)}
            for old in self.best.glob("step-*"):
                if int(old.name.removeprefix("step-")) not in named:
                    shutil.rmtree(old)

    def publish(self) -> None:
        """Make the chosen model the stage's output."""
        output = self.context.folder.output("model")
        # It appears whole: when it is there, an attempt that was killed before its manifest had come this far.
        done = ranks.any_rank(self.context.main and output.exists())
        if done:
            pass
        elif self.config.select == "last" or not self.selection.best_step:
            self._keep(output)
        elif self.context.main:
            with whole_folder(output) as temporary:
                shutil.copytree(self._best_folder(self.selection.best_step), temporary, dirs_exist_ok=True)
        if self.context.main:
            shutil.rmtree(self.best, ignore_errors=True)
        ranks.barrier()

    def _best_folder(self, step: int) -> Path:
        return self.best / f"step-{step:06d}"

    def _keep(self, folder: Path) -> None:
        """Write the current model into `folder`, whole."""
        if not self.context.main:
            self.engine.save_model(folder, self.tokenizer, main=False)
            return
        with whole_folder(folder) as temporary:
            self.engine.save_model(temporary, self.tokenizer, main=True)
