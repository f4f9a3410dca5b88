"""Signs of life: each rank of a stage says that it lives, and that it gets on; the parent sees when either stops.

A thread touches `alive-rank<n>` in the attempt's folder every two seconds: it stops when the process is stopped, swapped out or
gone. `progress-rank<n>` is touched when the stage has done something since (a forward pass, a token, a chunk): ranks that wait
for each other for ever live, and do not get on. A rank may wait long for another that works, so a stage is silent only when
all are. The parent counts by its own clock from when it last saw a change: a laptop that slept is not taken for a hang.
A parent sees the folder of its own machine; what other machines do comes over the network (stages/engine/multi_node.py).
"""

import threading
import time
from pathlib import Path

PERIOD = 2.0
"""Seconds between signs."""

_progress = threading.Event()


def progress() -> None:
    """Say that the stage gets on. Cheap: called in the innermost loops."""
    _progress.set()


def start(attempt: Path, rank: int) -> None:
    """Give signs from this process until it ends."""

    def beat() -> None:
        while True:
            (attempt / f"alive-rank{rank}").touch()
            if _progress.is_set():
                _progress.clear()
                (attempt / f"progress-rank{rank}").touch()
            time.sleep(PERIOD)

    threading.Thread(target=beat, daemon=True, name="heartbeat").start()


def newest_progress(attempt: Path) -> int:
    """When a rank of this machine last got on, in ns of the file system's clock; 0 before the first time."""
    return max((path.stat().st_mtime_ns for path in attempt.glob("progress-rank*")), default=0)


class Watchdog:
    """The parent's eye on an attempt."""

    def __init__(self, attempt: Path, frozen_s: float, silent_s: float) -> None:
        """`frozen_s`: how long a rank may give no sign of life; `silent_s`: how long all may get nowhere."""
        self._attempt, self._frozen_s, self._silent_s = attempt, frozen_s, silent_s
        self._seen: dict[Path, tuple[int, float]] = {}
        """File -> its time of change, and when that was seen first, by this process's clock."""
        self._begun = time.monotonic()

    def complaint(self) -> str:
        """What is wrong, in a sentence; empty when all is well."""
        now = time.monotonic()
        for path in sorted(self._attempt.glob("alive-rank*")):
            if (age := self._age(path, now)) > self._frozen_s:
                rank = path.name.removeprefix("alive-")
                return f"{rank} has given no sign of life for {age:.0f} s (stopped, swapped out or frozen)"
        silent = min([now - self._begun, *(self._age(path, now) for path in self._attempt.glob("progress-*"))])
        if silent > self._silent_s:
            return f"no rank has got on for {silent:.0f} s (waiting for each other, or for something that never comes)"
        return ""

    def _age(self, path: Path, now: float) -> float:
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return 0.0
        if self._seen.get(path, (0, 0.0))[0] != changed:
            self._seen[path] = (changed, now)
        return now - self._seen[path][1]
