"""A Prefect server and an MLflow server of a runs folder, in this process's foreground, each with a database of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.processes import birth
from flows.servers.access import Access
from flows.servers.databases import Databases
from flows.servers.prefect_env import (
    DATABASE,
    alone_at_start,
    database,
    home,
    server_arguments,
    server_environment,
)
from flows.servers.server_process import Server
from stages.store.empty_databases import place
from stages.store.files import write_json


def serve(
    runs: Path,
    ports: dict[str, int],
    allowed: Access,
    databases: Databases,
    ready: Callable[[dict[str, Any]], subprocess.Popen[bytes] | None],
) -> None:
    """Start both and look after them until this process is asked to stop: one that ends is started again.

    `ready`: called once with where they are (`servers.json`) when they answer; a process that it returns ends with them.
    """
    note, servers, beside = runs / "servers.json", dict[str, Server](), None
    addresses = {name: allowed.local(port) for name, port in ports.items()}
    try:
        print("starting the Prefect server and the MLflow server …", file=sys.stderr)
        with alone_at_start(runs):
            if databases.store == "sqlite":
                place("prefect", home(runs) / DATABASE)
                place("mlflow", runs / "mlflow.db")
            for name, start in (("prefect", _prefect), ("mlflow", _mlflow)):
                servers[name] = start(runs, ports[name], allowed, databases)
            for server in servers.values():
                server.wait_healthy()
        allowed.verify(**addresses)
        beside = ready(_write(note, servers, addresses, allowed, databases))
        while True:
            time.sleep(0.5)
            for server in servers.values():
                if server.look():
                    print(f"{server.what} ended; it is started again (its log is {server.log})", file=sys.stderr, flush=True)
                    _write(note, servers, addresses, allowed, databases)
    except KeyboardInterrupt:
        print("stopping both servers", file=sys.stderr)
    finally:
        note.unlink(missing_ok=True)
        if beside is not None:
            beside.kill()  # what it has not sent, the next command does
            beside.wait()
        for server in servers.values():
            server.stop()


def _write(
    note: Path, servers: dict[str, Server], addresses: dict[str, str], allowed: Access, databases: Databases
) -> dict[str, Any]:
    """Write down where the servers are and which processes they are."""
    facts: dict[str, Any] = {}
    for name, server in servers.items():
        facts[name] = {"address": addresses[name], **_process(server.process.pid)}
    facts["prefect"]["api"] = f"{addresses['prefect']}/api"
    facts |= {
        "up": _process(os.getpid()),
        "store": databases.store,
        "names": list(allowed.names),
        "credentials": allowed.prefect is not None,
    }
    write_json(note, facts)
    return facts


def _process(pid: int) -> dict[str, Any]:
    return {"pid": pid, "born": birth(pid)}


def _prefect(runs: Path, port: int, allowed: Access, databases: Databases) -> Server:
    environment = allowed.prefect_environment(server_environment(runs), port) | databases.prefect_environment()
    arguments, log = server_arguments(port, ui=True, host=allowed.host), runs / "servers" / "prefect.log"
    health, kept = f"{allowed.local(port)}/api/health", database(runs) if databases.prefect is None else databases.prefect
    return Server("the Prefect server", "prefect", arguments, environment, health, log, kept)


def _mlflow(runs: Path, port: int, allowed: Access, databases: Databases) -> Server:
    folder = runs / "servers"
    folder.mkdir(exist_ok=True)
    environment = allowed.mlflow_environment(server_environment(runs), port, databases, folder)
    arguments = ["server", "--artifacts-destination", str(runs / "mlartifacts"), "--host", allowed.host, "--port", str(port)]
    arguments += ["--workers", "1", *([] if allowed.mlflow is None else ["--app-name", "basic-auth"])]
    environment |= databases.mlflow_environment()
    # Its jobs (scorers of traces, gateway) are nothing that a run uses, and take eight more processes.
    environment.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    health, log = f"{allowed.local(port)}/health", folder / "mlflow.log"
    return Server("the MLflow server", "mlflow", arguments, environment, health, log, databases.mlflow)
