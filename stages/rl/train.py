"""The RL loop: collect, prepare, update; held-out evaluation, checkpoints, the choice of the best.

It departs from the paper in three ways: the default clip is the field's (0.2, not R1's 10), the checkpoint is chosen by
held-out reward instead of being the last, and training stops when that reward collapses.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from stages.contract.errors import Interrupted, UserError
from stages.engine import distributed
from stages.engine.changed_weights import same_weights
from stages.engine.checkpoint.checkpointer import Checkpointer, states
from stages.engine.deepspeed_engine import Engine
from stages.problems.episode import Problem
from stages.rewards.answers.verifiers import canaries_missed, used
from stages.rewards.coverage import check_coverage
from stages.rewards.health import Watch, summary
from stages.rewards.learning import Learning, rl_learning
from stages.rl.best_model import Kept
from stages.rl.collect import Collected, Scene, collect
from stages.rl.metrics import held_out_metrics, reward_metrics, rollout_metrics
from stages.rl.one_step_off import Ahead
from stages.rl.prepare import prepare
from stages.rl.problem_sampler import ProblemSampler
from stages.rl.reference import Reference
from stages.rl.select import Selection
from stages.rl.start_check import StartCheck, check_policy
from stages.rl.update import UpdateStats, update
from stages.rl.weight_sync import PolicyRollout
from stages.rollout.records import write_groups
from stages.rollout.sampled_check import first_prompts
from stages.rollout.torch_engine import TorchRollout
from stages.runtime.clock import clock
from stages.runtime.profile import traced
from stages.store.manifest import LEARNING
from stages.store.stage import Result, StageContext
from stages.tracking.journal import Journal, read


class Trainer:
    """One RL stage on one rank."""

    def __init__(
        self,
        context: StageContext[Any],
        policy: Engine,
        tokenizer: Any,
        problems: Sequence[Problem],
        held_out: Sequence[Problem],
        reference: Reference | None = None,
        critic: Engine | None = None,
        follower: PolicyRollout | None = None,
    ) -> None:
        """`reference` for a KL term, None without one; `critic`: PPO's own value model; `follower`: samples in its stead."""
        self.context, self.config, self.policy, self.tokenizer = context, context.config, policy, tokenizer
        config = self.config
        self.reference, self.critic = reference, critic
        self.scene = Scene(
            rollout=self._own_model,
            template=config.template,
            sampling=config.sampling,
            rewards=config.rewards.located(context.inputs),
            seed=config.seed,
            rank=context.rank,
            world_size=context.world_size,
            device=policy.device,
        )
        if follower is not None:
            self.scene.rollout, self.scene.rest = follower.fresh, follower.rest
        self.sampler = ProblemSampler(problems, config.questions, config.seed)
        self.ahead = Ahead(self.scene, self.sampler, config.questions, config.samples) if config.one_step_off else None
        self.held_out = list(held_out[: config.evaluation.problems])
        self.verifiers = used((p.verifier for p in (*problems, *self.held_out)), config.rewards.verifier)
        self.selection = Selection()
        self.tokens = 0
        self.position = 0
        """Where the sampler stands."""
        self.mismatched = 0
        """Steps whose sampler and trainer differed by more than the alarm."""
        self._rollout: TorchRollout | None = None
        self.kept = Kept(context.folder.path, self._save, main=context.main)
        self.checkpoints = Checkpointer(context.folder.checkpoints, config.checkpoints, context.rank)

    def _own_model(self) -> TorchRollout:
        model = self.policy.sampling_model(apart=self.config.one_step_off)
        if self._rollout is None:  # one for the whole stage: what the check chose holds for every step
            self._rollout = TorchRollout(model, self.tokenizer, self.config.rollout.tokens, self.config.rollout.decoder)
        self._rollout.model = model
        return self._rollout

    def check(self, prompts: Sequence[str]) -> StartCheck:
        """Check trainer and sampler on the stage's first prompts, and choose their paths. Every rank calls it, before `run`.

        Raises UserError when they do not compute the model's own log-probabilities.
        """
        rollout = self.scene.rollout()
        check = check_policy(self.policy, rollout, first_prompts(rollout.encode, prompts), self.config.sampling.temperature)
        self.scene.rest()
        if self.reference:
            self.reference.scorer.adopt(self.policy.scorer)
        if self.critic:
            self.critic.adopt(self.policy)
        return check

    def _save(self, folder: Path, main: bool) -> None:
        merge = torch.float32 if self.config.lora is not None and self.config.lora.merge else None
        self.policy.save_model(folder, self.tokenizer, main=main, merge=merge)

    def run(self) -> Result:
        """Train, and write the chosen model as the stage's output.

        Raises Interrupted after a checkpoint when a stop was asked for.
        """
        config, folder, main = self.config, self.context.folder, self.context.main
        step, copy = self.restore()
        journal = Journal(folder.journal, keep_through=step, copy=copy) if main else None
        watch = self._watch() if main else None
        clock.lap()
        while not self._over(step) and not self.selection.stop(config.collapse):
            trace = folder.path / f"trace-step-{step + 1:06d}.json" if main and step + 1 == config.compute.profile else None
            with traced(trace):
                collected, metrics = self.step(step)
            with clock.span("checkpoint"):
                self.checkpoints.finish()  # it was written while this step was taken
            step += 1
            last = self._over(step)
            if last or step % config.evaluation.every == 0:
                with clock.span("eval", whole=True):
                    metrics |= self.evaluate(step)
            metrics |= _times(clock.lap(), collected)
            if watch:
                metrics |= watch.see(step, metrics)
            if journal:
                with clock.span("tracking"):
                    write_groups(self._record(step), collected.drawn)
                    journal.append(step, config.steps, metrics)
            stop = distributed.any_rank(self.context.stop.requested)
            unfit = self._unfit(watch)
            if last or stop or unfit or step % config.checkpoints.every == 0:
                with clock.span("checkpoint"):
                    self.checkpoint(step)
            if (stop and not last) or unfit:
                self.checkpoints.finish()
                if unfit:
                    raise UserError(unfit, where="health", mend="mend the rewards, or take the alarm out of `health.stop`")
                raise Interrupted
        self.checkpoints.finish()
        if self.ahead is not None:
            self.ahead.end()
        chosen = self.selection.best_step if config.select == "best" else 0
        self.kept.publish(chosen or None, folder.output("model"))
        learning = self._learning()
        said = [learning.sentence] if learning and learning.sentence else []
        return Result(
            metrics={
                "steps": float(step),
                "best_step": float(self.selection.best_step),
                "best_reward": self.selection.best_reward,
            },
            notes={LEARNING: learning.note()} if learning else {},
            remarks=[*said, *self._remarks(step)],
            tokens=self.tokens,
        )

    def _learning(self) -> Learning | None:
        """What was learned, on the rank that writes. Raises UserError where it is nothing and `no_signal` stops the stage."""
        health, learning = self.config.health, None
        if self.context.main:
            learning = rl_learning(
                (line.metrics for line in read(self.context.folder.journal)),
                unchanged=same_weights(self.context.inputs["policy"], self.context.folder.output("model")),
                functions=list(self.config.rewards.functions),
                format_gain=health.format_gain,
                flat=health.flat,
            )
            if learning.sentence:
                print(f"warning: {learning.sentence}", file=sys.stderr, flush=True)
        refused = learning.sentence if learning and learning.failed and "no_signal" in health.stop else ""
        if refused := distributed.gather(refused)[0]:
            raise UserError(refused, where="health", mend="or take `no_signal` out of `health.stop`")
        return learning

    def _over(self, step: int, sampled: int = 0) -> bool:
        """Whether nothing is left to do after `step` steps, in the last of which `sampled` more tokens were sampled."""
        most = self.config.most_tokens
        return step >= self.config.steps or (most is not None and self.tokens + sampled >= most)

    def step(self, step: int) -> tuple[Collected, dict[str, float]]:
        """One rollout and its updates; `step` counts from 0."""
        config, temperature = self.config, self.config.sampling.temperature
        pretrain = step < (first := config.critic.pretrain)
        # The policy's schedule begins with its own first step.
        lr = config.lr_at(step if pretrain else step - first, config.steps - first)
        collected = self._collect(step)
        check_coverage(self.scene.rewards, [e for group in collected.drawn for e in group.episodes], f"step {step + 1}")
        self.position = collected.position
        prepared = prepare(
            collected.groups,
            config,
            self.policy,
            seed=config.seed,
            step=step,
            temperature=temperature,
            max_tokens=config.sampling.max_tokens,
            reference=self.reference,
            critic=self.critic,
        )
        stats = [
            update(self.policy, batch, config, lr=lr, temperature=temperature, critic=self.critic, pretrain=pretrain)
            for batch in prepared.minibatches
        ]
        if self.reference and config.reference_every and (step + 1) % config.reference_every == 0:
            self.reference.refresh(self.policy)
        self.tokens += collected.tokens
        metrics = {
            **_means(stats),
            **prepared.metrics,
            "train/lr": lr,
            "train/updates": float(sum(s.tokens > 0 for s in stats)),
            "rollout/sampled_tokens": float(self.tokens),
            **self._rollout_metrics(collected),
        }
        if self.ahead is None:  # there the policies differ, and are meant to
            self.mismatched += metrics.get("train/mismatch_kl", 0.0) > config.mismatch_alarm
        return collected, metrics

    def _collect(self, step: int) -> Collected:
        config = self.config
        if self.ahead is None:
            return collect(
                self.scene,
                self.sampler,
                self.position,
                questions=config.questions,
                samples=config.samples,
                step=step,
                max_resamples=config.max_resamples,
            )
        collected = self.ahead.take(step, self.position)
        if not self._over(step + 1, collected.tokens):
            self.ahead.begin(step + 1, collected.position)
        return collected

    def _rollout_metrics(self, collected: Collected) -> dict[str, float]:
        episodes = [episode for group in collected.drawn for episode in group.episodes]
        found = reward_metrics(episodes) | rollout_metrics(collected.drawn)
        if self.config.max_resamples:
            found |= {"rollout/groups": float(len(collected.groups)), "rollout/resamples": float(collected.resamples)}
        return found

    def evaluate(self, step: int) -> dict[str, float]:
        """Sample the held-out problems, always with the same random numbers; keep the model when it is the best so far."""
        if self.ahead is not None:
            self.ahead.complete()  # one engine samples for both
        found = held_out_metrics(self.scene.sample(self.held_out, self.config.evaluation.samples, "held_out", 0))
        if self.selection.see(step, found["eval/reward"], self.config.collapse) and self.config.select == "best":
            self.kept.keep(step)
        return found

    def restore(self) -> tuple[int, Path | None]:
        """Go back to the newest whole checkpoint; returns how many steps are done, and the journal as it was then."""
        continues = self.context.inputs.get("continues")
        stored = self.checkpoints.restore(self.context.world_size, continues)
        if stored is None:
            return 0, None
        self.policy.restore(stored.part("policy"))
        if self.critic and stored.has("critic"):  # another stage's checkpoint may have none
            self.critic.restore(stored.part("critic"))
        if self.reference and stored.has("reference"):
            self.reference.restore(stored.part("reference"))
        state, self.position = stored.state, stored.state["position"]
        continued = stored.path == continues
        if not continued:  # the choice among its own evaluations is another stage's own
            self.selection = Selection.restored(state["selection"])
            self.tokens, self.mismatched = state["tokens"], state["mismatched"]
            self.kept.digest = state["best_digest"]
        step = stored.steps_done(self.config.steps, continued=continued)
        if self.ahead is not None and not continued and state.get("ahead") is not None:
            self.ahead.restore(self._record(step + 1), state["ahead"])
        return step, None if continued else stored.journal

    def _record(self, step: int) -> Path:
        """The answers that step `step`, from 1, was trained on."""
        return self.context.folder.rollouts / f"step-{step:06d}.parquet"

    def checkpoint(self, step: int) -> None:
        """Begin a checkpoint of `step` finished steps; kept models that no checkpoint names any more are removed."""
        ahead = self.ahead.save(self._record(step + 1), main=self.context.main) if self.ahead is not None else None
        named = {self.selection.best_step} | {s["selection"]["best_step"] for s in states(self.context.folder.checkpoints)}
        self.kept.forget_but(named)
        state = {
            "selection": self.selection.state(),
            "tokens": self.tokens,
            "position": self.position,
            "mismatched": self.mismatched,
            "best_digest": self.kept.digest,
            "ahead": ahead,
        }
        parts = {"policy": self.policy.state()}
        if self.critic:
            parts["critic"] = self.critic.state()
        if self.reference and (weights := self.reference.state(main=self.context.main)):
            parts["reference"] = weights
        self.checkpoints.begin(step, state, parts)

    def _watch(self) -> Watch:
        """Over the steps that the journal has: the same ones after a resume."""
        steps = [line.metrics for line in read(self.context.folder.journal)]
        return Watch(self.config.health, steps, lambda: canaries_missed(self.scene.rewards, self.verifiers))

    def _unfit(self, watch: Watch | None) -> str:
        """Why the rewards' health ends the stage, on every rank; nothing while it does not."""
        return distributed.gather(watch.stopping if watch else "")[0] if self.config.health.stop else ""

    def _remarks(self, step: int) -> list[str]:
        found = []
        if self.ahead is not None:
            cap = self.config.importance_cap
            corrected = "not corrected" if cap is None else f"importance weights truncated at {cap:g}"
            found.append(f"off-policy by one step (one_step_off; {corrected})")
        if self.selection.stop(self.config.collapse):
            best = f"step {self.selection.best_step} (reward {self.selection.best_reward:.3f})"
            found.append(f"stopped at step {step}: the policy collapsed; its best was {best}")
        if self.mismatched:
            alarm = f"train/mismatch_kl was above {self.config.mismatch_alarm:g}"
            found.append(f"sampler and trainer disagreed in {self.mismatched} of {step} steps ({alarm})")
        return found + (summary(line.metrics for line in read(self.context.folder.journal)) if self.context.main else [])


def _times(lap: dict[str, float], collected: Collected) -> dict[str, float]:
    """Seconds since the last line of the journal, span by span, and the speed of what was not evaluation."""
    working = lap["step"] - lap.get("eval", 0.0)
    return {**{f"time/{name}": seconds for name, seconds in lap.items()}, "time/tokens_per_second": collected.tokens / working}


def _means(stats: Sequence[UpdateStats]) -> dict[str, float]:
    """The metrics of a step's updates: means over those that have them, and the largest of what is a maximum."""
    every = [s.metrics() for s in stats]
    names = sorted({name for metrics in every for name in metrics})
    found = {name: [m[name] for m in every if name in m] for name in names}
    return {name: max(values) if name.endswith("_max") else fmean(values) for name, values in found.items()}
