"""`gate`: hands a model on if it is better than another, or not worse, beyond the sampling error; else the run is
warned or stopped.

What it compares is in the reports of an `evaluate` stage that names both models, problem by problem. Its output is the model
itself: whoever takes the gate instead of the model waits for the verdict, and has the same input to the last bit, so that a
gate that is put in, changed or taken out makes nothing else be computed again. The verdict is in the manifest (`notes.gate`);
whether it stops the run is the run's affair (`otherwise`), no part of what is computed here.
"""

import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.contract.config import EXECUTION, ModelRef, ReportRef, StageConfig
from stages.contract.errors import UserError
from stages.evals.gates import Judgement, Verdict, in_words, judge
from stages.store.files import files_below, read_json, whole_folder
from stages.store.manifest import GATE
from stages.store.stage import Result, StageContext, StageKind

TOLERANCE = 0.02
"""What a model that is not worse may lose, unless the recipe says otherwise: 2 points."""


class GateConfig(StageConfig):
    """Which model has to be what, compared with which other one: exactly one of `better_than`, `not_worse_than`."""

    kind: Literal["gate"]
    """This kind."""
    model: ModelRef
    """The stage whose model is judged, and handed on."""
    better_than: ModelRef | None = None
    """The stage whose model it has to beat."""
    not_worse_than: ModelRef | None = None
    """The stage behind whose model it must not fall."""
    margin: float | None = Field(default=None, ge=0, lt=1)
    """`better_than`: by more than this; a share, 0.01 is one point. Null: 0."""
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    """`not_worse_than`: by less than this; a share. Null: 0.02. Two models that are the same pass only when it is well above
    the sampling error: about 1.6 times the standard error of their difference at 95 %."""
    metric: Literal["accuracy", "accuracy_lenient", "cons_at_k", "format"] = "accuracy"
    """What is compared, for each problem the mean over its samples."""
    confidence: float = Field(default=0.95, ge=0.5, lt=1)
    """One-sided: the share of models that are not better which such a gate keeps out."""
    evaluation: Annotated[str, EXECUTION] = "evaluation"
    """The `evaluate` stage that names both models."""
    otherwise: Annotated[Literal["stop", "warn"], EXECUTION] = "stop"
    """What the run does when the model does not pass: `stop` before any later stage (exit status 4), or `warn` and go on."""
    undecided: Annotated[Literal["stop", "warn"] | None, EXECUTION] = None
    """The same for a difference within the sampling error; by default as `otherwise`. With `warn`, only a model that is shown
    to be worse stops the run."""
    reports: dict[str, ReportRef] = Field(default_factory=dict)
    """Set from `evaluation`: the reports about the two models."""

    @model_validator(mode="after")
    def _one_other(self) -> Self:
        if (self.better_than is None) == (self.not_worse_than is None):
            raise ValueError("give exactly one of `better_than`, `not_worse_than`")
        if self.other == self.model:
            raise ValueError(f"`{self.model}` cannot be compared with itself")
        if self.margin is not None and self.better_than is None:
            raise ValueError("`margin` belongs to `better_than`; `not_worse_than` has `tolerance`")
        if self.tolerance is not None and self.not_worse_than is None:
            raise ValueError("`tolerance` belongs to `not_worse_than`; `better_than` has `margin`")
        return self

    @property
    def other(self) -> str:
        """The stage whose model it is compared with."""
        return self.better_than or self.not_worse_than or ""

    @property
    def threshold(self) -> float:
        """The difference has to be above this."""
        return (self.margin or 0.0) if self.better_than else -(self.tolerance or TOLERANCE)

    def stops(self, verdict: Verdict) -> bool:
        """Whether the run ends with this verdict."""
        if verdict == "passed":
            return False
        chosen = self.undecided if verdict == "undecided" else None
        return (chosen or self.otherwise) == "stop"


def expand(name: str, config: GateConfig) -> dict[str, StageConfig]:
    """The same stage with the reports it needs, which `evaluate` makes under these names."""
    reports = {role: f"{config.evaluation}.{stage}" for role, stage in (("model", config.model), ("against", config.other))}
    return {name: config.model_copy(update={"reports": reports})}


def run(context: StageContext[GateConfig]) -> Result:
    """Judge, and hand the model on whatever the verdict is."""
    config = context.config
    rows = {role: _means(context.inputs[f"reports.{role}"], config.metric) for role in ("model", "against")}
    try:
        found = judge(rows["model"], rows["against"], config.threshold, config.confidence)
    except ValueError as error:
        raise UserError(str(error), where="reports", mend="name one evaluation that has both models") from error
    note = _note(config, found)
    with whole_folder(context.folder.output("model")) as folder:
        hand_on(context.inputs["model"], folder)
    metrics = {key: note[key] for key in ("difference", "stderr", "low", "high") if note[key] is not None}
    metrics |= {config.metric: found.model, f"{config.metric}_against": found.against}
    return Result(metrics=metrics, notes={GATE: note}, remarks=[f"{found.verdict}: {note['says']}"])


def _note(config: GateConfig, found: Judgement) -> dict[str, Any]:
    better = config.better_than is not None
    bound = {"margin": config.threshold if better else None, "tolerance": None if better else -config.threshold}
    return {
        "verdict": found.verdict,
        "test": "better" if better else "not worse",
        "metric": config.metric,
        "model": config.model,
        "against": config.other,
        "difference": found.difference,
        "stderr": found.stderr,
        "low": found.low,
        "high": found.high,
        **bound,
        "confidence": config.confidence,
        "problems": found.problems,
        "says": in_words(found, config.metric, config.confidence, **bound),
    }


def _means(report: Path, metric: str) -> dict[str, float]:
    path = report / "problems.json"
    try:
        return {str(problem): float(row[metric]) for problem, row in read_json(path).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"not a readable report about each problem's {metric}"
        raise UserError(what, where=str(path), mend="run its stage with --fresh") from error


def hand_on(source: Path, folder: Path) -> None:
    """The same files under another name: links, so that weights take no place twice; copies where there can be none."""
    for file in files_below(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:  # another file system, one without links, or another owner's file
            shutil.copy2(file, target)


KIND = StageKind(name="gate", version=1, config=GateConfig, output="model", run=run, expand=expand)
