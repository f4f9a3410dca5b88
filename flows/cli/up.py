"""`r1 up` and `r1 down`: the servers of Prefect and MLflow.

On loopback and with SQLite in the runs folder, unless the options say otherwise (flows/servers/access.py, databases.py).
"""

import argparse
import shlex
import subprocess
from pathlib import Path
from typing import Any

from flows.cli.run import Answer
from flows.output import print_json
from flows.pipeline.unsent import send_in_background
from flows.servers.access import access
from flows.servers.databases import in_folder, in_postgres
from flows.servers.detached import start, stop
from flows.servers.prefect_env import running_servers
from flows.servers.serve import serve
from flows.servers.server_process import demand_free
from stages.contract.errors import ExitStatus, UserError
from stages.store.folders import Runs

_OPTIONS = ("host", "allowed_hosts", "prefect_port", "mlflow_port", "postgres", "prefect_database", "mlflow_database")


def up(options: argparse.Namespace) -> Answer:
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
        facts = start(_arguments(options), runs.path)
        if not options.json:
            print(told(facts, runs.path), f"`r1 down --runs {shlex.quote(options.runs)}` stops both.", sep="\n")
        return ExitStatus.DONE, facts

    def ready(facts: dict[str, Any]) -> subprocess.Popen[bytes] | None:
        if options.json:
            print_json(facts)
        else:
            print(told(facts, runs.path), "Ctrl-C stops both.", sep="\n", flush=True)
        return send_in_background(runs)

    serve(runs.path, {"prefect": options.prefect_port, "mlflow": options.mlflow_port}, allowed, databases, ready)
    return ExitStatus.DONE, None


def _arguments(options: argparse.Namespace) -> list[str]:
    """The options of this `r1 up`, for another."""
    given = {name: getattr(options, name) for name in _OPTIONS}
    chosen = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return [*(["--auth"] if options.auth else []), *chosen]


def down(options: argparse.Namespace) -> Answer:
    """`r1 down`: end the `r1 up` of this runs folder, wherever it was started, with its servers.

    Raises UserError when there is none, StageFailed when it doesn't end.
    """
    runs = Path(options.runs).absolute()
    servers = running_servers(runs)
    if servers is None:
        raise UserError("no servers of this runs folder run", where=str(runs), mend="`r1 up` starts them")
    stopped = stop(servers)
    if not options.json:
        print("both servers are stopped")
    return ExitStatus.DONE, {"stopped": stopped}


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
