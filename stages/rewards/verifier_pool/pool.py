"""Killable processes for verifiers: a request that hangs costs its limit and a copy of a process, nothing else."""

import atexit
import contextlib
import functools
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from stages.contract.errors import UserError
from stages.contract.secrets import without_keys
from stages.rewards.verifier_pool.user_fault import Fault
from stages.rewards.verifier_pool.worker import ENDED, MISTAKE, READY
from stages.runtime import heartbeat
from stages.runtime.platform import kill_group
from stages.store.user_code import VARIABLE, child_environment, inherited_code_folders

START_LIMIT_S = 120.0
"""Seconds a worker may take to start (imports); apart from the limits of a request."""
LONGEST_REPLY_BYTES = 1 << 20
"""Of a reply, unless the limits say otherwise: only a user's function writes a longer one."""
GRACE_S = 1.0
"""Seconds after the limit by the clock, when the process should have ended itself."""


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    cpu_s: float
    """Seconds of processor time: what a busy machine does not change."""
    wall_s: float
    """Seconds by the clock, for what waits instead of computing."""
    memory_bytes: int = 0
    """Address space that a process may take beside what loading the function took; 0: no limit."""
    reply_bytes: int = LONGEST_REPLY_BYTES
    """Bytes of a reply; a longer one is not read to its end."""


@dataclass(frozen=True)
class Reply:
    """What came back."""

    value: Any = None
    fault: str = ""
    """Why there is no value: `ended` (a limit, a crash), or what was raised."""


class Worker:
    """One process that serves one request at a time."""

    def __init__(self, function: str, limits: Limits, folders: Sequence[str] = ()) -> None:
        self.function, self.limits, self.folders = function, limits, folders
        self.copy: int | None = None
        """Process id of the copy that serves; it changes when one is ended."""
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer, self._number = bytearray(), 0

    def ask(self, arguments: Sequence[Any]) -> Reply:
        """The function's value; a fault when it raises, passes a limit or its process dies, and then there is a new one.

        Raises UserError when the function cannot be loaded.
        """
        process = self._running()
        self._number += 1
        deadline = time.monotonic() + self.limits.wall_s + GRACE_S
        if not self._send(process, json.dumps([self._number, list(arguments)]).encode() + b"\n", deadline):
            self.end()  # half a request is in the pipe, which the next one must not follow
            return Reply(fault=ENDED)
        line = self._line(process, deadline)
        while line is not None:
            if line.startswith(ENDED):
                self.copy = None  # the next request waits for the new one
                return Reply(fault=ENDED)
            if (reply := read_reply(line, self._number)) is not None:
                return reply
            line = self._line(process, deadline)
        if len(self._buffer) > self.limits.reply_bytes:
            self.end()  # the rest of the reply must not be taken for the next one
            return Reply(fault=f"a reply of more than {self.limits.reply_bytes} bytes")
        if self.copy is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.copy, signal.SIGKILL)
        self.copy = None
        return Reply(fault=ENDED)

    def end(self) -> None:
        """Kill the processes, if there are any."""
        if self._process is not None:
            kill_group(self._process.pid, signal.SIGKILL)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process.wait()
            self._process, self.copy, self._buffer = None, None, bytearray()

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, with a copy that serves."""
        for _ in range(2):  # where the first process has died, another one is started
            if self._process is None:
                self._process = self._started()
            if self.copy is not None or self._await_ready(self._process):
                return self._process
            self.end()
        what = f"the process of `{self.function}` does not start"
        raise RuntimeError(f"{what}; try `python -m stages.rewards.verifier_pool.worker {self.function} 5 5 0`")

    def _started(self) -> subprocess.Popen[bytes]:
        limits = self.limits
        numbers = [str(limits.cpu_s), str(limits.wall_s), str(limits.memory_bytes)]
        command = [sys.executable, "-m", "stages.rewards.verifier_pool.worker", self.function, *numbers]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # What a model or a user's module does there must not have the keys.
            env={**without_keys(child_environment()), VARIABLE: json.dumps(list(self.folders))},
            process_group=0,  # its copies die with it
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _await_ready(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + START_LIMIT_S
        while (line := self._line(process, min(deadline, time.monotonic() + 1.0))) is not None or (
            # Its pipe may stay open when it is dead, in a process that a function has started.
            process.poll() is None and time.monotonic() < deadline and len(self._buffer) <= self.limits.reply_bytes
        ):
            if line is None:
                continue
            word, _, rest = line.partition(" ")
            if word == MISTAKE:
                self.end()
                fault = Fault.from_json(rest)
                mend = f"write module:function, of a module in {' or '.join(self.folders)}, or of an installed package"
                if fault.file:
                    mend = "fix it there"
                what = f"`{self.function}` cannot be loaded ({fault.error})"
                raise UserError(what, where=fault.place or "rewards", mend=mend)
            if word == READY:
                self.copy = int(rest)
                return True
        return False

    def _send(self, process: subprocess.Popen[bytes], data: bytes, deadline: float) -> bool:
        """Whether all of it could be written before the deadline: a stopped process reads nothing."""
        assert process.stdin is not None
        pipe = process.stdin.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_WRITE)
            while data:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return False
                try:
                    data = data[os.write(pipe, data[: 1 << 16]) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    return False
        return True

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> str | None:
        """The next line, or None when the deadline passes, the process ends, or the longest reply is passed first."""
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            end = self._buffer.find(b"\n")
            while end < 0:
                if len(self._buffer) > self.limits.reply_bytes:
                    return None
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                part = os.read(pipe, 1 << 16)
                if not part:
                    return None
                searched = len(self._buffer)
                self._buffer += part
                end = self._buffer.find(b"\n", searched)
        line = self._buffer[:end].decode(errors="replace")
        del self._buffer[: end + 1]
        return line


def read_reply(line: str, number: int) -> Reply | None:
    """The reply to request `number` in a line; None for a reply to another request, and for what is no reply.

    A function can reach the pipe of the replies, so a line may hold anything.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(found, list) and len(found) == 3 and found[0] == number and isinstance(found[2], str)):
        return None
    return Reply(found[1], found[2])


class Pool:
    """Workers that share requests among them. Processes start with the first request and stay for the next ones."""

    def __init__(self, function: str, limits: Limits, processes: int = 2, folders: Sequence[str] | None = None) -> None:
        """`function`: `module:function`, called with JSON values; its module may have a `warm()`.

        `folders`: the code folders, which are last on the workers' `sys.path`; None: those of this process.
        """
        code_folders = inherited_code_folders() if folders is None else tuple(folders)
        self.workers = [Worker(function, limits, code_folders) for _ in range(processes)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._free.put(worker)

    def ask(self, requests: Sequence[Sequence[Any]]) -> list[Reply]:
        """A reply to each request, in order. Several threads may ask at once."""

        def one(arguments: Sequence[Any]) -> Reply:
            worker = self._free.get()
            heartbeat.progress()
            try:
                return worker.ask(arguments)
            finally:
                self._free.put(worker)

        with ThreadPoolExecutor(len(self.workers)) as threads:
            return list(threads.map(one, requests))

    def end(self) -> None:
        """Kill the processes."""
        for worker in self.workers:
            worker.end()


@functools.cache
def shared_pool(function: str, limits: Limits, processes: int) -> Pool:
    """The one pool of a function and its limits in this process; ended with it."""
    pool = Pool(function, limits, processes)
    atexit.register(pool.end)
    return pool
