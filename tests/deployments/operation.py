"""What operating the pipeline takes: PostgreSQL, both servers on it, a worker, and Prefect's client to look and to ask with."""

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flows.processes import ProcessTree
from flows.servers.prefect_env import server_arguments, server_environment
from flows.servers.server_process import Server, free_port
from tests.commands import environment
from tests.conftest import ROOT
from tests.requirements import require

BINARIES = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), *map(Path, os.environ["PATH"].split(":"))]
"""Where PostgreSQL may be."""


def wait_for(what: str, look: Callable[[], Any], seconds: float = 120, log: Path | None = None) -> Any:
    """What `look` finds; the log is shown when it finds nothing in time."""
    until = time.monotonic() + 2 * seconds  # other work goes on besides
    while not (found := look()):
        said = log.read_text()[-3000:] if log is not None and log.exists() else ""
        assert time.monotonic() < until, f"no {what} within {seconds} s:\n{said}"
        time.sleep(0.2)
    return found


class Postgres:
    """A cluster of its own. PostgreSQL refuses to be root, so root starts it as the user `postgres`."""

    def __init__(self) -> None:
        require("postgresql", "psycopg2")
        self.binaries = next((folder for folder in BINARIES if (folder / "initdb").exists()), None)
        self.prefix: list[str] = []
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="r1-postgres-")), free_port()
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            self.prefix = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self.run("initdb", "-D", "data", "-A", "trust", "-U", "r1", "--no-sync")
        with (self.folder / "log").open("wb") as log:
            options = ["-D", "data", "-h", "127.0.0.1", "-p", str(self.port), "-k", str(self.folder), "-F"]
            command = [*self.prefix, str(self.binaries / "postgres"), *options]
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        wait_for("PostgreSQL", lambda: self.answers(), 60, self.folder / "log")

    def run(self, program: str, *arguments: str) -> None:
        command = [*self.prefix, str(self.binaries / program), *arguments]  # type: ignore[operator]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)

    def answers(self) -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.run("pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-U", "r1", "-d", "postgres")
            return True
        return False

    def database(self, name: str, driver: str) -> str:
        """Make a database; returns its address."""
        self.run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "r1", name)
        return f"{driver}://r1@127.0.0.1:{self.port}/{name}"

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)  # clients are not waited for
        self.process.wait(30)
        shutil.rmtree(self.folder)


class Operation:
    """Both servers and a worker, and one runs folder for all that they run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.postgres = Postgres()
        self.prefect_port, self.mlflow_port = free_port(), free_port()
        self.mlflow = f"http://127.0.0.1:{self.mlflow_port}"
        self.variables = {
            **environment(),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.prefect_port}/api",
            "PREFECT_HOME": str(folder / "home"),
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.ended: list[Callable[[], None]] = [self.postgres.end]
        self.prefect_database = self.postgres.database("prefect", "postgresql+asyncpg")
        self.mlflow_database = self.postgres.database("mlflow", "postgresql+psycopg2")
        place = ["--backend-store-uri", self.mlflow_database, "--artifacts-destination", str(folder / "artifacts")]
        place += ["--host", "127.0.0.1", "--port", str(self.mlflow_port), "--workers", "1"]
        health = f"http://127.0.0.1:{self.prefect_port}/api/health"
        self.prefect = self.serve("prefect", server_arguments(self.prefect_port, ui=False), health)
        for server in (self.prefect, self.serve("mlflow", ["server", *place], f"{self.mlflow}/health")):
            server.wait_healthy()

    def serve(self, what: str, arguments: list[str], health: str) -> Server:
        variables = {
            **environment(),
            **server_environment(self.folder),
            "PREFECT_API_DATABASE_CONNECTION_URL": self.prefect_database,
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        }
        server = Server(what, what, arguments, variables, health, self.folder / f"{what}.log")
        self.ended.append(server.stop)
        return server

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        """Start `r1 worker`."""
        process = self.start(name, "-m", "flows.cli", "worker", "--runs", str(self.runs))
        self.ended.append(lambda: _end(process))
        return process

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, *arguments]
            return subprocess.Popen(command, cwd=ROOT, env=self.variables, stdout=log, stderr=log, start_new_session=True)

    def r1(self, *arguments: object, timeout: float = 400) -> dict[str, Any]:
        """Run the command, which has to succeed; its document."""
        command = [sys.executable, "-m", "flows.cli", *map(str, arguments), "--json"]
        done = subprocess.run(
            command, cwd=ROOT, env=self.variables, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def sets(self, *more: str, runs: Path | None = None) -> list[str]:
        overrides = [f"runs={runs or self.runs}", f"tracking.uri={self.mlflow}", "shared.compute.threads=1", *more]
        return [word for text in overrides for word in ("--set", text)]

    def records(self, runs: Path | None = None) -> list[dict[str, Any]]:
        files = sorted(((runs or self.runs) / "pipelines").glob("*/pipeline.json"))
        return [{"run": file.parent.name, **json.loads(file.read_text())} for file in files]

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """Prefect's client, at this server."""
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with (
            temporary_settings(updates={PREFECT_API_URL: self.variables["PREFECT_API_URL"]}),
            get_client(sync_client=True) as client,
        ):
            yield client

    def end(self) -> None:
        for end in reversed(self.ended):
            end()


def _end(process: subprocess.Popen[bytes]) -> None:
    ProcessTree(process.pid).end(30.0)
    process.wait()


def digests(record: dict[str, Any]) -> dict[str, str]:
    """Stage -> the digest of its output."""
    found = {}
    for name, stage in record["stages"].items():
        if stage["status"] in ("done", "reused"):
            found[name] = json.loads((Path(stage["folder"]) / "manifest.json").read_text())["digest"]
    return found
