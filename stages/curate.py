"""Cold-start data: sample a model, keep what is correct and readable, one answer per problem (DeepSeek-R1, section 2.3.1).

The paper samples R1-Zero at temperature 1, keeps answers that are correct and readable (repetition and language-mix filters)
and has them rewritten into a first-person style; the rewriting is left out here, so the data stay the model's own words.
Rejection sampling from a later model (section 2.3.3) is the same stage with another `sampler`.
"""

from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.problems.episode import Episode, Group, Problem
from stages.problems.sources import ProblemSource, load_problem_set
from stages.problems.templates import Template
from stages.rewards.filters import FILTERS, Filters, first_failure
from stages.rewards.score import Rewards, score
from stages.rollout.protocol import Rollout, Sampling
from stages.rollout.settings import RolloutSettings
from stages.store.config import EXECUTION, ModelRef, StageConfig
from stages.store.errors import UserError
from stages.store.files import whole_folder, write_json
from stages.store.stage import Result, StageContext, StageKind
from stages.tracking.journal import Journal, read


class CurateConfig(StageConfig):
    """Which model answers which problems, and what is kept."""

    kind: Literal["curate"]
    """This kind."""
    sampler: ModelRef
    """The stage whose model is sampled: R1-Zero for cold-start data."""
    problems: ProblemSource
    """Where the problems come from."""
    count: int | None = Field(default=None, ge=1)
    """How many problems of the source, from its start; all by default."""
    samples: int = Field(default=4, ge=1)
    """Answers sampled per problem."""
    template: Template = Template()
    """How a question becomes a prompt; the dataset's prompts have this form."""
    sampling: Sampling = Sampling()
    """How answers are sampled (the paper: temperature 1)."""
    rewards: Rewards = Rewards()
    """How answers are judged: verifier, format, target language. The weights do not matter here."""
    filters: Filters = Filters()
    """What makes an answer readable."""
    rollout: RolloutSettings = RolloutSettings()
    """Which engine samples."""
    choose: Literal["shortest", "first"] = "shortest"
    """Which of a problem's good answers is kept: the one of fewest tokens, or the first sampled."""
    chunk: Annotated[int, EXECUTION] = Field(default=32, ge=1)
    """Problems sampled at once; a stopped stage goes on after its last finished chunk."""


def run(context: StageContext[CurateConfig]) -> Result:
    """Sample chunk by chunk, then choose and write the dataset.

    Raises UserError when no answer passes the filters.
    """
    config = context.config
    source = load_problem_set(config.problems, "problems")
    groups = _sampled(context, source.problems[: config.count])
    failed: Counter[str] = Counter()
    kept = []
    for group in groups:
        failures = [first_failure(e, config.filters, config.rewards) for e in group.episodes]
        failed.update(name for name in failures if name is not None)
        if good := [e for e, name in zip(group.episodes, failures, strict=True) if name is None]:
            kept.append(min(good, key=lambda e: (_cost(e, config), e.sample)))
    total = sum(len(group.episodes) for group in groups)
    counts = {name: failed[name] for name in FILTERS}
    if not kept:
        shown = ", ".join(f"{number} × {name}" for name, number in counts.items() if number)
        what = f"no answer of {total} passes the filters (failed: {shown})"
        raise UserError(what, where="filters", mend="train the sampler longer, take more problems, or loosen the filters")
    tokens = sum(len(e.completion_ids) for group in groups for e in group.episodes)
    metrics = {
        "problems": float(len(groups)),
        "sampled": float(total),
        "kept": float(len(kept)),
        "kept_share": len(kept) / len(groups),
        "correct_share": sum(e.scored.verdict == "right" for g in groups for e in g.episodes) / total,
        "passed_share": 1 - sum(failed.values()) / total,
        "mean_kept_tokens": sum(len(e.completion_ids) for e in kept) / len(kept),
    }
    report = {**metrics, "failed_first": counts, "problems_refused": source.refused}
    with whole_folder(context.folder.output("dataset")) as folder:
        _write(folder / "train.parquet", kept, config, context.input_digests["sampler"])
        write_json(folder / "report.json", report)
    return Result(metrics=metrics, notes={"failed_first": counts}, remarks=source.remarks("problems"), tokens=tokens)


def _sampled(context: StageContext[CurateConfig], problems: list[Problem]) -> list[Group]:
    """Every problem's scored answers; chunks that are already on disk are read instead of sampled."""
    config = context.config
    chunks = [problems[start : start + config.chunk] for start in range(0, len(problems), config.chunk)]
    finished = 0
    while finished < len(chunks) and _read_chunk(context, finished, chunks[finished]) is not None:
        finished += 1
    # The last of them may lack its line: the answers are written first.
    told = min(finished, max((line.step for line in read(context.folder.journal)), default=0))
    journal = Journal(context.folder.journal, keep_through=told)
    rollout: Rollout | None = None
    groups: list[Group] = []
    with ExitStack() as stack:
        for number, chunk in enumerate(chunks):
            found = _read_chunk(context, number, chunk)
            if found is None:
                context.stop.check()
                rollout = rollout or stack.enter_context(_opened(context))
                found = _sample_chunk(context, rollout, number, chunk)
            groups.extend(found)
            if number + 1 > told:
                journal.append(number + 1, len(chunks), _chunk_metrics(found, config))
    return groups


def _opened(context: StageContext[CurateConfig]) -> AbstractContextManager[Rollout]:
    from stages.rollout.engines import open_rollout

    config = context.config
    return open_rollout(config.rollout, context.inputs["sampler"], config.compute.device, context.folder.path / "vllm.log")


def _sample_chunk(context: StageContext[CurateConfig], rollout: Rollout, number: int, problems: list[Problem]) -> list[Group]:
    from stages.rollout.groups import sample_groups
    from stages.rollout.records import write_groups

    config = context.config
    # The step is always 0: an answer depends on its problem and number, not on how the problems were cut into chunks.
    groups = sample_groups(
        rollout, problems, config.template, config.sampling, config.samples, seed=config.seed, purpose="curate", step=0
    )
    episodes = [episode for group in groups for episode in group.episodes]
    rewards = config.rewards.located(context.inputs)
    score(rewards, episodes, max_tokens=config.sampling.max_tokens, key=f"{config.seed}-curate")
    write_groups(_chunk_path(context, number), groups)
    return groups


def _chunk_path(context: StageContext[CurateConfig], number: int) -> Path:
    return context.folder.rollouts / f"chunk-{number:05d}.parquet"


def _read_chunk(context: StageContext[CurateConfig], number: int, problems: list[Problem]) -> list[Group] | None:
    """A finished chunk, or None; one that was cut otherwise (`chunk` was changed in between) is not taken."""
    from stages.rollout.records import read_groups

    path = _chunk_path(context, number)
    if not path.exists():
        return None
    groups = read_groups(path)
    return groups if [group.problem for group in groups] == problems else None


def _chunk_metrics(groups: list[Group], config: CurateConfig) -> dict[str, float]:
    episodes = [episode for group in groups for episode in group.episodes]
    good = [any(first_failure(e, config.filters, config.rewards) is None for e in group.episodes) for group in groups]
    return {
        "curate/correct_share": sum(e.scored.verdict == "right" for e in episodes) / len(episodes),
        "curate/kept": float(sum(good)),
        "curate/kept_share": sum(good) / len(groups),
        "curate/truncated_share": sum(e.truncated for e in episodes) / len(episodes),
        "rollout/mean_length": sum(len(e.completion_ids) for e in episodes) / len(episodes),
    }


def _cost(episode: Episode, config: CurateConfig) -> int:
    return len(episode.completion_ids) if config.choose == "shortest" else episode.sample


def _write(path: Path, episodes: list[Episode], config: CurateConfig, sampler_digest: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = [
        {
            # prompt + completion is exactly what the model saw and wrote: the part the template opened is in the prompt.
            "prompt": episode.prompt,
            "completion": episode.text.removeprefix(config.template.opened),
            "problem_id": episode.problem.id,
            "question": episode.problem.question,
            "answer": episode.problem.answer,
            "source": episode.problem.source,
            "sample": episode.sample,
            "sampler_digest": sampler_digest,
            "accuracy": episode.scored.parts["accuracy"],
            "format": episode.scored.parts["format"],
            "language": episode.scored.parts.get("language"),
            "filters": list(FILTERS),
        }
        for episode in episodes
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


KIND = StageKind(name="curate", version=1, config=CurateConfig, output="dataset", run=run)
