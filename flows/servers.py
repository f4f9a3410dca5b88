"""`r1 up`: a Prefect server and an MLflow server on loopback, in the foreground, with separate databases in the runs folder."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from flows.prefect_home import (
    demand_free,
    running_servers,
    server_arguments,
    server_environment,
    start_module,
    stop,
    wait_healthy,
)
from flows.results import print_json
from stages.store.errors import ExitStatus, StageFailed, UserError
from stages.store.files import write_json
from stages.store.folders import Runs


def serve(runs: Runs, prefect_port: int, mlflow_port: int, *, as_json: bool) -> tuple[ExitStatus, None]:
    """Start both servers, say where they are, and run until asked to stop (Ctrl-C, SIGTERM).

    Raises UserError when a port is taken, StageFailed when a server doesn't start or ends by itself.
    """
    if running_servers(runs.path) is not None:
        raise UserError("the servers of this runs folder run already", where=str(runs.path / "servers.json"))
    demand_free(prefect_port, "--prefect-port")
    demand_free(mlflow_port, "--mlflow-port")
    if prefect_port == mlflow_port:
        raise UserError(f"port {mlflow_port} is named twice", where="--mlflow-port", mend="choose another port")
    note, started = runs.path / "servers.json", {}
    try:
        started = {"prefect": _prefect(runs.path, prefect_port), "mlflow": _mlflow(runs.path, mlflow_port)}
        print("starting the Prefect server and the MLflow server …", file=sys.stderr)
        addresses = {"prefect": f"http://127.0.0.1:{prefect_port}", "mlflow": f"http://127.0.0.1:{mlflow_port}"}
        for name, path in (("prefect", "/api/health"), ("mlflow", "/health")):
            wait_healthy(started[name], addresses[name] + path, f"the {name} server", _log(runs.path, name))
        facts: dict[str, Any] = {name: _facts(server, addresses[name]) for name, server in started.items()}
        facts["prefect"]["api"] = f"{addresses['prefect']}/api"
        write_json(note, facts)
        if as_json:
            print_json(facts)
        else:
            print(f"Prefect  {addresses['prefect']}  (a worker: PREFECT_API_URL={facts['prefect']['api']} ", end="")
            print(f"prefect worker start --pool r1)\nMLflow   {addresses['mlflow']}\nCtrl-C stops both.", flush=True)
        _watch(started, runs.path)
    except KeyboardInterrupt:
        print("stopping both servers", file=sys.stderr)
    finally:
        note.unlink(missing_ok=True)
        for server in started.values():
            stop(server)
    return ExitStatus.DONE, None


def _watch(servers: dict[str, subprocess.Popen[bytes]], runs: Path) -> None:
    while True:
        for name, server in servers.items():
            if server.poll() is not None:
                raise StageFailed(f"the {name} server ended (status {server.returncode}); its log is {_log(runs, name)}")
        time.sleep(0.5)


def _log(runs: Path, name: str) -> Path:
    return runs / "servers" / f"{name}.log"


def _facts(server: subprocess.Popen[bytes], address: str) -> dict[str, Any]:
    return {"address": address, "pid": server.pid, "born": psutil.Process(server.pid).create_time()}


def _prefect(runs: Path, port: int) -> subprocess.Popen[bytes]:
    return start_module("prefect", server_arguments(port, ui=True), server_environment(runs), _log(runs, "prefect"))


def _mlflow(runs: Path, port: int) -> subprocess.Popen[bytes]:
    place = ["--backend-store-uri", f"sqlite:///{runs / 'mlflow.db'}", "--artifacts-destination", str(runs / "mlartifacts")]
    arguments = ["server", *place, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return start_module("mlflow", arguments, server_environment(runs), _log(runs, "mlflow"))
