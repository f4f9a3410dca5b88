"""Logs of processes go through a small process that redacts secrets: whatever writes there, Python, a library in C, a child.

`python -m stages.runtime.log_filter VARIABLE…` copies standard input to standard output. It outlives whoever started it and
ends with the last process that writes to it, so that neither a dying child nor a killed pipeline loses a line.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stages.contract.secrets import Secrets, declared

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 1 << 16
"""Bytes after which a line that does not end is written in parts, the last `KEPT` of which wait for what follows."""
KEPT = 4096


@contextlib.contextmanager
def filtered_log(log: Path, *, wait_s: float = 5.0) -> Iterator[IO[bytes]]:
    """A pipe for a process's output, which is appended to `log` without secrets.

    At the end the filter is given `wait_s` seconds to write the last lines; what still writes then goes on being filtered.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-S", "-m", "stages.runtime.log_filter", *declared()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    with log.open("ab") as file:
        # A session of its own: a terminal's Ctrl-C asks the others to end, whose last words are wanted.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    assert process.stdin is not None
    try:
        with process.stdin:
            yield process.stdin
    finally:
        if wait_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)


def main() -> None:
    """Copy until nobody writes any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    secrets, held = Secrets(os.environ, frozenset(sys.argv[1:])), b""
    while chunk := os.read(0, LONGEST):
        held += chunk
        whole = max(held.rfind(b"\n"), held.rfind(b"\r")) + 1
        if not whole and len(held) > LONGEST:
            whole = len(held) - KEPT
        _write(secrets, held[:whole])
        held = held[whole:]
    _write(secrets, held)


def _write(secrets: Secrets, text: bytes) -> None:
    left = secrets.redact(text.decode(errors="surrogateescape")).encode(errors="surrogateescape")
    with contextlib.suppress(OSError):  # a full disk: whoever writes to us must not be held up by it
        while left:
            left = left[os.write(1, left) :]


if __name__ == "__main__":
    main()
