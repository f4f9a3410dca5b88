"""Servers that go away while a run goes on: it comes to its end, and its records are whole."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.servers.server_process import free_port
from tests.commands import environment, r1
from tests.conftest import ROOT
from tests.servers.stoppable import Run, Stoppable, check_mlflow, check_prefect, states

PATIENCE = "import sys, flows.pipeline.flow, flows.cli; flows.pipeline.flow.AWAY_SECONDS = 5; sys.exit(flows.cli.main())"
"""The command with less patience."""
pytestmark = pytest.mark.slow


def wait_for(look: Callable[[], Any], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[Stoppable]:
    server = Stoppable("mlflow", tmp_path)
    yield server
    server.end()


@pytest.fixture
def prefect(tmp_path: Path) -> Iterator[Stoppable]:
    server = Stoppable("prefect", tmp_path / "server")
    yield server
    server.end()


@pytest.mark.parametrize(
    ("how", "until"),
    [("late", "zero"), ("killed", "zero"), ("killed", ""), ("hung", "cold_start_data")],
)
def test_mlflow_goes_away_and_comes_back(tmp_path: Path, mlflow: Stoppable, how: str, until: str) -> None:
    """It comes back in the middle of a stage, in a later one, or when the run waits for it alone."""
    if how != "late":
        mlflow.start()
    run = Run(tmp_path, "--set", f"tracking.uri={mlflow.address}", *(("--until", until) if until else ()))
    try:
        run.wait_for("step", run.step(5))
        if how == "late":
            mlflow.start()
        elif how == "hung":
            mlflow.send(signal.SIGSTOP)
            run.wait_for("next stage", run.begun("curate"))
            time.sleep(15)
            mlflow.send(signal.SIGCONT)
        else:
            mlflow.send(signal.SIGKILL)
            if until:
                run.wait_for("more steps", run.step(12))
            else:
                run.wait_for("the wait", run.says("waiting for MLflow"))
            mlflow.start()
        assert run.end() == 0, run.said()
    finally:
        run.process.kill()
    assert "MLflow does not answer" in run.said()
    assert "not whole" not in run.said()
    record = run.record()
    assert record["status"] == "done"
    assert bool(record["models"]) == (not until)
    check_mlflow(mlflow.address, record)


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_prefect_is_restarted(tmp_path: Path, prefect: Stoppable, how: str) -> None:
    prefect.start()
    chosen = {"PREFECT_API_URL": f"{prefect.address}/api", "PREFECT_HOME": str(tmp_path / "home")}
    run = Run(tmp_path, "--until", "zero" if how == "killed" else "cold_start_data", **chosen)
    try:
        run.wait_for("step", run.step(5))
        prefect.send(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        run.wait_for("the wait", run.says("waiting for the Prefect server"))
        if how == "killed":
            time.sleep(15)  # the client gives up on the last event meanwhile
            prefect.start()
        else:
            prefect.send(signal.SIGCONT)
        assert run.end() == 0, run.said()
    finally:
        run.process.kill()
    assert "Traceback" not in run.said()
    assert run.record()["status"] == "done"
    check_prefect(prefect, run.record())


def test_the_run_s_own_prefect_server_is_started_again(tmp_path: Path) -> None:
    run = Run(tmp_path, "--until", "zero")
    try:
        run.wait_for("step", run.step(5))
        (server,) = (p for p in psutil.Process(run.process.pid).children() if "server" in p.cmdline())
        os.killpg(server.pid, signal.SIGKILL)
        assert run.end() == 0, run.said()
    finally:
        run.process.kill()
    assert "Traceback" not in run.said()
    done = {"base": "COMPLETED", "zero": "COMPLETED"}
    assert states(run.runs / "prefect" / "prefect.db") == (["COMPLETED"], done)


def test_a_run_asked_to_end_does_so_though_both_servers_hang(tmp_path: Path, mlflow: Stoppable, prefect: Stoppable) -> None:
    mlflow.start()
    prefect.start()
    chosen = {"PREFECT_API_URL": f"{prefect.address}/api", "PREFECT_HOME": str(tmp_path / "home")}
    run = Run(tmp_path, "--until", "zero", "--set", f"tracking.uri={mlflow.address}", **chosen)
    try:
        run.wait_for("step", run.step(5))
        for server in (mlflow, prefect):
            server.send(signal.SIGSTOP)
        time.sleep(1)
        asked = time.monotonic()
        run.process.terminate()
        run.wait_for("record", lambda: run.record()["status"] == "interrupted", 15)
        assert run.end() == 75, run.said()
        assert time.monotonic() - asked < 40
    finally:
        run.process.kill()
    for server in (mlflow, prefect):
        server.send(signal.SIGCONT)
    command = [sys.executable, "-m", "flows.cli", "resume", "latest", "--runs", str(run.runs)]
    subprocess.run(command, cwd=ROOT, env={**environment(), **chosen}, check=True, timeout=180)
    record = run.record()
    assert record["status"] == "done"
    check_mlflow(mlflow.address, record)


def test_a_prefect_server_that_never_was_is_named(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}/api"
    run = Run(tmp_path, program=("-c", PATIENCE), PREFECT_API_URL=address, PREFECT_HOME=str(tmp_path / "home"))
    assert run.end() == 3
    assert "Traceback" not in run.said()
    assert f"r1: the Prefect server at {address} does not answer" in run.said()
    assert run.record()["status"] == "failed"


def test_r1_up_starts_a_server_again_that_ended(tmp_path: Path) -> None:
    note, ports = tmp_path / "servers.json", {name: free_port() for name in ("prefect", "mlflow")}
    command = [
        "-m",
        "flows.cli",
        "up",
        "--runs",
        str(tmp_path),
        *(x for n, p in ports.items() for x in (f"--{n}-port", str(p))),
    ]
    up = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    client = MlflowClient(f"http://127.0.0.1:{ports['mlflow']}")
    try:
        wait_for(note.exists, 120)
        before = json.loads(note.read_text())
        client.create_experiment("kept")
        os.killpg(before["mlflow"]["pid"], signal.SIGKILL)
        wait_for(lambda: json.loads(note.read_text())["mlflow"]["pid"] != before["mlflow"]["pid"], 10)

        def answers() -> bool:
            with contextlib.suppress(MlflowException):
                return client.get_experiment_by_name("kept") is not None
            return False

        wait_for(answers, 60)
        assert json.loads(note.read_text())["prefect"] == before["prefect"]
    finally:
        up.terminate()
        assert up.wait(60) == 0
    assert not note.exists()


def test_a_prefect_server_that_stays_away_costs_no_work(tmp_path: Path, prefect: Stoppable) -> None:
    prefect.start()
    chosen = {"PREFECT_API_URL": f"{prefect.address}/api", "PREFECT_HOME": str(tmp_path / "home")}
    quiet = {"PREFECT_LOGGING_LEVEL": "WARNING", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
    run = Run(tmp_path, "--until", "zero", program=("-c", PATIENCE), **chosen, **quiet)
    try:
        run.wait_for("step", run.step(5))
        prefect.send(signal.SIGKILL)
        assert run.end() == 3, run.said()
    finally:
        run.process.kill()
    assert "Traceback" not in run.said()
    assert f"r1: every stage is done, but the Prefect server at {chosen['PREFECT_API_URL']} does not answer" in run.said()
    resumed = r1("resume", "latest", "--runs", run.runs, "--json")
    assert resumed.returncode == 0, resumed.stderr
    document = json.loads(resumed.stdout)
    assert document["status"] == "done"
    assert [s["status"] for s in document["stages"] if s["status"] != "pending"] == ["done", "done"]
    (zero,) = run.runs.glob("stages/rl-*")
    assert sorted(p.name for p in (zero / "attempts").iterdir()) == ["1"]
