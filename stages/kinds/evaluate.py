"""`evaluate`: the same protocol over several models. It becomes one `evaluate_model` per model and a `summary`.

The paper's protocol (section 4.1): temperature 0.6, top-p 0.95; pass@1 is the mean over k samples, cons@k the majority vote.
"""

from typing import Literal

from pydantic import Field, field_validator

from stages.contract.config import ModelRef, StageConfig
from stages.evals.settings import EvaluationConfig
from stages.kinds.evaluate_model import EvaluateModelConfig
from stages.kinds.summary import SummaryConfig
from stages.store.stage import Result, StageContext, StageKind


class EvaluateConfig(EvaluationConfig):
    """One protocol, several models."""

    kind: Literal["evaluate"]
    """This kind."""
    models: list[ModelRef] = Field(min_length=1)
    """Stages whose models are evaluated, in the order in which the summary shows them."""

    @field_validator("models")
    @classmethod
    def _each_once(cls, models: list[str]) -> list[str]:
        twice = [model for index, model in enumerate(models) if model in models[:index]]
        if twice:
            raise ValueError(f"`{twice[0]}` is named twice")
        return models


def expand(name: str, config: EvaluateConfig) -> dict[str, StageConfig]:
    """One stage per model, `<name>.<model>`, then the summary, which keeps the name."""
    shared = {field: getattr(config, field) for field in EvaluationConfig.model_fields if field != "kind"}
    stages: dict[str, StageConfig] = {
        f"{name}.{model}": EvaluateModelConfig(kind="evaluate_model", model=model, **shared) for model in config.models
    }
    reports = {model: f"{name}.{model}" for model in config.models}
    return {**stages, name: SummaryConfig(kind="summary", reports=reports)}


def run(context: StageContext[EvaluateConfig]) -> Result:
    """Never called: the recipe is expanded first."""
    raise AssertionError(f"{context.folder.path} should have been expanded")


KIND = StageKind(name="evaluate", version=1, config=EvaluateConfig, output="report", run=run, expand=expand)
