"""A process and all that came from it: asked to stop, waited for, killed whole."""

import contextlib
import signal

import psutil

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
