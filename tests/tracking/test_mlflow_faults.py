"""MLflow with numbers that are none, with what users delete in it, and with a database that fails."""

import contextlib
import math
import sqlite3

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from stages.contract.errors import UserError
from stages.tracking.journal import Journal, read
from tests.tracking.test_tracking import folder as folder
from tests.tracking.test_tracking import history, steps, tracking
from tests.tracking.test_tracking import quick as quick
from tests.tracking.test_tracking import uri as uri


def test_numbers_of_any_kind_are_written_and_infinite_ones_are_no_large_ones_in_mlflow(uri, folder, quick):
    """SQL databases of MLflow keep 1.8e308 for an infinite value; a report shows the number that the journal has."""
    pipeline = tracking(uri, identity="numbers")
    stage = pipeline.stage("zero", folder, None)
    journal = Journal(folder.journal, keep_through=0)
    given = [1.5, math.nan, math.inf, -math.inf, np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor(2.0)]
    for step, value in enumerate(given, start=1):
        journal.append(step, len(given), {"train/x": value})
    stage.finish("FINISHED", None)
    sent = [value for _, value in history(uri, stage.run_id, "train/x")]
    assert [str(value) for value in sent] == ["1.5", "nan", "nan", "nan", "0.5", "3.0", "1.0", "2.0"]
    assert [str(line.metrics["train/x"]) for line in read(folder.journal)][1:4] == ["nan", "inf", "-inf"]


def test_deleted_experiment_is_a_mistake_with_the_command_that_restores_it(uri):
    client = MlflowClient(uri)
    deleted = client.create_experiment("gone")
    client.delete_experiment(deleted)
    with pytest.raises(UserError, match="was deleted") as caught:
        tracking(uri, experiment="gone")
    assert f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {deleted}" in caught.value.mend


@pytest.mark.parametrize("child_too", [False, True])
def test_deleted_parent_run_is_made_anew_for_a_resumed_run(uri, folder, quick, child_too):
    first = tracking(uri, identity=f"deleted parent {child_too}")
    stage = first.stage("zero", folder, None)
    steps(folder, 1, 3, keep_through=0)
    stage.finish("KILLED", None)
    first.finish("KILLED", {})
    for run in (first.parent_run_id, *([stage.run_id] if child_too else [])):
        MlflowClient(uri).delete_run(run)
    again = tracking(uri, first.parent_run_id, identity=f"deleted parent {child_too}")
    resumed = again.stage("zero", folder, stage.run_id)
    steps(folder, 4, 8, keep_through=3)
    resumed.finish("FINISHED", None)
    assert again.parent_run_id != first.parent_run_id
    assert (resumed.run_id != stage.run_id) == child_too
    assert MlflowClient(uri).get_run(resumed.run_id).data.tags["mlflow.parentRunId"] == again.parent_run_id
    assert [step for step, _ in history(uri, resumed.run_id, "train/loss")] == list(range(1, 9))


def test_database_that_fails_is_told_once_without_tracebacks(uri, folder, quick, monkeypatch, caplog):
    monkeypatch.setattr("sqlalchemy.engine.default.DefaultDialect.do_execute", _disk_is_full)
    notes = []
    with contextlib.suppress(UserError):
        tracking(uri, experiment="full", note=notes.append)
    assert "Traceback" not in caplog.text
    assert len([note for note in notes if "disk is full" in note]) <= 1


def _disk_is_full(*_):
    raise sqlite3.OperationalError("database or disk is full")
