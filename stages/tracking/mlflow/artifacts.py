"""What a finished stage leaves in MLflow beside its curves: sampled answers, data that went in, the model, the report."""

import datetime as dt
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
)
from mlflow.models.utils import get_external_mlflow_model_spec
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

from stages.store.folders import StageFolder
from stages.store.manifest import InputRecord, Manifest
from stages.tracking.mlflow.client import metric_name

ANSWERS = "answers.json"
ANSWER_COLUMNS = ["question", "answer", "sample", "text", "reward", "verdict"]
GROUPS_SHOWN = 3
"""Groups shown of the first, the middle and the last file of rollouts."""
DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
ARTIFACT_BYTES = 1 << 20
"""Larger files of a report stay in the stage's folder only."""


def log_records(client: Any, experiment_id: str, run_id: str, name: str, folder: StageFolder, done: Manifest) -> Any | None:
    """Log everything about a finished stage. Safe to call twice: nothing is doubled.

    Returns MLflow's logged model of what the stage hands on, if that is a model.
    """
    model: Any | None = None
    finished = int(dt.datetime.fromisoformat(done.finished).timestamp() * 1000)
    results = {f"result/{metric_name(key)}": value for key, value in done.metrics.items()}
    results |= {"time/wall_seconds": done.wall_seconds, "time/device_seconds": done.device_seconds}
    if done.peak_memory is not None:
        results["memory/peak_bytes"] = done.peak_memory
    if done.peak_gpu_memory is not None:
        results["memory/peak_gpu_bytes"] = done.peak_gpu_memory
    client.log_batch(run_id, metrics=[Metric(key, float(value), finished, 0) for key, value in results.items()])
    datasets = [_dataset(role, item, "training") for role, item in done.inputs.items() if _is_data(item)]
    if done.output == "dataset":
        made = InputRecord(digest=done.digest, path=str(folder.output("dataset")), stage=folder.path.name)
        datasets.append(_dataset(name, made, "produced"))
    found = (_find_model(client, experiment_id, item.digest) for item in done.inputs.values())
    used = [LoggedModelInput(known.model_id) for known in found if known is not None]
    if datasets or used:
        client.log_inputs(run_id, datasets=datasets, models=used)
    if done.output == "model":
        model = _model(client, experiment_id, run_id, name, folder, done)
        linked = client.get_run(run_id).outputs.model_outputs
        if all(known.model_id != model.model_id for known in linked):  # MLflow refuses a second link
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    if done.output == "report":
        for file in sorted(folder.output("report").iterdir()):
            if file.suffix in (".json", ".md", ".html", ".png") and file.stat().st_size <= ARTIFACT_BYTES:
                client.log_artifact(run_id, str(file), "report")
    if any(folder.rollouts.glob("*.parquet")) and all(f.path != ANSWERS for f in client.list_artifacts(run_id)):
        # `log_table` appends to a table that is there already.
        client.log_table(run_id, sampled_answers(folder), ANSWERS)
    return model


def sampled_answers(folder: StageFolder) -> dict[str, list[Any]]:
    """Columns of a table of answers: a few groups of the first, the middle and the last step that was sampled."""
    files = sorted(folder.rollouts.glob("*.parquet"))
    chosen = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    table: dict[str, list[Any]] = {"step": [], **{column: [] for column in ANSWER_COLUMNS}}
    for file in (files[index] for index in chosen):
        number = re.search("([0-9]+)", file.stem)
        shown: list[str] = []
        for row in pq.read_table(file, columns=["problem_id", *ANSWER_COLUMNS]).to_pylist():
            if row["problem_id"] not in shown and len(shown) == GROUPS_SHOWN:
                break
            if row["problem_id"] not in shown:
                shown.append(row["problem_id"])
            table["step"].append(int(number.group(1)) if number else 0)
            for column in ANSWER_COLUMNS:
                table[column].append(row[column])
    return table


def _is_data(item: InputRecord) -> bool:
    path = Path(item.path)
    return path.name == "dataset" or (item.stage is None and not item.files and path.suffix in DATA_SUFFIXES)


def _dataset(role: str, item: InputRecord, context: str) -> DatasetInput:
    path = Path(item.path)
    tables = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet")) if path.is_dir() else []
    rows = sum(pq.read_metadata(table).num_rows for table in tables if table.exists())
    dataset = Dataset(
        name=role,
        digest=item.digest[:36],  # MLflow takes no longer one
        source_type="local",
        source=json.dumps({"uri": item.path}),
        profile=json.dumps({"num_rows": rows, "stage": item.stage}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _find_model(client: Any, experiment_id: str, digest: str) -> Any | None:
    found = client.search_logged_models([experiment_id], filter_string=f"tags.digest = '{digest}'", max_results=1)
    return found[0] if found else None


def _model(client: Any, experiment_id: str, run_id: str, name: str, folder: StageFolder, done: Manifest) -> Any:
    """The logged model of an output. It stays where it is: MLflow gets folder and digest, never the weights."""
    model = _find_model(client, experiment_id, done.digest)
    if model is None:
        tags = {MLFLOW_MODEL_IS_EXTERNAL: "true", "digest": done.digest, "folder": str(folder.output("model"))}
        # Names of logged models have none of / : . % " '
        named = re.sub(r"[^\w-]", "_", name)
        model = client.create_logged_model(experiment_id, name=named, source_run_id=run_id, tags=tags)
        with tempfile.TemporaryDirectory() as temporary:
            # The registry asks for an MLmodel file, also of models that lie elsewhere.
            get_external_mlflow_model_spec(model).save(str(Path(temporary, "MLmodel")))
            client.log_model_artifacts(model.model_id, temporary)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model
