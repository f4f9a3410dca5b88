"""`r1 up`: a Prefect server and an MLflow server, in the foreground, each with a database of its own.

On loopback and with SQLite in the runs folder, unless the options say otherwise (`access.py`, `databases.py`).
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from flows.pipeline.unsent import send_in_background
from flows.process_birth import birth
from flows.runs.results import print_json
from flows.servers.access import Access, access
from flows.servers.databases import Databases, in_folder, in_postgres
from flows.servers.prefect_env import (
    DATABASE,
    alone_at_start,
    database,
    home,
    running_servers,
    server_arguments,
    server_environment,
)
from flows.servers.server_process import Server, demand_free
from stages.contract.errors import ExitStatus, UserError
from stages.store.empty_databases import place
from stages.store.files import write_json
from stages.store.folders import Runs


def up(options: argparse.Namespace) -> tuple[ExitStatus, dict[str, Any] | None]:
    """`r1 up`: serve until asked to stop (Ctrl-C, SIGTERM); with `--detach`, in a process of its own.

    Raises UserError when a port, an address, a name or a credential is not as it must be, StageFailed when a server doesn't
    start or ends again and again.
    """
    runs = Runs(Path(options.runs).absolute()).prepare()
    if running_servers(runs.path) is not None:
        raise UserError("the servers of this runs folder run already", where=str(runs.path / "servers.json"), mend="`r1 down`")
    allowed = access(options.host, options.allowed_hosts, asked=options.auth)
    demand_free(options.host, options.prefect_port, "--prefect-port")
    demand_free(options.host, options.mlflow_port, "--mlflow-port")
    if options.prefect_port == options.mlflow_port:
        raise UserError(f"port {options.mlflow_port} is named twice", where="--mlflow-port", mend="choose another port")
    databases = in_folder(runs.path)
    if options.postgres is not None:
        databases = in_postgres(options.postgres, options.prefect_database, options.mlflow_database)
    if options.detach:
        from flows.servers.detached import start

        return ExitStatus.DONE, start(options, runs.path)
    _serve(runs.path, {"prefect": options.prefect_port, "mlflow": options.mlflow_port}, allowed, databases, options.json)
    return ExitStatus.DONE, None


def _serve(runs: Path, ports: dict[str, int], allowed: Access, databases: Databases, as_json: bool) -> None:
    """Start both, say where they are, and look after them: one that ends is started again."""
    note, servers, sending = runs / "servers.json", dict[str, Server](), None
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
        facts = _write(note, servers, addresses, allowed, databases)
        if as_json:
            print_json(facts)
        else:
            print(told(facts, runs), "Ctrl-C stops both.", sep="\n", flush=True)
        sending = send_in_background(Runs(runs))
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
        if sending is not None:
            sending.kill()  # what it has not sent, the next command does
            sending.wait()
        for server in servers.values():
            server.stop()


def told(facts: dict[str, Any], runs: Path) -> str:
    """Where the servers of a runs folder are, for people."""
    place = "" if runs == Path("runs").absolute() else f" --runs {shlex.quote(str(runs))}"
    lines = [f"Prefect  {facts['prefect']['address']}  (a worker: `r1 worker{place}`)"]
    lines.append(f"MLflow   {facts['mlflow']['address']}")
    if facts["names"]:
        lines.append(f"from elsewhere, with the same ports: {', '.join(facts['names'])}")
    if facts["credentials"]:
        lines.append("both ask for the user and password of PREFECT_API_AUTH_STRING and MLFLOW_TRACKING_USERNAME/_PASSWORD")
    return "\n".join(lines)


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
