"""Killable processes for math-verify: an answer that hangs costs its limit and its worker, nothing else."""

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from stages.problems.episode import Verdict
from stages.rewards.math_worker import READY
from stages.store import heartbeat

START_LIMIT_S = 120.0
"""Seconds a worker may take to start (imports); apart from the limit of an answer."""
_VERDICTS: dict[str, Verdict] = {"right": "right", "wrong": "wrong", "none": "none"}


class Worker:
    """One process that judges one pair at a time."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def judge(self, reference: str, answer: str) -> Verdict:
        """The verdict; `none` when the worker does not answer within the limit or dies, and then a new one is started."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.end()
            return "none"
        line = self._read_line(process, self.limit_s)
        if line is None or line not in _VERDICTS:
            self.end()
            return "none"
        return _VERDICTS[line]

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # an unsent pair in its buffer
                        pipe.close()
            self._process.wait()
            self._process, self._buffer = None, b""

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-m", "stages.rewards.math_worker", str(self.limit_s)]
            root = str(Path(__file__).parents[2])
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            if self._read_line(self._process, START_LIMIT_S) != READY:
                self.end()
                raise RuntimeError("the process of math-verify does not start; try `python -m stages.rewards.math_worker 5`")
        return self._process

    def _read_line(self, process: subprocess.Popen[bytes], limit_s: float) -> str | None:
        """The next line, or None when the limit passes or the process ends first."""
        assert process.stdout is not None
        stdout: IO[bytes] = process.stdout
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                part = os.read(stdout.fileno(), 4096)
                if not part:
                    return None
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()


class MathPool:
    """Workers that share the pairs among them. Processes start with the first pair and stay for the next ones."""

    def __init__(self, limit_s: float, processes: int = 2) -> None:
        self._workers = [Worker(limit_s) for _ in range(processes)]

    def judge(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        """A verdict per (reference, answer), in order. Equal pairs are judged once."""
        distinct = list(dict.fromkeys(pairs))
        free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            free.put(worker)

        def one(pair: tuple[str, str]) -> Verdict:
            worker = free.get()
            heartbeat.progress()
            try:
                return worker.judge(*pair)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(len(self._workers)) as threads:
            verdicts = dict(zip(distinct, threads.map(one, distinct), strict=True))
        return [verdicts[pair] for pair in pairs]

    def end(self) -> None:
        """Kill the processes."""
        for worker in self._workers:
            worker.end()
