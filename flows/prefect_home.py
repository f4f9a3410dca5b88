"""Where Prefect keeps its things and which server a run talks to. Nothing here imports Prefect: its settings are read from
the environment when it is first imported, so the environment has to be right before.

In order: what the user chose; the server of `r1 up`; otherwise a server of the run's own, which ends with the run.
"""

import contextlib
import http
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flows import watched
from stages.store.errors import StageFailed, UserError
from stages.store.files import read_json

START_SECONDS = 120.0
"""A server on a fresh home migrates its database first; on two busy cores that has taken half a minute."""
_CHOSEN = ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")
_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(START_SECONDS)),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
}
# A run of its own needs no schedules: what is left records the run's states and events.
_IDLE = ("SCHEDULER", "LATE_RUNS", "FOREMAN", "PAUSE_EXPIRATIONS", "CANCELLATION_CLEANUP", "REPOSSESSOR", "TRIGGERS")


@contextlib.contextmanager
def prefect_server(runs: Path) -> Iterator[Callable[[], None]]:
    """Prepare the environment for importing Prefect. Call what is given before the first flow: it waits for the server.

    The server starts meanwhile, so that heavy imports cost no extra time. Raises StageFailed when it doesn't start.
    """
    quiet = "PREFECT_LOGGING_LEVEL" not in os.environ
    known = point_at_server(runs)
    if quiet:
        # How a run ends is told once, by the command; Prefect's records keep their own account of it.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    if known:
        yield lambda: None
        return
    port = free_port()
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    log = home(runs) / "server.log"
    idle = {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in _IDLE}
    server = start_module("prefect", server_arguments(port, ui=False), {**server_environment(runs), **idle}, log)
    try:
        yield lambda: wait_healthy(server, f"http://127.0.0.1:{port}/api/health", "the Prefect server", log)
    finally:
        stop(server)


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


def running_servers(runs: Path) -> dict[str, Any] | None:
    """What `r1 up` wrote for this runs folder, when its servers still run."""
    from flows.record import alive

    try:
        servers: dict[str, Any] = read_json(runs / "servers.json")
        living = all(alive(servers[name]["pid"], servers[name]["born"]) for name in ("prefect", "mlflow"))
    except (OSError, ValueError, KeyError):
        return None
    return servers if living else None


def server_arguments(port: int, *, ui: bool) -> list[str]:
    """Arguments of `prefect` that start a server on loopback."""
    return ["--no-prompt", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--ui" if ui else "--no-ui"]


def server_environment(runs: Path) -> dict[str, str]:
    """The environment of a Prefect server that keeps its database in the runs folder."""
    own = {"PREFECT_HOME": str(home(runs)), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("PREFECT_API_URL", "PREFECT_LOGGING_LEVEL")}
    return {**inherited, **own}


def start_module(module: str, arguments: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start `python -m module arguments` in a session of its own; it ends when this process does. Output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(watched.__file__).resolve()), str(os.getpid()), module, *arguments]
    safe = {**environment, "PYTHONSAFEPATH": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=safe, start_new_session=True)


def wait_healthy(server: subprocess.Popen[bytes], url: str, what: str, log: Path) -> None:
    """Wait until `url` answers. Raises StageFailed when the server ends or stays silent."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            raise StageFailed(f"{what} ended at its start (status {server.returncode}); its log is {log}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - always a loopback http address
                if answer.status == http.HTTPStatus.OK:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise StageFailed(f"{what} did not answer within {START_SECONDS:.0f} s; its log is {log}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server and all that it started."""
    from flows.launch import ProcessTree

    ProcessTree(server.pid).end(10.0)
    server.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def demand_free(port: int, option: str) -> None:
    """Raises UserError when somebody listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"port {port} cannot be used ({reason})", where=option, mend="choose another port") from error
