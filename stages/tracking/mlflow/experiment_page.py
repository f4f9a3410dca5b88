"""How MLflow's pages of an experiment look as they open: what the names mean, which number counts, and a view of all runs.

What the view holds is the state of MLflow's runs page (tried with 3.17) under a tag of its own, as its "Share" button once
wrote it; a page that does not know it opens without it.
"""

import json
from collections.abc import Sequence
from typing import Any

from stages.tracking.mlflow.client import metric_name

VIEW = "r1"
"""Key of the view in links."""
RUNS = "tags.identity != ''"
"""The runs of pipelines, without the runs of their stages."""
MOST_PARAMS, MOST_MODELS, MOST_RUNS = 8, 5, 100
"""Axes of the plot, and runs that are looked at to find the params that differ."""

_DESCRIPTION = """\
One run here is one `r1 run`; the runs nested in it are its stages.
**[All runs, their differing params and results as parallel coordinates](#/experiments/{experiment}/runs?{query})**

| metrics | what they are |
|---|---|
| `accuracy` | of a pipeline: that of the last model that it evaluates |
| `eval/MODEL/…` | of a pipeline: results of its evaluation on held-out problems (`r1 report` has the errors of differences) |
| `eval/…` | of a training stage: held-out problems every few steps |
| `reward/…` | what sampled answers earned: the total and its parts, mean over answers |
| `rollout/…` | the sampled answers: length, truncation, groups without signal |
| `train/…`, `value/…` | the update: loss, KL, entropy, clipping, gradient; PPO's value model |
| `curate/…` | data made from a model's answers |
| `health/…` | alarms of the rewards |
| `time/…` | seconds of each part of a step; wall and device seconds of a stage |
| `result/…` | what a finished stage says of itself |
"""


def describe(client: Any, experiment_id: str) -> None:
    """Say once what is in the experiment. What somebody wrote there stays."""
    if "mlflow.note.content" in client.get_experiment(experiment_id).tags:
        return
    query = f"viewStateShareKey={VIEW}&compareRunsMode=CHART"
    client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
    client.set_experiment_tag(experiment_id, "mlflow.note.content", _DESCRIPTION.format(experiment=experiment_id, query=query))


def arrange(client: Any, experiment_id: str, models: Sequence[str]) -> None:
    """Have the last of a pipeline's models count, and the view show what differs between the pipelines run so far."""
    if not models:
        return
    shown = [*models[:1], *models[1:][-(MOST_MODELS - 1) :]]
    metrics = [metric_name(f"eval/{model}/accuracy") for model in shown] + [metric_name(f"eval/{shown[-1]}/mean_length")]
    runs = [run.data.params for run in client.search_runs([experiment_id], RUNS, max_results=MOST_RUNS)]
    names = sorted(set().union(*runs))
    differing = [name for name in names if len({params.get(name) for params in runs}) > 1]
    view = _view((differing or names)[:MOST_PARAMS], metrics)
    client.set_experiment_tag(experiment_id, "mlflow.experiment.primaryMetric.name", "accuracy")
    client.set_experiment_tag(experiment_id, "mlflow.experiment.primaryMetric.greaterIsBetter", "True")
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))


def _view(params: list[str], metrics: list[str]) -> dict[str, Any]:
    section = {"uuid": "r1-section", "name": "Params and results", "display": True, "isReordered": True, "deleted": False}
    plot = {
        "uuid": "r1-parallel",
        "type": "PARALLEL",
        "metricSectionId": section["uuid"],
        "runsCountToCompare": MOST_RUNS,
        "deleted": False,
        "isGenerated": False,
        "selectedParams": params,
        "selectedMetrics": metrics,
        "showAllRuns": True,
    }
    columns = ["attributes.`Created`", "attributes.`Duration`"]
    columns += [f"metrics.`{name}`" for name in metrics] + [f"params.`{name}`" for name in params]
    return {
        "searchFilter": RUNS,
        "selectedColumns": columns,
        "compareRunCharts": [plot],
        "compareRunSections": [section],
        "isAccordionReordered": True,
    }
