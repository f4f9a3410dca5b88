"""A stage's end of the pipe to vLLM's process: start it, ask it, notice when it dies or falls silent, leave nothing behind."""

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from stages.contract.errors import StageFailed, UserError
from stages.runtime import heartbeat
from stages.runtime.log_filter import filtered_log

MEND = "run `make vllm`, or name the interpreter with `rollout.vllm_python`"
END_S = 5.0
"""Seconds that the process has to end by itself."""
LAST_LINES, LAST_BYTES = 6, 8192
"""How much of the log's end an error quotes."""


class VllmProcess:
    """A process that speaks the protocol of `worker.py`."""

    def __init__(
        self, command: list[str], log: Path, *, start_s: float, silence_s: float, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it, without waiting for it. `log`: where its standard error goes, behind what is there.

        Raises UserError when the command cannot be run.
        """
        self._log, self._start_s, self._silence_s = log, start_s, silence_s
        self._buffer = b""
        self._hello: dict[str, Any] | None = None
        self._words = contextlib.ExitStack()
        errors = self._words.enter_context(filtered_log(log))
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, bufsize=0
            )
        except OSError as error:
            self._words.close()
            what = f"vLLM's interpreter cannot be run ({error.strerror})"
            raise UserError(what, where=command[0], mend=MEND) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ready(self) -> dict[str, Any]:
        """What it said of itself when its model was loaded; waits for that.

        Raises UserError when its environment has no vLLM, StageFailed when it dies or takes too long.
        """
        if self._hello is None:
            reply = self._reply(self._start_s, "rollout.start_s")
            if "unfit" in reply:
                self.close()
                raise UserError(f"vLLM cannot be imported ({reply['unfit']})", where=str(self._process.args[0]), mend=MEND)  # type: ignore[index]
            hello = reply.get("ready")
            if not isinstance(hello, dict):
                self.fail(f"vLLM's process began with `{str(reply)[:80]}`")
            self._hello = hello
        return self._hello

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a request, and give its replies as they come.

        Raises StageFailed when the process dies, says nothing for too long, or says what is not a reply.
        """
        self.begin(request)
        yield from self.replies()

    def begin(self, request: dict[str, Any]) -> None:
        """Send a request; what it replies is to be read with `replies` before the next."""
        self.ready()
        self._send(json.dumps(request).encode() + b"\n")

    def replies(self) -> Iterator[dict[str, Any]]:
        """The replies to what was begun, as they come."""
        while "done" not in (reply := self._reply(self._silence_s, "rollout.silence_s")):
            if "alive" not in reply:
                yield reply

    def close(self) -> None:
        """End the process: it ends itself when its pipe closes; what does not is killed."""
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._words.close()

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            while left:
                if not selector.select(self._silence_s):
                    self.fail(f"vLLM took no request for {self._silence_s:g} s (rollout.silence_s)")
                try:
                    left = left[os.write(self._stdin.fileno(), left) :]
                except BrokenPipeError:
                    self._gone()

    def _reply(self, limit_s: float, setting: str) -> dict[str, Any]:
        """The next line, within `limit_s` of the last sign of life."""
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.fail(f"vLLM said nothing for {limit_s:g} s ({setting})")
                part = os.read(self._stdout.fileno(), 1 << 16)
                if not part:
                    self._gone()
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        heartbeat.progress()
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            self.fail(f"vLLM's process said `{line[:80].decode(errors='replace')}`, which is no reply")
        return reply

    def _gone(self) -> NoReturn:
        self.close()
        self.fail(f"vLLM's process ended (status {self._process.returncode})")

    def fail(self, what: str) -> NoReturn:
        """End the process at once, and say what it last wrote."""
        self._process.kill()
        self.close()
        with self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        last = " | ".join([line.strip() for line in lines if line.strip()][-LAST_LINES:])
        raise StageFailed(f"{what}; its last lines: {last or 'none'}; all of them: {self._log}")
