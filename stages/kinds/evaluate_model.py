"""`evaluate_model`: sample k answers to each held-out problem from one model, judge them, report.

Its report: `metrics.json` (the headline numbers) and `problems.json` (the means of each problem, for paired differences).
"""

import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Literal

from stages.contract.config import ModelRef
from stages.evals.settings import EvaluationConfig
from stages.evals.statistics import mean
from stages.problems.episode import Group
from stages.problems.sources import load_problem_set, verifiers_asked
from stages.rewards.answers.verifiers import used
from stages.rewards.coverage import check_coverage
from stages.rewards.score import score
from stages.store.files import whole_folder, write_json
from stages.store.stage import Result, StageContext, StageKind, warn
from stages.tracking.journal import Journal, read


class EvaluateModelConfig(EvaluationConfig):
    """One model under the protocol."""

    kind: Literal["evaluate_model"]
    """This kind."""
    model: ModelRef
    """The stage whose model is evaluated."""


class ChunkJournal:
    """A journal line per finished chunk, with the numbers over all answers so far."""

    def __init__(self, path: Path, groups: Mapping[str, Group], own: Container[str]) -> None:
        """`groups`: every group answered so far, by problem; `own`: ids of the held-out problems among them."""
        self._path, self._groups, self._own = path, groups, own
        self._journal: Journal | None = None
        self._kept, self._tokens, self._time = 0, 0, time.monotonic()

    def chunk_done(self, done: int, total: int) -> None:
        """Write the line of chunk `done` of `total`, unless an earlier attempt has."""
        if self._journal is None:
            lines = read(self._path)
            # Lines about chunks of another size say nothing about these.
            self._kept = lines[-1].step if lines and lines[-1].of == total else 0
            self._journal = Journal(self._path, keep_through=self._kept)
        fresh, seconds = self.tokens - self._tokens, time.monotonic() - self._time
        self._tokens, self._time = self.tokens, time.monotonic()
        if done > self._kept:
            episodes = [e for name, group in self._groups.items() if name in self._own for e in group.episodes]
            metrics = {
                "eval/accuracy": mean([float(e.scored.verdict == "right") for e in episodes]),
                "eval/format": mean([e.scored.parts["format"] for e in episodes]),
                "eval/length": mean([float(len(e.completion_ids)) for e in episodes]),
                "eval/truncated": mean([float(e.truncated) for e in episodes]),
                "time/tokens_per_second": fresh / max(seconds, 1e-9),
            }
            self._journal.append(done, total, metrics)

    @property
    def tokens(self) -> int:
        """Tokens sampled so far."""
        return sum(len(e.completion_ids) for group in self._groups.values() for e in group.episodes)


def run(context: StageContext[EvaluateModelConfig]) -> Result:
    """Evaluate the model; finished chunks of an earlier attempt are taken over."""
    from stages.evals.lm import Hooks, RolloutLM
    from stages.evals.task import run_lm_eval
    from stages.rollout.engines import open_rollout
    from stages.rollout.sampled_check import check_rollout

    config, folder = context.config, context.folder
    source = load_problem_set(config.held_out, "held_out")
    problems = {problem.id: problem for problem in source.problems}
    verifiers = used(verifiers_asked(config.held_out), config.rewards.verifier)
    judged, rewards = config.rewards.remarks(verifiers), config.rewards.located(context.inputs)

    def scored(groups: Sequence[Group]) -> None:
        episodes = [episode for group in groups for episode in group.episodes]
        score(rewards, episodes, max_tokens=config.sampling.max_tokens, key=f"{config.seed}-evaluate")
        if not folder.journal.exists():  # the first chunk: later ones may be a single answer
            check_coverage(rewards, episodes, "the first chunk")

    hooks = Hooks(score=scored, check_stop=context.stop.check)
    with open_rollout(config.rollout, context.inputs["model"], config.compute.device, folder.path / "vllm.log") as rollout:
        prompts = [config.template.render(problem.question) for problem in source.problems]
        check = check_rollout(rollout, prompts, config.sampling, context.inputs["model"], config.compute.device)
        warnings = [check.warning] if check.warning else []
        warn(warnings)
        lm = RolloutLM(
            rollout,
            folder.rollouts,
            seed=config.seed,
            problems=problems,
            chunk=config.chunk,
            opened=config.template.opened,
            hooks=hooks,
        )
        progress = ChunkJournal(folder.journal, lm.groups, problems)
        hooks.chunk_done = progress.chunk_done
        evaluation = run_lm_eval(config, lm)
    with whole_folder(folder.output("report")) as report:
        write_json(report / "metrics.json", evaluation.metrics)
        write_json(report / "problems.json", evaluation.problems)
    remarks = [*judged, *source.remarks("held_out"), *warnings]
    return Result(metrics=evaluation.metrics | check.metrics, remarks=remarks, tokens=progress.tokens)


KIND = StageKind(name="evaluate_model", version=3, config=EvaluateModelConfig, output="report", run=run)
