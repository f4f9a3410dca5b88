"""A schedule that runs: real servers, a real deployment, a real worker.

The fast test asks for a run at once, which the worker takes like one that the schedule's clock asks for; the slow one waits
for the clock.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.processes import ProcessTree
from flows.servers.server_process import free_port
from tests.commands import environment, r1
from tests.conftest import ROOT

WHOLE = ROOT / "tests" / "pipeline" / "tiny.yaml"
"""Every stage of the recipe; one quick stage shows the same of the schedule."""
EVERY_MINUTE = "* * * * *"


def wait_for(what: str, seconds: float, look: Callable[[], Any], log: Path) -> Any:
    """What `look` finds; the log is shown when it finds nothing in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.3)
    raise AssertionError(f"no {what} within {seconds} s:\n{log.read_text()[-3000:]}")


def run_now(api: str, deployment: str) -> None:
    """Schedule a run of a deployment for this moment; its own schedule has to be on."""
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        assert [(item.active, item.schedule.cron) for item in found.schedules] == [(True, EVERY_MINUTE)]
        assert client.create_flow_run_from_deployment(found.id).state.is_scheduled()


@pytest.mark.parametrize("clock", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["now", "by the clock"])
def test_a_worker_runs_what_is_scheduled(tmp_path: Path, recipe: Path, clock: bool) -> None:
    config = WHOLE if clock else recipe
    if not clock:
        document = json.loads(recipe.read_text())
        del document["stages"]["other"]
        recipe.write_text(json.dumps(document))
    runs, log = tmp_path / "runs", tmp_path / "worker.log"
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, file: Path, **variables: str) -> None:
        with file.open("wb") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    stdout=output,
                    stderr=output,
                    cwd=ROOT,
                    env={**environment(), **variables},
                    start_new_session=True,
                )
            )

    try:
        start("flows.cli", "up", "--runs", str(runs), *ports, file=tmp_path / "up.log")
        wait_for("servers", 120, (runs / "servers.json").exists, tmp_path / "up.log")
        deployed = r1("deploy", config, "--cron", EVERY_MINUTE, "--name", "test", "--set", f"runs={runs}", "--json")
        assert deployed.returncode == 0, deployed.stderr
        facts = json.loads(deployed.stdout)
        assert facts["deployment"] == "r1-config/test"
        if not clock:
            run_now(facts["api"], facts["deployment"])
        worker = {"PREFECT_API_URL": facts["api"], "PREFECT_HOME": str(tmp_path / "worker"), "DO_NOT_TRACK": "1"}
        start("prefect", "--no-prompt", "worker", "start", "--pool", facts["work_pool"], file=log, **worker)

        def finished() -> dict[str, Any] | None:
            for file in (runs / "pipelines").glob("*/pipeline.json"):
                record: dict[str, Any] = json.loads(file.read_text())
                if record["status"] != "running":
                    return record
            return None

        record = wait_for("scheduled run", 240, finished, log)
        assert record["status"] == "done", record["error"]
        assert {stage["status"] for stage in record["stages"].values()} <= {"done", "reused"}
        assert record["mlflow"]["parent_run_id"]
        commands = [" ".join(child.cmdline()) for child in psutil.Process(started[0].pid).children(recursive=True)]
        assert any("uvicorn" in command and "mlflow" in command for command in commands)
        assert not any("mlflow.server.jobs" in command for command in commands), "MLflow's background jobs are off"
    finally:
        for process in reversed(started):
            ProcessTree(process.pid).end(15.0)
            process.wait()
    assert not (runs / "servers.json").exists()
