"""A process and all that came from it: asked to stop, waited for, killed whole."""

import contextlib
import signal

import psutil

from stages.runtime.platform import start_of_process

MARK_VARIABLE = "R1_ATTEMPT"
"""In the environment of every process of a stage: the attempt's folder, by which all of its tree is found."""


class ProcessTree:
    """A process and all that came from it, also what crossed into other process groups, as torchrun's ranks do."""

    def __init__(self, pid: int, *, mark: str | None = None, launcher: bool = False) -> None:
        """`mark`: value of `MARK_VARIABLE` in the tree's environment, by which orphans are found too.

        `launcher`: the stage's ranks are the children of `pid`, not `pid` itself.
        """
        self._pid, self._mark, self._launcher = pid, mark, launcher

    def end(self, grace_s: float) -> None:
        """Ask the ranks to stop, wait for them, and kill what is left, whatever interrupts the waiting."""
        members = self._members()
        try:
            # Only the ranks are asked: their own helpers (verifiers, say) are needed until the checkpoint is whole.
            asked = [process for process in members if process.pid == self._pid or self._is_rank(process)]
            for process in asked:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGTERM)
            psutil.wait_procs(asked, timeout=grace_s)
        finally:
            left = {*members, *self._members()}
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(list(left), timeout=5.0)

    def _members(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._pid)
            found = [root, *root.children(recursive=True)]
        known = {process.pid for process in found}
        return found + [p for p in psutil.process_iter() if p.pid not in known and self._is_marked(p)]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return self._mark is not None and process.environ().get(MARK_VARIABLE) == self._mark
        except (psutil.Error, OSError):  # ended meanwhile, or another user's
            return False

    def _is_rank(self, process: psutil.Process) -> bool:
        try:
            return self._launcher and process.ppid() == self._pid
        except psutil.Error:
            return False


def birth(pid: int) -> str | float:
    """Return what no other process has: the boot's id and the clock ticks from boot to the process's start.

    Not a time of the wall clock: `psutil.Process.create_time()` moves with each correction of that clock, and a run that goes
    on would be taken for a dead one. Systems without /proc: that time. Raises psutil.NoSuchProcess.
    """
    try:
        start = start_of_process(pid)
    except ProcessLookupError as error:
        raise psutil.NoSuchProcess(pid) from error
    return psutil.Process(pid).create_time() if start is None else start


def alive(pid: int, born: str | float | None) -> bool:
    """Whether the process that had this id and this birth still runs. `born` is a number in records of earlier versions."""
    try:
        process = psutil.Process(pid)
        same = birth(pid) == born if isinstance(born, str) else born is None or abs(process.create_time() - born) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError, ValueError):
        return False
