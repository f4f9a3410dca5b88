"""The command `r1` as users meet it: a run, a second run, and everything that is refused."""

import contextlib
import json
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import environment, r1, r1_in_process, refused


def test_runs_one_after_the_other_and_what_is_said_of_them(
    recipe: Path, runs: Path, tmp_path: Path, model_folder: Path
) -> None:
    # One stage is done, the other refuses by what no look beforehand can tell: its weights are none of the model's.
    folder = tmp_path / "lacking"
    shutil.copytree(model_folder, folder)
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    first = r1("run", recipe, "--set", f"stages.other.path={folder}", "--retries", "2", "--json")
    assert first.returncode == 2
    document = json.loads(first.stdout)
    assert document["status"] == "mistake"
    assert "weights are missing" in document["error"]["message"]
    base, other = document["stages"]
    assert [(s["stage"], s["status"]) for s in (base, other)] == [("base", "done"), ("other", "failed")]
    assert [attempt.name for attempt in Path(other["folder"], "attempts").iterdir()] == ["1"]  # a mistake is not tried again
    assert document["mlflow"]["tracking_uri"] == f"sqlite:///{runs / 'mlflow.db'}"
    assert base["mlflow_run_id"]
    assert "Traceback" not in first.stderr
    assert "r1: stage `other`: " in first.stderr

    again = r1("run", recipe, "--until", "base")
    assert again.returncode == 0, again.stderr
    assert "base: finished before, reused" in again.stderr

    last = r1("run", recipe, "--fresh", "base")
    assert last.returncode == 0, last.stderr
    assert "base: done" in last.stderr
    assert "r1 up" in last.stdout

    listed = json.loads(r1_in_process("status", "--json", "--runs", runs).stdout)["runs"]
    assert [row["status"] for row in listed] == ["done", "done", "mistake"]
    names = [row["run"] for row in listed]
    sent = json.loads((runs / "pipelines" / names[1] / "pipeline.json").read_text())  # by the run after it
    assert sent["mlflow"]["parent_run_id"]
    assert [(s["status"], bool(s["mlflow_run_id"])) for s in sent["stages"].values()] == [("reused", True), ("pending", False)]
    with contextlib.closing(sqlite3.connect(runs / "prefect" / "prefect.db")) as database:
        states = dict(database.execute("select name, state_type from flow_run").fetchall())
    assert [states[name] for name in names] == ["COMPLETED", "COMPLETED", "FAILED"]
    detail = json.loads(r1_in_process("status", "latest", "--json", "--runs", runs).stdout)
    assert detail["run"] == names[0]
    assert [stage["status"] for stage in detail["stages"]] == ["done", "done"]
    assert detail["stages"][0]["folder"] == base["folder"] + "-g2"
    compared = json.loads(r1_in_process("compare", *names, "--runs", runs, "--json").stdout)
    assert compared["runs"] == names


def test_refusals(recipe: Path, tmp_path: Path) -> None:
    assert "did you mean `seed`?" in refused("run", recipe, "--set", "stages.base.sed=1")
    assert "integer" in refused("run", recipe, "--set", "stages.base.seed=many")
    assert "no such file" in refused("run", tmp_path / "none.yaml")
    assert "did you mean `other`?" in refused("run", recipe, "--from", "othe")
    assert "no run `latest`" in refused("resume", "latest", "--runs", tmp_path / "none")
    assert "--help" in refused("rnu")
    assert "at least two" in refused("compare", "one")
    assert "no Prefect server" in refused("deploy", recipe, "--cron", "0 3 * * *")


def test_a_worker_without_a_server_says_how_to_get_one(tmp_path: Path) -> None:
    assert "no Prefect server is known" in refused("worker", "--runs", tmp_path)


def test_refusals_with_json_are_documents(recipe: Path) -> None:
    done = r1("run", recipe, "--until", "none", "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["where"] == "--until"
    assert error["exit_status"] == 2


def test_an_unwritable_runs_folder_is_named(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("run", recipe, "--set", f"runs={tmp_path / 'file' / 'runs'}")


@pytest.mark.parametrize(
    "command", ["run {}", "plan {}", "stage base {}", "status", "resume latest", "report latest", "gc", "up", "worker"]
)
def test_a_runs_folder_that_cannot_be_is_named(recipe: Path, command: str) -> None:
    place = "x" * 5000
    if command.endswith("{}"):
        line = refused(*command.format(recipe).split(), "--set", f"runs={place}")
    else:
        line = refused(*command.split(), "--runs", place)
    assert "File name too long" in line


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port}" in refused("up", "--runs", tmp_path, "--prefect-port", port)


@pytest.mark.parametrize("command", ["doctor", "status"])
def test_json_alone_on_standard_output(command: str, tmp_path: Path) -> None:
    assert json.loads(r1(command, "--json", "--runs", tmp_path).stdout)


def test_help_costs_little() -> None:
    def cost(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], env=environment(), stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    cost("-m", "flows.cli", "--help")  # compiles what isn't yet
    assert cost("-m", "flows.cli", "--help") - cost("-c", "pass") < 0.5
