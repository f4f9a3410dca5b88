"""Stages in running order, several at a time where none needs another.

One at a time they run in this thread. More than one have a thread each, so that this one stays free to hear a request to end;
it then tells the threads, each of which ends its own process tree, and waits for them.
"""

import contextlib
import contextvars
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from stages.contract.errors import Interrupted

END_SECONDS = 22.0
"""How long a request to end waits for the stages: their grace period and a little."""
_POLL_SECONDS = 0.5

Outcome = Exception | None


class Floor:
    """Who works at the moment, and whether they are to stop."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._lock, self._working = threading.Lock(), 0

    def check(self) -> None:
        """Raises Interrupted once all are to stop."""
        if self._stopped.is_set():
            raise Interrupted("stopped with the others")

    def pause(self, seconds: float) -> None:
        """Sleep so long, or until all are to stop, which raises Interrupted."""
        self._stopped.wait(seconds)
        self.check()

    def stopped(self) -> bool:
        """Whether all are to stop."""
        return self._stopped.is_set()

    def __enter__(self) -> None:
        """Begin work that has to be ended well. Raises Interrupted once all are to stop."""
        with self._lock:
            self.check()
            self._working += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._working -= 1

    def stop(self) -> None:
        """Ask all to stop, and wait until nobody works any more, at most `END_SECONDS`."""
        with self._lock:
            self._stopped.set()
        until = time.monotonic() + END_SECONDS
        while self._working and time.monotonic() < until:
            time.sleep(0.1)


def go_through(
    order: Sequence[str], needs: Mapping[str, set[str]], parallel: int, do: Callable[[str], Outcome], floor: Floor
) -> Outcome:
    """Do every stage of `order` once all that it needs and that is in `order` is done, at most `parallel` at a time.

    `do` returns the error that ended a stage, and raises what nobody foresaw. After the first error nothing new begins, and
    what runs comes to its end. Returns the first error. What interrupts this thread stops all and is raised.
    """
    if parallel == 1:
        return next((error for error in map(do, order) if error is not None), None)
    ended: queue.SimpleQueue[tuple[str, Outcome]] = queue.SimpleQueue()
    waiting, running, unforeseen = list(order), set[str](), list[BaseException]()
    first: Outcome = None

    def work(name: str) -> None:
        error: Outcome = None
        try:
            error = do(name)
        except BaseException as raised:  # noqa: BLE001 - it is raised by the thread that waits
            unforeseen.append(raised)
        ended.put((name, error))

    try:
        while not unforeseen and (running or (waiting and first is None)):
            while first is None and len(running) < parallel and (name := _ready(waiting, running, needs)) is not None:
                waiting.remove(name)
                running.add(name)
                context = contextvars.copy_context()  # Prefect keeps in it whose tasks these are
                threading.Thread(target=context.run, args=(work, name), daemon=True, name=f"stage-{name}").start()
            with contextlib.suppress(queue.Empty):  # a request to end is heard between two looks
                name, error = ended.get(timeout=_POLL_SECONDS)
                running.remove(name)
                first = first or error
    except BaseException:
        floor.stop()
        raise
    if unforeseen:
        floor.stop()
        raise unforeseen[0]
    return first


def _ready(waiting: Sequence[str], running: set[str], needs: Mapping[str, set[str]]) -> str | None:
    left = running.union(waiting)
    return next((name for name in waiting if not needs[name] & left), None)


def share(name: str, order: Sequence[str], needs: Mapping[str, set[str]], parallel: int) -> int:
    """How many stages, `name` among them, may run at once while it does: by so many the machine's cores are divided.

    It depends on the graph alone, not on what happens to run, so that a stage has the same threads, and the same bits, whenever
    it is taken up again.
    """
    others = sum(other != name and other not in needs[name] and name not in needs[other] for other in order)
    return min(parallel, 1 + others)
