"""A deployed run of a recipe with its reward module beside it: submitted in one folder, the worker in another."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.processes import ProcessTree
from flows.servers.server_process import free_port
from stages.tracking.journal import read
from tests.commands import environment
from tests.deployments.test_schedule import wait_for
from tests.pipeline.test_user_environment import Place, make_place

pytestmark = pytest.mark.slow
Start = Callable[..., None]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@pytest.fixture
def start(place: Place) -> Iterator[Start]:
    """Starts a command in a folder; it is ended with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str, cwd: str) -> None:
        with (place.folder / f"{name}.log").open("wb") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", *arguments],
                    stdout=output,
                    stderr=output,
                    cwd=place.folder / cwd,
                    env={**environment(), **place.variables, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            )

    yield start
    for process in reversed(started):
        ProcessTree(process.pid).end(15.0)
        process.wait()


def test_deployed_run_finds_the_reward_beside_its_recipe_and_no_datasets_of_the_users(place: Place, start: Start) -> None:
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    start("up", "flows.cli", "up", f"--runs={place.runs}", *ports, cwd="elsewhere")
    wait_for("servers", 200, (place.runs / "servers.json").exists, place.folder / "up.log")
    deployed = place.r1("deploy", "../project/mine.yaml", "--name", "mine", "--cron", "* * * * *", "--json")
    assert deployed.returncode == 0, deployed.stderr
    start("worker", "flows.cli", "worker", f"--runs={place.runs}", cwd="elsewhere")

    def rewarded() -> tuple[dict[str, Any], Path] | None:
        for file in (place.runs / "pipelines").glob("*/pipeline.json"):
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            zero = record["stages"]["zero"]
            assert record["status"] == "running" or zero["status"] == "done", record["error"]
            if zero["status"] == "done":
                return record, Path(zero["folder"])
        return None

    record, stage = wait_for("stage with the user's reward", 400, rewarded, place.folder / "worker.log")
    assert any("brevity" in name for line in read(stage / "journal.jsonl") for name in line.metrics)
    assert record["code_folders"] == [str(place.recipe.parent), str(place.folder / "work")]
    logs = [path.read_text(encoding="utf-8") for path in place.runs.glob("stages/*/attempts/*/log.txt")]
    assert "the user's datasets was imported" not in "".join([*logs, (place.folder / "worker.log").read_text()])
