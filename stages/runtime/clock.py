"""Where a step's time goes: named spans that add up to it.

Time inside a span counts for the innermost one, so that nothing counts twice; a `whole` span keeps what is inside it. Time in
no span counts for `REST`, so that nothing is lost. A lap is what has passed since the last one, so what comes after a step's
line in the journal is in the next step's.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

REST = "prepare"
"""What time in no span counts for."""


class Clock:
    """Spans of one thread."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """`now`: seconds from any moment on."""
        self._now = now
        self._spent: dict[str, float] = {}
        self._open: list[tuple[str, bool]] = []
        self._began = self._marked = now()

    @contextlib.contextmanager
    def span(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """Count what passes inside for `name`."""
        if self._open and self._open[-1][1]:  # inside of a whole span
            yield
            return
        self._mark()
        self._open.append((name, whole))
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def lap(self) -> dict[str, float]:
        """Seconds of each span since the last lap, and of all together as `step`; starts the next."""
        self._mark()
        found = {**self._spent, "step": self._marked - self._began}
        self._spent, self._began = {}, self._marked
        return found

    def _mark(self) -> None:
        now = self._now()
        name = self._open[-1][0] if self._open else REST
        self._spent[name] = self._spent.get(name, 0.0) + now - self._marked
        self._marked = now


clock = Clock()
"""This process's."""
