"""The one thread of a run that talks to MLflow. Nobody else waits for a server, and what it has to be told waits on disk.

A job is something MLflow has to be told, for example a stage from its run's creation to its end; it reads what there is to
say from the journal and the folder when it is called, so nothing is kept here. Jobs are called again and again, in the order
in which they came, until they say that they are done. While MLflow is away only a question without effect is asked of it:
whatever changes something is sent after it has answered that one, so an outage leaves at most one call of unknown outcome.
"""

import threading
import time
from collections.abc import Callable

from stages.contract.errors import UserError
from stages.tracking.mlflow.client import AWAY, reason

Job = Callable[[], bool]
"""Tells MLflow what there is to tell by now, and whether that was all there will be. Harmless to call again."""
POLL_SECONDS = 1.0
"""Pause between two looks at the journals."""
RETRY_SECONDS = 2.0
"""Pause between two attempts to reach an MLflow that is away. An attempt lasts MLFLOW_HTTP_REQUEST_TIMEOUT at most."""
TRIES = 3
"""Attempts after which the end of a run no longer waits for a job that fails although MLflow answers."""


class Sender:
    """Calls the jobs in the background. Only `wait` waits, and it looks up every second for signals."""

    def __init__(self, knock: Callable[[], object], note: Callable[[str], None]) -> None:
        """`knock`: asks MLflow something without effect, and raises one of `AWAY` when it does not answer.

        `note`: is told what a user should know of outages.
        """
        self.answers: bool | None = None
        """Whether MLflow answered when it was last called; None before the first call."""
        self.mistake: UserError | None = None
        """Why nothing more is sent at all: something only the user can mend."""
        self._knock, self._note = knock, note
        self._jobs: dict[str, Job] = {}
        self._failures: dict[str, int] = {}
        self._closed = False
        self._changed, self._due = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="mlflow")
        self._thread.start()

    def add(self, name: str, job: Job) -> None:
        """Have a job done after those that wait already. It takes the place of an earlier one of that name."""
        with self._changed:
            self._jobs.pop(name, None)
            self._jobs[name] = job
        self.wake()

    def close(self) -> None:
        """No job will come after those that wait; the thread ends with the last of them."""
        self._closed = True
        self.wake()

    def fall_silent(self) -> None:
        """Go on as long as this process lives, without a word: the run has said its last."""
        self._note = lambda _: None

    def wake(self) -> None:
        """There is something to tell."""
        self._due.set()

    def waiting(self) -> list[str]:
        """The jobs that still have something to tell."""
        with self._changed:
            return list(self._jobs)

    def settled(self) -> bool:
        """Whether everything has been told that MLflow takes."""
        with self._changed:
            return all(self._failures.get(name, 0) >= TRIES for name in self._jobs)

    def wait(self, until: Callable[[], bool], seconds: float, *, patient: bool = False) -> bool:
        """Wait for `until()`, at most `seconds`; returns whether it came. Unless `patient` not for an MLflow that is away."""
        deadline = time.monotonic() + seconds
        while not until() and self._thread.is_alive() and (patient or self.answers is not False):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            with self._changed:
                self._changed.wait(min(left, POLL_SECONDS))
        return until()

    def _run(self) -> None:
        while self.mistake is None and not (self._closed and not self._jobs):
            self._due.clear()
            try:
                if self.answers is False:
                    self._knock()
                    self._hears()
                for name, job in self._listed():
                    self._call(name, job)
            except AWAY as error:
                if self.answers is not False:
                    self._note(f"MLflow does not answer; its metrics wait on disk ({reason(error)})")
                self.answers = False
            except UserError as error:  # a deleted experiment, say
                self._note(str(error))
                self.mistake = error
            with self._changed:
                self._changed.notify_all()
            self._due.wait(POLL_SECONDS if self.answers else RETRY_SECONDS)

    def _listed(self) -> list[tuple[str, Job]]:
        with self._changed:
            return list(self._jobs.items())

    def _call(self, name: str, job: Job) -> None:
        try:
            done = job()
        except AWAY as error:
            self._knock()  # is it MLflow as a whole?
            self._hears()
            self._failures[name] = self._failures.get(name, 0) + 1
            if self._failures[name] == 1:
                self._note(f"MLflow did not take `{name}`; it is tried again ({reason(error)})")
            return
        self._hears()
        self._failures.pop(name, None)
        with self._changed:
            if done and self._jobs.get(name) is job:
                del self._jobs[name]

    def _hears(self) -> None:
        if self.answers is False:
            self._note("MLflow answers again; it is sent what waited")
        self.answers = True
