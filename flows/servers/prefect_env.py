"""Where Prefect keeps its things and which server a run talks to. Nothing here imports Prefect: its settings are read from
the environment when it is first imported, so the environment has to be right before.

In order: what the user chose; the server of `r1 up`; otherwise a server of the run's own, which ends with the run.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flows.processes import alive
from flows.servers.server_process import START_SECONDS, Server, free_port
from stages.store.empty_databases import place
from stages.store.files import read_json
from stages.tracking.default_uri import default_uri

DATABASE = "prefect.db"
"""Prefect's name for its SQLite database, in its home."""
_CHOSEN = ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")
_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(START_SECONDS)),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "DO_NOT_TRACK": "1",
}
# A run of its own needs no schedules: what is left records the run's states and events, and frees slots of killed runs.
_IDLE = ("SCHEDULER", "LATE_RUNS", "FOREMAN", "PAUSE_EXPIRATIONS", "CANCELLATION_CLEANUP", "TRIGGERS")


@contextlib.contextmanager
def prefect_server(runs: Path) -> Iterator[Callable[[], None]]:
    """Prepare the environment for importing Prefect. Call what is given before the first flow: it waits for the server.

    The server starts meanwhile, so that heavy imports cost no extra time; one that ends by itself is started again. Raises
    StageFailed when it doesn't start.
    """
    quiet = "PREFECT_LOGGING_LEVEL" not in os.environ
    known = point_at_server(runs)
    if quiet:
        # How a run ends is told once, by the command; Prefect's records keep their own account of it.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    if known:
        yield lambda: None
        return
    port = free_port()
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    log = home(runs) / "server.log"
    idle = {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in _IDLE}
    idle["PREFECT_API_BLOCKS_REGISTER_ON_START"] = "false"  # 2 s of computing; `r1 up`, which has pages, registers them
    arguments, environment = server_arguments(port, ui=False), {**server_environment(runs), **idle}
    health = f"http://127.0.0.1:{port}/api/health"
    with contextlib.ExitStack() as starting:
        starting.enter_context(alone_at_start(runs))
        place("prefect", home(runs) / DATABASE)
        server = Server("the Prefect server", "prefect", arguments, environment, health, log, database(runs))

        def wait() -> None:
            server.wait_healthy()
            starting.close()
            server.keep()

        try:
            yield wait
        finally:
            server.stop()


@contextlib.contextmanager
def alone_at_start(runs: Path) -> Iterator[None]:
    """Keep other runs of this runs folder from starting a server at the same time.

    A server makes or migrates its database when it starts, and of two that do so at once one fails. A lock that cannot be had
    in the time that a start may take (a file system without locks looks like one that is held) is said and done without.
    """
    home(runs).mkdir(parents=True, exist_ok=True)
    lock = FileLock(home(runs) / ".starting.lock")
    try:
        lock.acquire(timeout=START_SECONDS)
    except (Timeout, NotImplementedError):  # the latter: a file system without locks that says so
        print(f"r1: {lock.lock_file} cannot be locked; if a server does not start, try again", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def point_at_server(runs: Path) -> bool:
    """Set Prefect's environment to the server that the user chose or that `r1 up` runs; whether there is one of these."""
    chosen = any(os.environ.get(name) for name in _CHOSEN)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if chosen:
        return True
    os.environ["PREFECT_HOME"] = str(home(runs))
    running = running_servers(runs)
    if running is not None:
        os.environ["PREFECT_API_URL"] = running["prefect"]["api"]
    return running is not None


def home(runs: Path) -> Path:
    """Prefect's folder: its database and settings."""
    return runs / "prefect"


def database(runs: Path) -> str:
    """The files of Prefect's SQLite database, for messages: the write-ahead log beside it goes with it."""
    return f"{home(runs) / DATABASE}*"


def running_servers(runs: Path) -> dict[str, Any] | None:
    """What `r1 up` wrote for this runs folder, when its servers still run."""
    try:
        servers: dict[str, Any] = read_json(runs / "servers.json")
        living = all(alive(servers[name]["pid"], servers[name]["born"]) for name in ("prefect", "mlflow", "up"))
    except (OSError, ValueError, KeyError):
        return None
    return servers if living else None


def mlflow_server(runs: Path) -> str | None:
    """Address of the MLflow server that runs are to be recorded by; None: the database in the runs folder.

    In order: what the user chose (MLFLOW_TRACKING_URI), then the server of `r1 up`, if its records are not in this folder.
    """
    if chosen := os.environ.get("MLFLOW_TRACKING_URI"):
        return chosen
    servers = running_servers(runs)
    if servers is None or servers["store"] == "sqlite":
        return None
    address: str = servers["mlflow"]["address"]
    return address


def tracking_uri(chosen: str | None, runs: Path, earlier: str | None = None) -> str:
    """Where a run is recorded by MLflow.

    `chosen`: the recipe's `tracking.uri`; `earlier`: where a continued run was recorded. A file moves with the runs folder.
    """
    known = chosen or mlflow_server(runs)
    return known or (earlier if earlier and is_http(earlier) else default_uri(runs))


def servers_named(uri: str | None, runs: Path) -> bool:
    """Whether somebody names a server to record runs: the user, the recipe (`uri`: its `tracking.uri`), or `r1 up`."""
    chosen = any(os.environ.get(name) for name in (*_CHOSEN, "MLFLOW_TRACKING_URI"))
    return chosen or is_http(uri or "") or running_servers(runs) is not None


def is_http(uri: str) -> bool:
    """Whether a tracking URI is a server's, not a file's."""
    return uri.startswith(("http://", "https://"))


def server_arguments(port: int, *, ui: bool, host: str = "127.0.0.1") -> list[str]:
    """Arguments of `prefect` that start a server, on loopback unless told otherwise."""
    return ["--no-prompt", "server", "start", "--host", host, "--port", str(port), "--ui" if ui else "--no-ui"]


def server_environment(runs: Path) -> dict[str, str]:
    """The environment of a Prefect server that keeps its database in the runs folder."""
    own = {"PREFECT_HOME": str(home(runs)), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    # In memory, where Prefect keeps who holds which slots, a restart forgets it, and the slots are never free again.
    own["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] = "prefect.server.concurrency.lease_storage.filesystem"
    ours = ("PREFECT_API_URL", "PREFECT_LOGGING_LEVEL", "PREFECT_LOGGING_INTERNAL_LEVEL")
    inherited = {k: v for k, v in os.environ.items() if k not in ours}
    return {**inherited, **own}
