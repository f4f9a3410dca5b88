"""The services of infra/compose.yaml without containers: the same commands with the same variables, on loopback.

They are read from the file, so that it cannot say anything else. Only addresses change: each service's name, and each port.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.processes import ProcessTree
from flows.servers.server_process import free_port
from tests.commands import environment
from tests.conftest import ROOT
from tests.servers.postgres import Postgres, postgres
from tests.servers.test_servers import leaks, status

INFRA = ROOT / "infra"
pytestmark = pytest.mark.slow
PASSWORDS = {
    "POSTGRES_PASSWORD": "never-used-here",
    "PREFECT_DATABASE_PASSWORD": "secret-of-prefect's-database",
    "MLFLOW_DATABASE_PASSWORD": "secret-of-mlflow's-database",
    "PREFECT_API_AUTH_STRING": "ann:secret-of-prefect",
    "MLFLOW_TRACKING_USERNAME": "bob",
    "MLFLOW_TRACKING_PASSWORD": "secret-of-mlflow",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret-that-signs",
}


class Services:
    """compose.yaml, with addresses of this machine."""

    def __init__(self, folder: Path, database: Postgres) -> None:
        text = (INFRA / "compose.yaml").read_text()
        self.all: dict[str, Any] = yaml.safe_load(text)["services"]
        self.folder = folder
        self.ports = {"4200": str(free_port()), "5000": str(free_port()), "8080": str(free_port()), "5432": str(database.port)}
        settings = folder / "mlflow-auth.ini"
        settings.write_text(self.here((INFRA / "docker" / "mlflow-auth.ini").read_text()))
        self.places = {"/etc/r1/mlflow-auth.ini": str(settings), "/srv/mlflow": str(folder / "artifacts")}

    def here(self, text: str) -> str:
        """A command or variable as it is on this machine."""
        text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: PASSWORDS[found[1]], text)
        text = re.sub(r"(//|@)(postgres|prefect|mlflow)(?=:\d)", r"\g<1>127.0.0.1", text).replace("0.0.0.0", "127.0.0.1")
        for port, instead in self.ports.items():
            text = re.sub(rf"\b{port}\b", instead, text)
        for place, instead in getattr(self, "places", {}).items():
            text = text.replace(place, instead)
        return text

    def variables(self, name: str) -> dict[str, str]:
        own = {key: self.here(str(value)) for key, value in self.all[name]["environment"].items()}
        return {**environment(), "PREFECT_HOME": str(self.folder / name), "DO_NOT_TRACK": "1", **own}

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """The service, once its own health check says that it is healthy."""
        program, *arguments = (self.here(word) for word in self.all[name]["command"])
        log = self.folder / f"{name}.log"
        command = [str(Path(sys.executable).parent / program), *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.variables(name), stdout=output, stderr=output, start_new_session=True
            )
        try:
            until = time.monotonic() + 600
            while not self.healthy(name):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.5)
            yield
        finally:
            ProcessTree(process.pid).end(15.0)
            process.wait()

    def healthy(self, name: str) -> bool:
        kind, *test = (self.here(word) for word in self.all[name]["healthcheck"]["test"])
        assert kind == "CMD"
        if test[0] == "python":
            test[0] = sys.executable
        there = {**environment(), "PGPORT": self.ports["5432"]}
        return subprocess.run(test, env=there, capture_output=True, timeout=30, check=False).returncode == 0


def make_databases(database: Postgres) -> None:
    """What PostgreSQL's image does with our script on an empty volume."""
    place = {"PGHOST": "127.0.0.1", "PGPORT": str(database.port), "POSTGRES_USER": "r1_owner", **database.variables}
    (script,) = (v.split(":")[0] for v in _services()["postgres"]["volumes"] if "docker-entrypoint-initdb.d" in v)
    given = {key: PASSWORDS[key] for key in _services()["postgres"]["environment"] if key.endswith("DATABASE_PASSWORD")}
    path = os.pathsep.join([str(database.bin), os.environ["PATH"]])
    variables = {"PATH": path, **place, **given}
    subprocess.run(["bash", str(INFRA / script)], cwd="/", env=variables, check=True, capture_output=True)


def _services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    return found


def test_services_work_together(tmp_path: Path, recipe: Path) -> None:
    with postgres() as database, contextlib.ExitStack() as stack:
        make_databases(database)
        services = Services(tmp_path, database)
        assert services.healthy("postgres")
        for name in ("prefect", "mlflow", "worker"):
            stack.enter_context(services.running(name))
        api, mlflow = (services.variables("worker")[key] for key in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"))
        assert status(f"{api}/flows/filter", None, b"{}") == 401
        # Clients in compose call MLflow by the name of its service, with its port.
        searched, login, everything = (
            f"{mlflow}/api/2.0/mlflow/experiments/search",
            "bob:secret-of-mlflow",
            b'{"max_results": 1}',
        )
        assert status(searched, None, everything) == 401
        assert status(searched, login, everything, Host=f"mlflow:{services.ports['5000']}") == 200
        assert status(searched, login, everything, Host="evil.example") == 403

        # `docker compose exec worker r1 deploy …`, at once: the worker runs it, and both servers know.
        runs = tmp_path / "runs"
        command = ["deploy", str(recipe), "--set", f"runs={runs}", "--cron", "* * * * *", "--name", "test", "--json"]
        deploy = [sys.executable, "-m", "flows.cli", *command]
        done = subprocess.run(
            deploy, cwd=ROOT, env=services.variables("worker"), capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        record = wait_for_record(runs, tmp_path / "worker.log")
        assert record["status"] == "done", record["error"]
        assert record["mlflow"]["tracking_uri"] == mlflow
        assert database.ask("r1_mlflow", "select count(*) from runs where status = 'FINISHED'") >= ["3"]
        until = time.monotonic() + 120  # the record is written before Prefect is told
        while "COMPLETED" not in (states := database.ask("r1_prefect", "select state_type from flow_run")):
            assert time.monotonic() < until, states
            time.sleep(0.5)
        assert list((tmp_path / "artifacts").glob("**/config.json"))
        assert leaks(tmp_path, *(password.rpartition(":")[2] for password in PASSWORDS.values() if "secret" in password)) == []
        # Each server's user has no way into the other's database.
        for user, other in (("r1_prefect", "r1_mlflow"), ("r1_mlflow", "r1_prefect")):
            assert database.ask("postgres", f"select has_database_privilege('{user}', '{other}', 'connect')") == ["f"]


def wait_for_record(runs: Path, log: Path) -> dict[str, Any]:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        for file in (runs / "pipelines").glob("*/pipeline.json"):
            record: dict[str, Any] = json.loads(file.read_text())
            if record["status"] != "running":
                return record
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])
