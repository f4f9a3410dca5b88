"""Stages of one process on this machine, forked from a server that has their libraries loaded (`fork_server.py`).

Loading them takes several seconds of each stage that starts an interpreter of its own.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from flows.launch.launcher import Job
from flows.processes import MARK_VARIABLE, ProcessTree
from stages.runtime.log_filter import filtered_log

MODULES = (
    "torch",
    "transformers",
    "datasets",
    "stages.__main__",
    "stages.engine.deepspeed_engine",
    "stages.engine.packing.pack",
    "stages.evals.task",
    "stages.rl.train",
    "stages.rollout.sampled_check",
    "stages.supervised.train",
    "stages.kinds.curate",
    "stages.kinds.evaluate_model",
    "stages.kinds.rl",
    "stages.kinds.sft",
    "stages.kinds.summary",
)
"""What most stages load, directly or not."""
START_SECONDS = 120.0
"""How long the server may take to load. Stages wait for it so long; then they have interpreters of their own."""
LOOK_SECONDS = 1.0
"""Pause between two looks whether a server that does not answer still lives."""
END_SECONDS = 5.0
"""How long the status of a process that has ended may take to come."""


class ForkServer:
    """The server, for stages with one environment: libraries read it when they are loaded."""

    def __init__(self, environment: Mapping[str, str], log: Path, modules: tuple[str, ...] = MODULES) -> None:
        """Start it; `log`: what libraries write while they are loaded."""
        self.environment = dict(environment)
        self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "flows.launch.fork_server", str(other.fileno()), *modules]
        # A pipe, as a stage's own log is: a text stream that was made for a file does not work on a pipe.
        with filtered_log(log, wait_s=0) as file, other:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        self._lock, self._ready, self._loaded_by = threading.Lock(), False, time.monotonic() + START_SECONDS
        self._ended = dict[int, int]()
        self.used = False
        """Whether it was asked for a stage."""

    def start(
        self, folder: Path, arguments: list[str], mark: Path, log: IO[bytes], environment: Mapping[str, str] | None = None
    ) -> "Forked | None":
        """Fork a stage, by default with the server's environment; None when the server does not answer, for whatever reason."""
        environment = {**(self.environment if environment is None else environment), MARK_VARIABLE: str(mark)}
        request = json.dumps({"environment": environment, "folder": str(folder), "arguments": arguments}).encode()
        self.used = True
        with self._lock:
            try:
                if not self._ready:
                    self._connection.settimeout(max(0.1, self._loaded_by - time.monotonic()))
                    self._ready = bool(self._connection.recv(1024))
                if not self._ready:
                    return None
                self._connection.settimeout(LOOK_SECONDS)
                socket.send_fds(self._connection, [request], [log.fileno()])
                pid = self._forked()
            except OSError:
                return None
            return None if pid is None else Forked(self, pid, mark)

    def _forked(self) -> int | None:
        """The pid that the server answers; None when it is gone.

        While it lives it is waited for: it may have forked, and the stage must not run twice.
        """
        while True:
            try:
                data = self._connection.recv(1024)
            except TimeoutError:
                if self._process.poll() is None:
                    continue
                return None
            if not data:
                return None
            message = json.loads(data)
            if "status" not in message:
                return int(message["pid"])
            self._ended[message["pid"]] = message["status"]

    def status(self, pid: int) -> int | None:
        """Exit status of a stage (negative: a signal's number), None while it runs."""
        with self._lock:
            self._connection.setblocking(False)
            try:
                while pid not in self._ended and (data := self._connection.recv(1024)):
                    message = json.loads(data)
                    self._ended[message["pid"]] = message["status"]
            except BlockingIOError:
                pass
            except OSError:
                self._ready = False
            if pid not in self._ended and self._process.poll() is not None and not _runs(pid):
                return 1  # the server is gone, and the stage's status with it; what it left says how it ended
            return self._ended.get(pid)

    def stop(self) -> None:
        """End it. Stages that still run go on."""
        self._connection.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:  # still loading
            self._process.kill()
            self._process.wait()


class Forks:
    """The fork server of a run. It starts with the first stage, unless it was started before."""

    def __init__(self, log: Path, modules: tuple[str, ...] = MODULES) -> None:
        """`log`: of the server; `modules`: what it loads."""
        self._log, self._modules = log, modules
        self._lock = threading.Lock()
        self._server: ForkServer | None = None

    def start(self, job: Job, environment: Mapping[str, str], arguments: list[str], log: IO[bytes]) -> "Forked | None":
        """Fork a stage; None when it is to have an interpreter of its own."""
        server = self.load(environment)
        if not _loads_alike(server.environment, environment):
            return None
        forked = server.start(Path.cwd(), arguments, job.attempt, log, environment)
        if forked is None:
            job.note(f"the fork server does not answer (its log is {self._log}): the stage loads its libraries itself")
        return forked

    def load(self, environment: Mapping[str, str]) -> ForkServer:
        """Start the server, unless it was started; one that nothing has used makes way for another environment. Returns it."""
        with self._lock:
            if self._server is not None and not _loads_alike(self._server.environment, environment) and not self._server.used:
                self._server.stop()
                self._server = None
            if self._server is None:
                self._server = ForkServer(environment, self._log, self._modules)
            return self._server

    def stop(self) -> None:
        """End the server; stages that still run go on."""
        if self._server is not None:
            self._server.stop()


class Forked:
    """A stage that was forked."""

    def __init__(self, server: ForkServer, pid: int, mark: Path) -> None:
        self._server, self._pid = server, pid
        self._tree = ProcessTree(pid, mark=str(mark))

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._server.status(self._pid)

    def end(self, grace_s: float) -> None:
        """Ask, wait, kill."""
        self._tree.end(grace_s)
        until = time.monotonic() + END_SECONDS
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.02)


def _loads_alike(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether libraries load alike in two environments: MLflow's client, which this process loads meanwhile, sets its own."""
    return all(one.get(n) == other.get(n) for n in one.keys() | other.keys() if not n.startswith(("MLFLOW_", "_MLFLOW_")))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
