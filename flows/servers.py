"""`r1 up`: a Prefect server and an MLflow server on loopback, in the foreground, with separate databases in the runs folder."""

import sys
import time
from pathlib import Path
from typing import Any

import psutil

from flows.prefect_home import running_servers, server_arguments, server_environment
from flows.results import print_json
from flows.server_process import Server, demand_free
from stages.store.errors import ExitStatus, UserError
from stages.store.files import write_json
from stages.store.folders import Runs


def serve(runs: Runs, prefect_port: int, mlflow_port: int, *, as_json: bool) -> tuple[ExitStatus, None]:
    """Start both servers, say where they are, and run until asked to stop (Ctrl-C, SIGTERM). One that ends is started again.

    Raises UserError when a port is taken, StageFailed when a server doesn't start or ends again and again.
    """
    if running_servers(runs.path) is not None:
        raise UserError("the servers of this runs folder run already", where=str(runs.path / "servers.json"))
    demand_free(prefect_port, "--prefect-port")
    demand_free(mlflow_port, "--mlflow-port")
    if prefect_port == mlflow_port:
        raise UserError(f"port {mlflow_port} is named twice", where="--mlflow-port", mend="choose another port")
    note, servers = runs.path / "servers.json", dict[str, Server]()
    try:
        for name, start, port in (("prefect", _prefect, prefect_port), ("mlflow", _mlflow, mlflow_port)):
            servers[name] = start(runs.path, port)
        print("starting the Prefect server and the MLflow server …", file=sys.stderr)
        for server in servers.values():
            server.wait_healthy()
        addresses = {"prefect": f"http://127.0.0.1:{prefect_port}", "mlflow": f"http://127.0.0.1:{mlflow_port}"}
        facts = _write(note, servers, addresses)
        if as_json:
            print_json(facts)
        else:
            place = "" if runs.path == Path("runs").absolute() else f" --runs {runs.path}"
            print(f"Prefect  {addresses['prefect']}  (a worker: `r1 worker{place}`)", end="")
            print(f"\nMLflow   {addresses['mlflow']}\nCtrl-C stops both.", flush=True)
        while True:
            time.sleep(0.5)
            for server in servers.values():
                if server.look():
                    print(f"{server.what} ended; it is started again (its log is {server.log})", file=sys.stderr, flush=True)
                    _write(note, servers, addresses)
    except KeyboardInterrupt:
        print("stopping both servers", file=sys.stderr)
    finally:
        note.unlink(missing_ok=True)
        for server in servers.values():
            server.stop()
    return ExitStatus.DONE, None


def _write(note: Path, servers: dict[str, Server], addresses: dict[str, str]) -> dict[str, Any]:
    """Write down where the servers are and which processes they are."""
    facts: dict[str, Any] = {}
    for name, server in servers.items():
        pid = server.process.pid
        facts[name] = {"address": addresses[name], "pid": pid, "born": psutil.Process(pid).create_time()}
    facts["prefect"]["api"] = f"{addresses['prefect']}/api"
    write_json(note, facts)
    return facts


def _prefect(runs: Path, port: int) -> Server:
    arguments, log = server_arguments(port, ui=True), runs / "servers" / "prefect.log"
    health = f"http://127.0.0.1:{port}/api/health"
    return Server("the Prefect server", "prefect", arguments, server_environment(runs), health, log)


def _mlflow(runs: Path, port: int) -> Server:
    place = ["--backend-store-uri", f"sqlite:///{runs / 'mlflow.db'}", "--artifacts-destination", str(runs / "mlartifacts")]
    arguments = ["server", *place, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    health, log = f"http://127.0.0.1:{port}/health", runs / "servers" / "mlflow.log"
    return Server("the MLflow server", "mlflow", arguments, server_environment(runs), health, log)
