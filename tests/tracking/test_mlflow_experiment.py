"""How MLflow's pages of an experiment open: its description, the number that counts, the view of all runs."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from stages.tracking.mlflow.pipeline_run import PipelineTracking, default_uri


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> str:
    return default_uri(Path(shutil.copy(mlflow_database, tmp_path_factory.mktemp("runs"))).parent)


def finished(uri: str, number: int, models: int, lr: float, name: str = "look") -> PipelineTracking:
    document = {"name": "t", "stages": {"zero": {"kind": "rl", "lr": lr, "steps": 8}}}
    run = PipelineTracking(uri, name, f"t-{number}", None, document=document, tags={}, identity=f"t-{number}")
    row = dict.fromkeys(("accuracy", "accuracy_stderr", "mean_length", "format", "language", "truncated", "cons_at_k"), 0.5)
    run.finish("FINISHED", {f"m{model}": row for model in range(models)})
    return run


def test_the_view_shows_what_differs_and_the_results(uri: str) -> None:
    client = MlflowClient(uri)
    runs = [finished(uri, number, 2, lr) for number, lr in enumerate((1e-4, 2e-4))]
    tags = client.get_experiment(runs[0].experiment_id).tags
    assert "eval/MODEL/" in tags["mlflow.note.content"]
    assert f"#/experiments/{runs[0].experiment_id}/runs?viewStateShareKey=r1" in tags["mlflow.note.content"]
    assert tags["mlflow.experiment.primaryMetric.name"] == "accuracy"
    view = json.loads(tags["mlflow.sharedViewState.r1"])
    (plot,) = view["compareRunCharts"]
    assert plot["selectedParams"] == ["zero.lr"]
    assert plot["selectedMetrics"] == ["eval/m0/accuracy", "eval/m1/accuracy", "eval/m1/mean_length"]
    assert plot["metricSectionId"] == view["compareRunSections"][0]["uuid"]
    # What it asks MLflow for are the pipelines, without the runs of their stages.
    found = client.search_runs([runs[0].experiment_id], view["searchFilter"])
    assert {run.info.run_id for run in found} == {run.parent_run_id for run in runs}


def test_a_description_of_the_user_s_stays(uri: str) -> None:
    client = MlflowClient(uri)
    run = finished(uri, 3, 1, 1e-4)
    client.set_experiment_tag(run.experiment_id, "mlflow.note.content", "mine")
    finished(uri, 4, 1, 1e-4)
    assert client.get_experiment(run.experiment_id).tags["mlflow.note.content"] == "mine"


def test_many_models_have_few_numbers_each(uri: str) -> None:
    client = MlflowClient(uri)
    metrics = {n: client.get_run(finished(uri, n, n, 1e-4, "many").parent_run_id).data.metrics for n in (5, 9, 50)}
    assert len(metrics[5]) == 36
    assert len(metrics[9]) == 37 and "eval/m8/mean_length" in metrics[9] and "eval/m8/cons_at_k" not in metrics[9]
    assert {next(iter(found)) for found in metrics.values()} == {"accuracy"}  # with this one MLflow's compare page opens
    assert set(metrics[50]) == {"accuracy", *(f"eval/m{n}/accuracy" for n in range(50))}
    assert Path(uri.removeprefix("sqlite:///")).is_file()
