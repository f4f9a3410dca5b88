"""One side of a comparison, in a process of its own: `python -m tests.bench.worker SUBJECT SIDE OPTIONS`.

So its peak memory is its own, and two libraries' thread pools never meet. The process loads, says that it is ready, and then
does the work once for every line `go` on its standard input; while the other side works it waits there. Nothing but the
standard library is imported here: the same file runs under the interpreter of a peer that has an environment of its own.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

MIB = 2**20


def alone(item: Any) -> list[Any]:
    """What all ranks say, when there is one."""
    return [item]


class Turns:
    """The worker's end of the pipe."""

    def __init__(self, channel: TextIO) -> None:
        self._channel, self._said_ready, self._started = channel, False, 0.0
        self.settings: dict[str, Any] = {}
        """How this side was set up; set before the first turn, shown with the results."""
        self.gather: Callable[[Any], list[Any]] = alone
        """Every rank's item on every rank; to be set by a side of several processes, of which the first talks."""

    @property
    def main(self) -> bool:
        """Whether this is the process that talks."""
        return os.environ.get("RANK", "0") == "0"

    def wait(self) -> bool:
        """Wait for the next turn; False when there is none any more."""
        if not self._said_ready:
            self._said_ready = True
            resident = sum(self.gather(memory("VmRSS")))  # weights that are mapped from a file count once they are read
            forget_peak()
            self._say({"ready": True, "resident_mib": resident, "settings": self.settings})
        go = bool(self.gather(sys.stdin.readline() if self.main else "")[0])
        self._started = time.perf_counter()
        return go

    def done(self, **found: Any) -> None:
        """The turn is over; `found` goes along with its seconds."""
        peak = sum(self.gather(memory("VmHWM")))  # ranks meet, so the seconds are those of the slowest
        self._say({"seconds": time.perf_counter() - self._started, "peak_mib": peak, **found})

    def each(self, work: Callable[[], dict[str, Any] | None]) -> None:
        """Do `work` at every turn."""
        while self.wait():
            self.done(**(work() or {}))

    def _say(self, item: dict[str, Any]) -> None:
        if self.main:
            self._channel.write(json.dumps(item) + "\n")
            self._channel.flush()


def memory(field: str) -> float:
    """This process's memory in MiB: `VmRSS` now, `VmHWM` the most since `forget_peak`.

    Where there is no /proc it is the most ever. (Linux hands ru_maxrss down to children, so it is no measure of them.)
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (MIB if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Let the peak begin anew: loading a model may take more than working with it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> None:
    """Run a side until its standard input ends."""
    subject, side, options = sys.argv[1:]
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    importlib.import_module(f"tests.bench.{subject}").SIDES[side](json.loads(options), Turns(channel))


if __name__ == "__main__":
    main()
