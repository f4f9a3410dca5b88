"""Servers as processes of their own. One that ends by itself is started again, on the port it had, so that its
clients see no more than a short outage.
"""

import errno
import http
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from flows.servers import exit_with_parent
from flows.servers.server_faults import start_fault
from stages.contract.errors import StageFailed, UserError
from stages.runtime.log_filter import filtered_log
from stages.runtime.platform import kill_group
from stages.store.user_code import child_environment

START_SECONDS = 120.0
"""A server on a fresh home migrates its database first; on two busy cores that has taken half a minute."""
LOG_SECONDS = 2.0
"""How long the last lines of a server that has ended may take to its log."""
RESTARTS = 5
"""After so many new starts a server is let go: what ends it will not go away."""


class Server:
    """A Python module that serves, and whatever process takes its place."""

    def __init__(
        self,
        what: str,
        module: str,
        arguments: list[str],
        environment: Mapping[str, str],
        health: str,
        log: Path,
        database: str = "its database",
    ) -> None:
        """Start it.

        `what`: its name in messages; `health`: an address that answers when it is ready; `database`: where it keeps its
        records.
        """
        self.what, self.log, self.database = what, log, database
        self._logged = log.stat().st_size if log.exists() else 0
        self._command = (module, arguments, environment)
        self._health, self._left = health, RESTARTS
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self.process = start_module(*self._command, log)

    def wait_healthy(self) -> None:
        """Wait until it answers.

        Raises UserError when it ends for a reason that its log names, StageFailed when it ends or stays silent.
        """
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if (status := self.process.poll()) is not None:
                if (fault := self._fault()) is not None:
                    raise fault
                raise StageFailed(f"{self.what} ended at its start (status {status}); its log is {self.log}")
            try:
                with urllib.request.urlopen(self._health, timeout=5) as answer:  # noqa: S310 - always an http address of ours
                    if answer.status == http.HTTPStatus.OK:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.2)
        raise StageFailed(f"{self.what} did not answer within {START_SECONDS:.0f} s; its log is {self.log}")

    def _fault(self) -> UserError | None:
        """Why it ended; the filter of its log may still write the last lines."""
        until = time.monotonic() + LOG_SECONDS
        while (fault := start_fault(self.what, self.log, self._logged, self.database)) is None and time.monotonic() < until:
            time.sleep(0.1)
        return fault

    def look(self) -> bool:
        """Start it again if it has ended; returns whether it had.

        Raises StageFailed when it has ended too often.
        """
        with self._lock:
            status = self.process.poll()
            if status is None or self._stopped.is_set():
                return False
            if not self._left:
                raise StageFailed(f"{self.what} ended (status {status}); its log is {self.log}")
            self._left -= 1
            kill_group(self.process.pid, signal.SIGKILL)  # what it started still holds the port
            self.process = start_module(*self._command, self.log)
        return True

    def keep(self) -> None:
        """Look after it in the background until it is stopped."""
        threading.Thread(target=self._keep, daemon=True, name="keep-server").start()

    def _keep(self) -> None:
        try:
            while not self._stopped.wait(1.0):
                self.look()
        except StageFailed:
            return  # whoever needs it will say that it does not answer

    def stop(self) -> None:
        """End it for good, with all that it started."""
        from flows.processes import ProcessTree

        self._stopped.set()
        with self._lock:
            ProcessTree(self.process.pid).end(10.0)
            self.process.wait()


def start_module(module: str, arguments: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start `python -m module arguments` in a session of its own; it ends when this process does. Output goes to `log`."""
    command = [sys.executable, str(Path(exit_with_parent.__file__).resolve()), str(os.getpid()), module, *arguments]
    safe = child_environment(environment, ours=False)
    with filtered_log(log, wait_s=0) as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=safe, start_new_session=True)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def demand_free(host: str, port: int, option: str) -> None:
    """Raises UserError when `host` is none of this machine's addresses, or somebody listens on the port already."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError) as error:
        raise UserError(f"`{host}` is no address ({error})", where="--host", mend="for example 127.0.0.1") from error
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"`{host}` is not an address of this machine", where="--host") from error
            raise UserError(
                f"port {port} cannot be used ({error.strerror})", where=option, mend="choose another port"
            ) from error
