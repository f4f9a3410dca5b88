"""The models of a run's evaluations, from the answers that were recorded: pass@k, lengths, and answers to the same problems."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.evals.statistics import mean, paired_difference, pass_at_k, standard_error
from stages.report.facts import Run, Stage
from stages.store.files import read_json

COUNTED = ["problem_id", "sample", "verdict", "completion_ids"]
TEXTS = ["problem_id", "sample", "verdict", "question", "answer", "text", "finish", "completion_ids"]


@dataclass
class Model:
    """A model under an evaluation."""

    label: str
    stage: Stage
    right: dict[str, list[bool]] = field(default_factory=dict)
    """Problem -> whether each of its answers is right."""
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"right": [], "wrong": []})
    """Tokens of right and of all other answers."""

    @property
    def samples(self) -> int:
        """Answers that every problem has."""
        return min((len(found) for found in self.right.values()), default=0)

    def chances(self, k: int) -> dict[str, float]:
        """Problem -> unbiased pass@k."""
        return {problem: pass_at_k(len(found), sum(found), k) for problem, found in self.right.items()}


@dataclass(frozen=True)
class Chance:
    """pass@k of one model, and what it has above the first one."""

    k: int
    value: float
    stderr: float | None
    gain: float | None
    """Mean difference to the first model over the same problems; None for the first model itself."""
    gain_stderr: float | None


def evaluations(run: Run) -> dict[str, list[Model]]:
    """Summary -> its models in the order of the recipe, as far as their answers can be read."""
    stages = {stage.name: stage for stage in run.stages if stage.kind == "evaluate_model" and stage.manifest}
    found: dict[str, list[Model]] = {}
    for name in (stage.name for stage in run.stages if stage.kind == "summary"):
        for label, stage in reports(run.content, name).items():
            if stage in stages and (model := read_model(label, stages[stage], run.faults)).right:
                found.setdefault(name, []).append(model)
    return found


def reports(record: dict[str, Any], summary: str) -> dict[str, str]:
    """Label -> stage with the report, of the models that a summary shows."""
    section = record["document"].get("stages", {}).get(summary, {})
    named: dict[str, str] = section.get("reports") or {model: f"{summary}.{model}" for model in section.get("models", [])}
    return named


def read_model(label: str, stage: Stage, faults: list[str]) -> Model:
    """Count the answers of an `evaluate_model` stage: those to its own problems, each once."""
    model, known = Model(label, stage), _problems(stage, faults)
    seen: set[tuple[str, int]] = set()
    for file in answer_files(stage):
        for row in read_columns(file, COUNTED, faults):
            key = (row["problem_id"], row["sample"])
            # Files of an earlier attempt may have been cut otherwise; further tasks of lm-eval have files here too.
            if row["problem_id"] in known and row["verdict"] is not None and key not in seen:
                seen.add(key)
                right = row["verdict"] == "right"
                model.right.setdefault(row["problem_id"], []).append(right)
                model.lengths["right" if right else "wrong"].append(row["tokens"])
    return model


def chances(models: Sequence[Model]) -> dict[str, list[Chance]]:
    """Label -> pass@k for k = 1, 2, 4 … up to the answers that every problem has, with standard errors over problems."""
    found: dict[str, list[Chance]] = {model.label: [] for model in models}
    for model in models:
        for k in (2**i for i in range(model.samples.bit_length())):
            values = model.chances(k)
            gain, gain_stderr = None, None
            if model is not models[0] and k <= models[0].samples and values.keys() & models[0].right.keys():
                gain, gain_stderr = paired_difference(values, models[0].chances(k))
            each = list(values.values())
            found[model.label].append(Chance(k, mean(each), standard_error(each), gain, gain_stderr))
    return found


def answer_files(stage: Stage) -> list[Path]:
    """The files of sampled answers, in their order."""
    return sorted(stage.folder.rollouts.glob("*.parquet"))


def read_columns(
    path: Path, columns: list[str], faults: list[str], problems: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a file of answers, of some problems or of all, with `tokens`, the length, in place of the tokens themselves."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    only = None if problems is None else [("problem_id", "in", list(problems))]
    try:
        table = pq.read_table(path, columns=columns, filters=only)
        lengths = pc.list_value_length(table["completion_ids"])
        rows: list[dict[str, Any]] = table.drop_columns("completion_ids").append_column("tokens", lengths).to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        faults.append(f"{path}: the answers cannot be read ({error})")
        return
    yield from rows


def _problems(stage: Stage, faults: list[str]) -> set[str]:
    path = stage.folder.output("report") / "problems.json"
    try:
        return set(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        faults.append(f"{path}: {error}")
        return set()
