"""Runs that reused every stage while no server was there, sent later: what MLflow and Prefect get, and when they wait on."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from filelock import FileLock

from flows.pipeline.all_reused import all_finished, record_reused
from flows.pipeline.unsent import send, send_in_background, unsent
from flows.runs.record import RunRecord
from flows.runs.selection import select
from stages.recipe.resolve import load_recipe
from stages.store.folders import Runs
from tests.pipeline.test_all_reused import finish, recipe_file


@pytest.fixture
def waiting(tmp_path: Path) -> RunRecord:
    """A run of two stages that were finished before."""
    recipe = load_recipe(recipe_file(tmp_path))
    finish(recipe)
    record = RunRecord.create(recipe, "two.yaml")
    finished = all_finished(recipe, select(recipe))
    assert finished is not None
    record_reused(record, recipe, finished, lambda _: None)
    return record


class Servers:
    """What MLflow and Prefect were sent; `answers`: whether they do."""

    def __init__(self, answers: bool = True) -> None:
        self.answers, self.sent, self.stages, self.artifacts = answers, list[Any](), list[Any](), list[Any]()
        self.parent_run_id = "parent" if answers else ""
        self.experiment_id = "7"
        self.run_ids = {"first": "child"} if answers else {}

    def tracking(self, uri: str, experiment: str, name: str, earlier: str | None, **facts: Any) -> "Servers":
        self.sent.append(("run", experiment, name, earlier))
        return self

    def stage(self, name: str, folder: Any, run_id: str | None, *, reused_from: str) -> Any:
        self.stages.append((name, run_id, reused_from))
        return SimpleNamespace(finish=lambda status, manifest: self.sent.append((name, status, manifest.output)))

    def artifact(self, path: Path) -> None:
        self.sent.append(("page", path.name))

    def finish(self, status: str, results: Any, remarks: Any) -> None:
        self.sent.append(("end", status))

    @contextlib.contextmanager
    def client(self, *_: Any) -> Any:
        if not self.answers:
            raise httpx.ConnectError("away")
        yield self

    def create_flow_run(self, flow: Any, *, name: str, parameters: dict[str, Any], state: Any) -> Any:
        self.sent.append(("flow run", name, Path(parameters["run"]).name, state.name))
        return SimpleNamespace(id="00000000-0000-0000-0000-000000000001")

    def create_artifact(self, artifact: Any) -> Any:
        self.artifacts.append((artifact.key, str(artifact.flow_run_id)[-1]))
        return SimpleNamespace(id=None)


def use(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.tracking.mlflow.pipeline_run.PipelineTracking", servers.tracking)
    monkeypatch.setattr("flows.servers.prefect_client.impatient_client", servers.client)
    monkeypatch.setattr("flows.pipeline.artifacts.impatient_client", servers.client)


def test_send_gives_mlflow_and_prefect_the_run_once(waiting: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = Servers()
    use(servers, monkeypatch)
    runs = Runs(waiting.folder.path.parents[1])
    assert [folder.path.name for folder in unsent(runs)] == [waiting.name]
    for _ in range(2):
        send(runs, lambda _: None)
    assert servers.sent == [
        ("run", "two", waiting.name, None),
        ("first", "FINISHED", "dataset"),
        ("second", "FINISHED", "dataset"),
        ("page", "report.html"),
        ("end", "FINISHED"),
        ("flow run", waiting.name, waiting.name, "Completed"),
    ]
    assert [(name, run) for name, run, _ in servers.stages] == [("first", None), ("second", None)]
    assert [reused for _, _, reused in servers.stages] == [waiting.place(name).path.name for name in ("first", "second")]
    assert ("two-results", "1") in servers.artifacts
    sent = RunRecord.open(waiting.folder)
    assert sent.content["mlflow"]["parent_run_id"] == "parent"
    assert sent.stages["first"]["mlflow_run_id"] == "child"
    assert (sent.status(), unsent(runs)) == ("done", [])


def test_send_leaves_out_a_stage_that_was_removed_since(waiting: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = Servers()
    use(servers, monkeypatch)
    waiting.place("second").manifest.unlink()
    send(Runs(waiting.folder.path.parents[1]), lambda _: None)
    assert [name for name, _, _ in servers.stages] == ["first"]


def test_send_keeps_the_run_waiting_while_servers_are_away(waiting: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Servers(answers=False), monkeypatch)
    runs = Runs(waiting.folder.path.parents[1])
    send(runs, lambda _: None)
    assert [folder.path.name for folder in unsent(runs)] == [waiting.name]
    away, notes = Servers(), list[str]()
    away.answers = False  # MLflow does, Prefect does not
    use(away, monkeypatch)
    send(runs, notes.append)
    assert notes == [f"{waiting.name} is not in MLflow and Prefect yet (away)"]
    assert [folder.path.name for folder in unsent(runs)] == [waiting.name]


def test_send_leaves_it_to_the_command_that_does_so_already(waiting: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = Servers()
    use(servers, monkeypatch)
    runs = Runs(waiting.folder.path.parents[1])
    with FileLock(runs.path / ".unsent.lock"):
        send(runs, lambda _: None)
    assert servers.sent == []


def test_send_in_background_starts_nothing_when_nothing_waits(tmp_path: Path) -> None:
    assert send_in_background(Runs(tmp_path)) is None
