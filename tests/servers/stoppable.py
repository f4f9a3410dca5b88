"""Servers that tests stop and start, runs that go on meanwhile, and what both must have left."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.servers.prefect_env import server_arguments, server_environment
from flows.servers.server_process import Server, free_port
from stages.tracking.journal import read
from tests.commands import environment
from tests.conftest import ROOT

TINY = ROOT / "tests" / "pipeline" / "tiny.yaml"


class Stoppable:
    """A server that is stopped and started as a test likes it; its database stays."""

    def __init__(self, what: str, folder: Path) -> None:
        self.what, self.folder, self.port = what, folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.server: Server | None = None

    def start(self) -> None:
        if self.what == "prefect":
            arguments, health = server_arguments(self.port, ui=False), f"{self.address}/api/health"
        else:
            place = ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
            place += ["--artifacts-destination", str(self.folder / "artifacts")]
            arguments = ["server", *place, "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
            health = f"{self.address}/health"
        variables = {**environment(), **server_environment(self.folder)}
        self.server = Server(self.what, self.what, arguments, variables, health, self.folder / f"{self.what}.log")
        self.server.wait_healthy()

    def send(self, number: signal.Signals) -> None:
        assert self.server is not None
        os.killpg(self.server.process.pid, number)
        if number == signal.SIGKILL:
            self.server.process.wait()

    def end(self) -> None:
        if self.server is not None and self.server.process.poll() is None:
            self.send(signal.SIGKILL)


class Run:
    """`r1 run` as a process, and what it leaves."""

    def __init__(self, folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "flows.cli"), **variables: str) -> None:
        self.runs, self.log = folder / "runs", folder / "run.log"
        overrides = [f"runs={self.runs}", "stages.zero.steps=40", "stages.zero.compute.threads=1"]
        command = [sys.executable, *program, "run", str(TINY), *arguments, *(x for o in overrides for x in ("--set", o))]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**environment(), **variables}, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for(self, what: str, look: Callable[[], Any], seconds: float = 180) -> None:
        until = time.monotonic() + seconds
        while not look():
            assert self.process.poll() is None, f"ended before {what}:\n{self.said()[-3000:]}"
            assert time.monotonic() < until, f"no {what}:\n{self.said()[-3000:]}"
            time.sleep(0.05)

    def step(self, number: int) -> Callable[[], bool]:
        return lambda: any(len(read(j)) >= number for j in self.runs.glob("stages/rl-*/journal.jsonl"))

    def begun(self, kind: str) -> Callable[[], bool]:
        return lambda: any(self.runs.glob(f"stages/{kind}-*/attempts/1"))

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.said()

    def said(self) -> str:
        return self.log.read_text()

    def record(self) -> dict[str, Any]:
        (file,) = self.runs.glob("pipelines/*/pipeline.json")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def end(self, seconds: float = 300) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def check_mlflow(uri: str, record: dict[str, Any]) -> None:
    """Every run is there once and FINISHED, with every line of its journal once, in order, as it was."""
    client = MlflowClient(uri)
    runs = {run.info.run_id: run for run in client.search_runs([record["mlflow"]["experiment_id"]], max_results=1000)}
    done = {name: stage for name, stage in record["stages"].items() if stage["status"] == "done"}
    assert len(runs) == 1 + len(done)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs[record["mlflow"]["parent_run_id"]]
    for name, stage in done.items():
        run = runs[stage["mlflow_run_id"]]
        assert (run.data.tags["stage"], run.data.tags["mlflow.parentRunId"]) == (name, parent.info.run_id)
        assert run.data.metrics["time/wall_seconds"] == pytest.approx(stage["seconds"])
        assert run.data.params["kind"] == stage["kind"]
        lines = read(Path(stage["folder"]) / "journal.jsonl")
        for metric in sorted(set().union(*(line.metrics for line in lines))):
            wanted = [(line.step, line.metrics[metric], line.time) for line in lines if metric in line.metrics]
            found = [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, metric)]
            assert found == [pytest.approx(point) for point in wanted], (name, metric)
    for model, values in record["models"].items():
        assert parent.data.metrics[f"eval/{model}/accuracy"] == values["accuracy"]


def states(database: Path) -> tuple[list[str], dict[str, str]]:
    """States of the flow runs, and of the task runs by name, in Prefect's database."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        flows = [state for (state,) in connection.execute("select state_type from flow_run")]
        return flows, dict(connection.execute("select name, state_type from task_run"))


def check_prefect(prefect: Stoppable, record: dict[str, Any]) -> None:
    """The flow and every stage's task are COMPLETED."""
    time.sleep(3)  # it writes task runs when it has time
    names = [name for name, stage in record["stages"].items() if stage["status"] == "done"]
    assert states(prefect.folder / "prefect" / "prefect.db") == (["COMPLETED"], dict.fromkeys(names, "COMPLETED"))
