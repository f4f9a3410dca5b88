"""The sampled answers of a `curate` stage: one file per chunk of problems, sampled once and read as often as needed.

Only one chunk is in memory at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stages.curation.filters import first_failure
from stages.curation.settings import CurateConfig
from stages.problems.episode import Group, Problem
from stages.problems.templates import Template
from stages.rewards.coverage import check_coverage
from stages.rewards.score import score
from stages.rollout.protocol import Rollout
from stages.store.files import read_json, write_json
from stages.store.stage import StageContext, warn
from stages.tracking.journal import Journal, read

CHECKED = "self-check.json"
"""File in the stage's folder with the outcome of the engine's check: a later attempt may find every chunk sampled."""


class Sampled:
    """The chunks of a stage, and its journal."""

    def __init__(self, context: StageContext[CurateConfig], problems: list[Problem], template: Template, passes: int) -> None:
        """`template`: what is sampled with; `passes`: journal lines for each chunk, of which sampling writes the first."""
        self._context, self._template = context, template
        size = context.config.chunk
        self.chunks = [problems[start : start + size] for start in range(0, len(problems), size)]
        self._lines = passes * len(self.chunks)
        finished = 0
        while finished < len(self.chunks) and self._read(finished) is not None:
            finished += 1
        # The last of them may lack its line: the answers are written first.
        told = max((line.step for line in read(context.folder.journal)), default=0)
        self._told = min(told, self._lines if finished == len(self.chunks) else finished)
        self._journal = Journal(context.folder.journal, keep_through=self._told)

    def sample(self) -> None:
        """Have every chunk on disk, sampled and scored."""
        with ExitStack() as stack:
            rollout: Rollout | None = None
            for number in range(min(self._told, len(self.chunks)), len(self.chunks)):
                groups = self._read(number)
                if groups is None:
                    self._context.stop.check()
                    rollout = rollout or stack.enter_context(opened(self._context, self._prompts()))
                    groups = self._sample(rollout, number)
                self.tell(number + 1, _metrics(groups, self._context.config))

    def _prompts(self) -> list[str]:
        return [self._template.render(problem.question) for chunk in self.chunks for problem in chunk]

    def check(self) -> tuple[dict[str, float], list[str]]:
        """Metrics and warnings of the engine's check; none where the chunks are of a version that had no such check."""
        path = self._context.folder.path / CHECKED
        if not path.is_file():
            return {}, []
        document = read_json(path)
        return document["metrics"], [document["warning"]] if document["warning"] else []

    def tell(self, line: int, metrics: dict[str, float]) -> None:
        """Write the journal's line of this number, unless it has it."""
        if line > self._told:
            self._journal.append(line, self._lines, metrics)

    def __iter__(self) -> Iterator[list[Group]]:
        """The groups of each chunk."""
        return map(self.groups, range(len(self.chunks)))

    def groups(self, number: int) -> list[Group]:
        """The groups of one chunk, which was sampled."""
        found = self._read(number)
        assert found is not None, "the chunk was sampled"
        return found

    def _sample(self, rollout: Rollout, number: int) -> list[Group]:
        from stages.rollout.groups import sample_groups
        from stages.rollout.records import write_groups

        config, problems = self._context.config, self.chunks[number]
        # The step is always 0: an answer depends on its problem and number, not on how the problems were cut into chunks.
        groups = sample_groups(
            rollout, problems, self._template, config.sampling, config.samples, seed=config.seed, purpose="curate", step=0
        )
        episodes = [episode for group in groups for episode in group.episodes]
        rewards = config.rewards.located(self._context.inputs)
        score(rewards, episodes, max_tokens=config.sampling.max_tokens, key=f"{config.seed}-curate")
        if number == 0:  # later ones may be a single answer
            check_coverage(rewards, episodes, "the first chunk")
        write_groups(self._path(number), groups)
        return groups

    def _path(self, number: int) -> Path:
        return self._context.folder.rollouts / f"chunk-{number:05d}.parquet"

    def _read(self, number: int) -> list[Group] | None:
        """A finished chunk, or None; one that was cut otherwise (`chunk` was changed in between) is not taken."""
        from stages.rollout.records import read_groups

        path = self._path(number)
        if not path.exists():
            return None
        groups = read_groups(path)
        return groups if [group.problem for group in groups] == self.chunks[number] else None


@contextmanager
def opened(context: StageContext[CurateConfig], prompts: Sequence[str]) -> Iterator[Rollout]:
    """The engine that samples, checked on some of the stage's prompts; the outcome is kept in `CHECKED`."""
    from stages.rollout.engines import open_rollout
    from stages.rollout.sampled_check import check_rollout

    config, folder = context.config, context.inputs["sampler"]
    with open_rollout(config.rollout, folder, config.compute.device, context.folder.path / "vllm.log") as rollout:
        check = check_rollout(rollout, prompts, config.sampling, folder, config.compute.device)
        warn([check.warning] if check.warning else [])
        write_json(context.folder.path / CHECKED, {"metrics": check.metrics, "warning": check.warning})
        yield rollout


def _metrics(groups: list[Group], config: CurateConfig) -> dict[str, float]:
    episodes = [episode for group in groups for episode in group.episodes]
    good = [any(first_failure(e, config.filters, config.rewards) is None for e in group.episodes) for group in groups]
    return {
        "curate/correct_share": sum(e.scored.verdict == "right" for e in episodes) / len(episodes),
        "curate/kept": float(sum(good)),
        "curate/kept_share": sum(good) / len(groups),
        "curate/truncated_share": sum(e.truncated for e in episodes) / len(episodes),
        "rollout/mean_length": sum(len(e.completion_ids) for e in episodes) / len(episodes),
    }
