"""`r1 up` and `r1 down` for real: with PostgreSQL, with credentials, and what other commands make of both."""

import base64
import contextlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.processes import alive
from flows.servers.server_process import free_port
from tests.commands import environment, refused
from tests.conftest import ROOT
from tests.servers.postgres import Postgres, postgres

LOGIN = {
    "PREFECT_API_AUTH_STRING": "ann:secret-of-prefect",
    "MLFLOW_TRACKING_USERNAME": "bob",
    "MLFLOW_TRACKING_PASSWORD": "secret-of-mlflow",
}


def command(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    variables = {**environment(), **variables}
    return subprocess.run(program, capture_output=True, text=True, timeout=600, cwd=ROOT, env=variables, check=False)


@contextlib.contextmanager
def servers(runs: Path, *options: object, **variables: str) -> Iterator[dict[str, Any]]:
    """`r1 up --detach` … `r1 down`; what it wrote down is given."""
    ports = ("--prefect-port", free_port(), "--mlflow-port", free_port())
    done = command("up", "--detach", "--json", "--runs", runs, *ports, *options, **variables)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    try:
        assert facts == json.loads((runs / "servers.json").read_text())
        yield facts
    finally:
        ended = command("down", "--runs", runs)
    assert ended.returncode == 0, ended.stderr
    assert not (runs / "servers.json").exists()
    assert not any(alive(facts[name]["pid"], facts[name]["born"]) for name in ("up", "prefect", "mlflow"))


def status(address: str, login: str | None = None, data: bytes | None = None, **headers: str) -> int:
    if login is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    if data is not None:
        headers["Content-Type"] = "application/json"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def leaks(folder: Path, *secrets: str) -> list[str]:
    """Files below `folder`, and processes of this machine, that show a secret."""
    found = [
        str(file)
        for file in folder.rglob("*")
        if file.is_file() and any(secret.encode() in file.read_bytes() for secret in secrets)
    ]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found += [str(process)] * any(secret in " ".join(process.cmdline()) for secret in secrets)
    return found


def test_open_servers_without_credentials_are_refused(tmp_path: Path) -> None:
    line = refused("up", "--host", "0.0.0.0", "--runs", tmp_path)
    assert line.startswith("r1: --host: servers on 0.0.0.0 can be reached by others, so they need credentials")
    assert "no servers of this runs folder run" in refused("down", "--runs", tmp_path)


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.mark.slow
def test_postgres_keeps_what_both_servers_are_told(tmp_path: Path, recipe: Path, database: Postgres) -> None:
    runs = tmp_path / "runs"
    place = ("--postgres", database.address)
    with servers(runs, *place, **database.variables) as facts:
        assert facts["store"] == "postgresql"
        done = command("run", recipe, "--set", f"runs={runs}", "--json")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["mlflow"]["tracking_uri"] == facts["mlflow"]["address"]
        assert database.ask("r1_mlflow", "select status from runs") == ["FINISHED"] * 3
        assert database.ask("r1_prefect", "select state_type from flow_run") == ["COMPLETED"]
        assert not (runs / "mlflow.db").exists()
        assert not (runs / "prefect" / "prefect.db").exists()
        assert list(runs.glob("mlartifacts/**/config.json"))  # by way of the server
        assert leaks(runs, database.password) == []
    # What it kept is there when it comes back, and a run goes on in it though the servers' ports have changed.
    with servers(runs, *place, **database.variables) as facts:
        done = command("resume", "latest", "--runs", runs, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["mlflow"]["parent_run_id"] == document["mlflow"]["parent_run_id"]
    assert database.ask("r1_mlflow", "select status from runs") == ["FINISHED"] * 3


@pytest.mark.slow
def test_what_postgres_refuses_is_one_line(tmp_path: Path, database: Postgres) -> None:
    def line(*options: object, **variables: str) -> str:
        done = command("up", "--runs", tmp_path, "--prefect-port", free_port(), *options, **variables)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (only,) = done.stderr.strip().splitlines()
        return only

    wrong = line("--postgres", database.address, PGPASSWORD="not-this-one")
    assert "password authentication failed" in wrong
    assert "not-this-one" not in wrong
    database.ask("postgres", "create database taken")
    database.ask("taken", "create table flow_run (id int)")
    taken = line("--postgres", database.address, "--mlflow-database", "taken", **database.variables)
    assert "--mlflow-database: `taken` is a database of Prefect" in taken


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_open_servers_ask_for_credentials(tmp_path: Path, recipe: Path, store: str, database: Postgres) -> None:
    runs = tmp_path / "runs"
    options = ["--host", "0.0.0.0", "--allowed-hosts", "r1.example"]
    variables = dict(LOGIN)
    if store == "postgresql":
        options += ["--postgres", database.address, "--prefect-database", "auth_p", "--mlflow-database", "auth_m"]
        variables |= database.variables
    mine = f"{LOGIN['MLFLOW_TRACKING_USERNAME']}:{LOGIN['MLFLOW_TRACKING_PASSWORD']}"
    with servers(runs, *options, **variables) as facts:
        api, mlflow = facts["prefect"]["api"], facts["mlflow"]["address"]
        assert facts["credentials"]
        flows, searched = f"{api}/flows/filter", f"{mlflow}/api/2.0/mlflow/experiments/search"
        everything = b'{"max_results": 10}'
        for address, body, login in (
            (flows, b"{}", LOGIN["PREFECT_API_AUTH_STRING"]),
            (searched, everything, mine),
            (f"{mlflow}/ajax-api/2.0/mlflow/experiments/search", everything, mine),
            (f"{mlflow}/api/2.0/mlflow-artifacts/artifacts", None, mine),
        ):
            assert status(address, None, body) == 401, address
            assert status(address, "ann:something-else", body) == 401, address
            assert status(address, login, body) == 200, address
        assert status(f"{api}/health") == status(f"{mlflow}/health") == 200
        # Only by its names, and only from its own pages.
        port = mlflow.rpartition(":")[2]
        assert status(searched, mine, everything, Host=f"r1.example:{port}", Origin=f"http://r1.example:{port}") == 200
        assert status(searched, mine, everything, Host="evil.example") == 403
        assert status(searched, mine, everything, Origin="http://evil.example") == 403

        arguments = ("run", recipe, "--set", f"runs={runs}", "--set", f"tracking.uri={mlflow}")
        for without, said in (("PREFECT_API_AUTH_STRING", "the Prefect server at"), ("MLFLOW_TRACKING_PASSWORD", "MLflow at")):
            some = {key: value for key, value in LOGIN.items() if key != without}
            done = command(*arguments, **some)
            assert done.returncode == 2, done.stderr
            assert "Traceback" not in done.stderr
            (line,) = (text for text in done.stderr.splitlines() if text.startswith("r1: ") and "credentials" in text)
            assert f"{said} " in line
        assert not (runs / "stages").exists() or not any((runs / "stages").iterdir())
        done = command(*arguments, "--json", **LOGIN)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["mlflow"]["parent_run_id"]
        compared = command("compare", told["run"], told["run"], "--runs", runs, "--json", **LOGIN)
        assert json.loads(compared.stdout)["address"].startswith(mlflow)
        deploy = ("deploy", recipe, "--set", f"runs={runs}", "--cron", "0 3 * * *", "--name", "nightly")
        refusal = command(*deploy)
        assert refusal.returncode == 2, refusal.stderr
        assert "does not take these credentials" in refusal.stderr
        assert command(*deploy, **LOGIN).returncode == 0
        assert leaks(tmp_path, *(value.rpartition(":")[2] for value in LOGIN.values() if "secret" in value)) == []
    # MLflow keeps the password of its first start.
    done = command(
        "up",
        "--auth",
        "--runs",
        runs,
        "--mlflow-port",
        free_port(),
        "--prefect-port",
        free_port(),
        *options[4:],
        **{**variables, "MLFLOW_TRACKING_PASSWORD": "another-secret"},
    )
    assert done.returncode == 2, done.stderr
    assert "MLFLOW_TRACKING_PASSWORD: the MLflow server does not take these credentials" in done.stderr
    assert not (runs / "servers.json").exists()
