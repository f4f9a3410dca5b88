"""Sides as processes that take turns."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.launch.local import WAITING

ROOT = Path(__file__).resolve().parents[2]

GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that name a process group."""
Turn = dict[str, Any]
"""What a side says after a turn: seconds, peak_mib, and more of its own."""


class SideFailed(Exception):
    """A side's process ended, or said what it should not have."""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Spec:
    """How to start a side."""

    subject: str
    """Module of tests/bench."""
    side: str
    """Name in that module's SIDES."""
    options: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    """Threads of each process; all cores by default."""
    processes: int = 1
    """More than one: under torchrun."""
    python: str = sys.executable
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables besides."""

    def command(self) -> list[str]:
        """The command line."""
        worker = ["-m", "tests.bench.worker", self.subject, self.side, json.dumps(self.options)]
        if self.processes == 1:
            return [self.python, *worker]
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        return [self.python, "-m", "torch.distributed.run", f"--nproc_per_node={self.processes}", *rendezvous, *worker]

    def environment(self) -> dict[str, str]:
        """As stages are launched, and offline."""
        threads = str(self.threads or cores())
        return {
            # Of a process group that the parent may have joined, nothing goes on.
            **{name: value for name, value in os.environ.items() if name not in GROUP},
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            **WAITING,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **self.variables,
        }


class Side:
    """A side's process, as its parent sees it."""

    def __init__(self, spec: Spec, log: Path) -> None:
        """Start it and wait until it is ready.

        Raises SideFailed when it ends before.
        """
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                spec.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=spec.environment(),
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )
        try:
            self.ready = self._answer()
        except BaseException:
            self.end()
            raise

    def go(self) -> Turn:
        """Let it work once. Raises SideFailed when it ends instead."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer()

    def end(self) -> None:
        """End it and all that it has started."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # this is how a worker learns that there is no further turn
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answer(self) -> Turn:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: Turn = json.loads(line)
                return found
        raise self._failure()

    def _failure(self) -> SideFailed:
        status = self._process.wait()
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return SideFailed(f"ended with status {status}: {lines[-1] if lines else ''} ({self._log})")


def once(spec: Spec, log: Path) -> Turn:
    """Start a side, let it work once, end it."""
    with contextlib.closing(_Ended(Side(spec, log))) as held:
        return held.side.go()


@dataclass
class _Ended:
    side: Side

    def close(self) -> None:
        self.side.end()


def rounds(specs: Mapping[str, Spec], count: int, logs: Path) -> tuple[dict[str, Turn], dict[str, list[Turn]]]:
    """Start all sides, let each work once uncounted, then `count` times in turn: A B A B …

    Returns what each side said when it was ready, and its turns. Raises SideFailed.
    """
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name, spec in specs.items():  # one after the other: they would slow each other down
            sides[name] = stack.enter_context(contextlib.closing(_Ended(Side(spec, logs / f"{_file(name)}.log")))).side
        for side in sides.values():
            side.go()
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        for _ in range(count):
            for name, side in sides.items():
                turns[name].append(side.go())
        return {name: side.ready for name, side in sides.items()}, turns


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
