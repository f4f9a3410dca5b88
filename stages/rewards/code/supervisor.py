"""The supervisor of one judged program: feeds it, reads no more than it may write, and ends the whole tree at a limit.

What a process cannot do to itself the kernel forbids it (address space, processor time, file size). What only shows over the
whole tree (resident memory, processes and threads, files) is looked at every few milliseconds from outside.
"""

import contextlib
import os
import select
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import IO, Literal

from stages.runtime.platform import descendants, kill_group, process_usage, root_folder

Stop = Literal["time", "answer time", "processor time", "memory", "processes", "output", "disk"]
"""What a program can be stopped by; `answer time`: what all runs of one answer have together."""

START_LIMIT_S = 30.0
"""Seconds that the sandbox and the interpreter may take until the program starts; not the program's own time."""
DEATH_LIMIT_S = 10
"""Seconds to wait for the death of a killed tree: a process may hang in the kernel, and the judge goes on."""
LOOK_S = 0.02
"""Seconds between two looks at the tree."""
STDERR_KEPT = 4096
"""Bytes of the end of the standard error."""
MOST_FILES = 10_000
"""Files in the temporary folder: an empty file takes memory too."""
_CHUNK = 1 << 16
_BY_LAST_LINE: dict[str, Stop] = {
    "MemoryError": "memory",
    "[Errno 12]": "memory",
    "can't start new thread": "processes",
    "[Errno 11]": "processes",
    "[Errno 27]": "disk",
    "[Errno 28]": "disk",
}


class SandboxFailed(Exception):
    """The sandbox did not come as far as starting the program; says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """Of the tree as a whole."""

    time_s: float
    """Wall-clock seconds from the start of the program."""
    cpu_s: int
    """Processor seconds of a process: known here to name what the kernel killed."""
    memory: int
    """Bytes resident."""
    processes: int
    """Processes and threads."""
    output: int
    """Bytes of standard output and standard error together."""


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    stdout: bytes
    stderr: str
    """Its end."""
    stop: Stop | None
    """The limit that stopped it, if one did."""
    code: int
    """Exit status; 128 + the signal's number when it was killed."""
    seconds: float
    """Wall-clock seconds from the start of the program."""


def cause(text: str) -> Stop | None:
    """The limit that an exception speaks of, from the last line of a traceback. A name only: no verdict depends on it."""
    last = (text.strip().splitlines() or [""])[-1]
    return next((stop for sign, stop in _BY_LAST_LINE.items() if sign in last), None)


class Supervisor:
    """Watches a started program to its end."""

    def __init__(self, process: subprocess.Popen[bytes], ready: int, stdin: bytes, limits: Limits, *, sandboxed: bool) -> None:
        """`ready`: the reading end of the pipe on which one byte says that the program starts."""
        self._process, self._ready, self._left, self._limits, self._sandboxed = process, ready, stdin, limits, sandboxed
        self._stdout, self._stderr, self._written = bytearray(), b"", 0
        self._started, self._begun, self._longest = False, 0.0, 0.0
        self._first: int | None = None
        self._deadline = time.monotonic() + START_LIMIT_S

    def watch(self) -> Ended:
        """The end of the program. When this returns, nothing of its tree runs any more (in the unsafe mode: of its group)."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        ended = os.pidfd_open(process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for pipe in (process.stdin, process.stdout, process.stderr):
                    os.set_blocking(pipe.fileno(), False)
                selector.register(process.stdin, selectors.EVENT_WRITE)
                for source in (process.stdout, process.stderr, self._ready, ended):
                    selector.register(source, selectors.EVENT_READ)
                stop = self._loop(selector, ended)
                seconds = time.monotonic() - self._begun
        finally:
            self._kill()
            os.close(ended)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        stderr = self._stderr.decode(errors="replace")
        if not self._started:
            said = " ".join(stderr.split())[-500:]
            raise SandboxFailed(said or f"the program did not start within {START_LIMIT_S:.0f} s (status {code})")
        killed_for_time = code == 128 + signal.SIGKILL and self._longest >= self._limits.cpu_s  # deaf to the first signal
        if stop is None and (code == 128 + signal.SIGXCPU or killed_for_time):
            stop = "processor time"
        if stop is None and code == 1:
            stop = cause(stderr)
        return Ended(bytes(self._stdout), stderr, stop, code, seconds)

    def _loop(self, selector: selectors.BaseSelector, ended: int) -> Stop | None:
        """Until the program ends by itself, or a limit is passed."""
        look = 0.0
        while True:
            events = selector.select(LOOK_S)
            for key, _ in events:
                if key.fd == ended:
                    return self._drain()
                if key.fd == self._ready:
                    self._started = os.read(self._ready, 1) == b"r"
                    selector.unregister(self._ready)
                    self._first = self._first_process()
                    self._begun = time.monotonic()
                    self._deadline = self._begun + self._limits.time_s
                elif key.fileobj is self._process.stdin:
                    self._feed(selector)
                elif not self._read(key.fd):
                    selector.unregister(key.fileobj)
            if self._written > self._limits.output:
                return "output"
            now = time.monotonic()
            if now > self._deadline:
                return "time"
            if self._started and now >= look:
                look = now + LOOK_S
                if (stop := self._look()) is not None:
                    return stop

    def _first_process(self) -> int | None:
        """A descriptor of the first process of the namespace; None when it is over already."""
        with contextlib.suppress(ProcessLookupError):
            if self._sandboxed and (tree := descendants(self._process.pid)):
                return os.pidfd_open(tree[0])
        return None

    def _feed(self, selector: selectors.BaseSelector) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            self._left = self._left[os.write(stdin.fileno(), self._left[:_CHUNK]) :] if self._left else b""
        except BrokenPipeError:  # it does not want to read
            self._left = b""
        if not self._left:
            selector.unregister(stdin)
            stdin.close()

    def _read(self, descriptor: int) -> bool:
        """Read what lies there, up to the limit; False at the end."""
        assert self._process.stdout is not None
        try:
            part = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return True
        self._written += len(part)
        if descriptor == self._process.stdout.fileno():
            self._stdout += part
        else:
            self._stderr = (self._stderr + part)[-STDERR_KEPT:]
        return bool(part)

    def _drain(self) -> Stop | None:
        """What the program wrote last. Its tree is gone, so the pipes hold no more than their buffers."""
        pipes: list[IO[bytes] | None] = [self._process.stdout, self._process.stderr]
        for pipe in pipes:
            assert pipe is not None
            before = -1
            while before != self._written <= self._limits.output:
                before = self._written
                self._read(pipe.fileno())
        return "output" if self._written > self._limits.output else None

    def _look(self) -> Stop | None:
        """The limit that the tree as a whole passes now, if any."""
        resident = threads = 0
        tree = descendants(self._process.pid)
        for pid in tree if self._sandboxed else [self._process.pid, *tree]:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                usage = process_usage(pid)
                self._longest = max(self._longest, usage.cpu_s)
                threads += usage.threads
                resident += usage.resident
        if threads - self._sandboxed > self._limits.processes:  # its first process is not the program's
            return "processes"
        if resident > self._limits.memory:
            return "memory"
        if self._sandboxed and tree:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for folder in ("tmp", "dev/shm"):
                    space = os.statvfs(root_folder(tree[0]) / folder)
                    if space.f_files - space.f_ffree > MOST_FILES:
                        return "disk"
        return None

    def _kill(self) -> None:
        """End the tree. With its first process a namespace dies, and is waited for; without one, the group has to do."""
        if not self._sandboxed:
            kill_group(self._process.pid, signal.SIGKILL)
            return
        if self._first is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
            death = select.poll()  # it dies after all others of its namespace
            death.register(self._first, select.POLLIN)
            death.poll(DEATH_LIMIT_S * 1000)
            os.close(self._first)
        self._process.kill()
