"""A stage's process tree: started, followed through its journal, ended whole, and its outcome read.

The stage runs in a session of its own, so that a terminal's Ctrl-C reaches only the parent, which then gives the child
`grace_s` seconds to write a checkpoint. Whatever ends the parent's wait, nothing of the tree is left running.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

import flows
from stages.__main__ import PARENT_VARIABLE
from stages.store.config import Compute
from stages.store.errors import ExitStatus, UserError
from stages.store.files import read_json, write_json
from stages.store.folders import StageFolder
from stages.store.heartbeat import Watchdog
from stages.store.log_filter import filtered_log
from stages.tracking.journal import Follower, Line

ROOT = Path(flows.__file__).resolve().parents[1]
"""Where the packages `flows` and `stages` lie."""
GRACE_SECONDS = 20.0
"""A Prefect worker kills 30 s after it asked; a checkpoint has to be whole before."""
MARK_VARIABLE = "R1_ATTEMPT"
"""In the environment of every process of a stage: the attempt's folder, by which all of its tree is found."""
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}
"""A thread that waits spins for a moment, then sleeps. Sleeping at once made PyTorch's decoding 1.3 times as slow on an idle
machine (SmolLM2-135M, two threads); spinning on makes a busy one 2 to 3 times as slow."""
_POLL_SECONDS = 0.3
_STATUS = {
    "done": ExitStatus.DONE,
    "mistake": ExitStatus.MISTAKE,
    "failed": ExitStatus.FAILED,
    "interrupted": ExitStatus.INTERRUPTED,
}
_TELLING = (ExitStatus.MISTAKE, ExitStatus.FAILED, ExitStatus.INTERRUPTED)
"""When ranks ended differently, the first of these says why: the others only lost their peer."""


@dataclass(frozen=True)
class Outcome:
    """How one attempt of a stage ended."""

    status: ExitStatus
    message: str
    mend: str
    attempt: Path
    """The attempt's folder, with log.txt."""


def launch(
    folder: StageFolder,
    compute: Compute,
    grace_s: float = GRACE_SECONDS,
    on_line: Callable[[Line], None] = lambda _: None,
    *,
    command: list[str] | None = None,
) -> Outcome:
    """Run one attempt of the stage whose config lies in `folder`, and wait for its end.

    `on_line` gets every journal line as it comes. `command` replaces the stage's own command (the attempt's folder is
    appended). An exception in this process (a signal, say) ends the tree within about `grace_s` and then goes on.
    """
    attempt = folder.new_attempt()
    journal, started = Follower(folder.journal), time.monotonic()
    arguments = [*command, str(attempt)] if command else _command(folder, attempt, compute.processes)
    with filtered_log(attempt / "log.txt") as log:
        child = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**_environment(compute), MARK_VARIABLE: str(attempt)},
            start_new_session=True,
        )
        tree = ProcessTree(child.pid, mark=str(attempt), launcher=compute.processes > 1)
        watchdog, complaint = Watchdog(attempt, compute.frozen_s, compute.silent_s), ""
        try:
            while child.poll() is None and not complaint:
                with contextlib.suppress(UserError):  # a damaged journal of an earlier attempt: the stage is about to mend it
                    for line in journal.new_lines():
                        on_line(line)
                time.sleep(_POLL_SECONDS)
                complaint = watchdog.complaint()
        finally:
            # What hangs does not hear; its newest whole checkpoint stands.
            tree.end(0.0 if complaint else grace_s)
            status = child.wait()
            outcome = read_outcome(attempt, status)
            if complaint and outcome.status is not ExitStatus.DONE:
                outcome = Outcome(ExitStatus.FAILED, f"{complaint}; it was ended", "r1 resume", attempt)
            if outcome.status is not ExitStatus.DONE:
                seconds = round(time.monotonic() - started, 3)
                write_json(attempt / "ended.json", {"seconds": seconds, "status": int(outcome.status)})
    with contextlib.suppress(UserError):  # what a stage that failed has left unmended is its next attempt's to mend
        for line in journal.new_lines():
            on_line(line)
    return outcome


def _command(folder: StageFolder, attempt: Path, processes: int) -> list[str]:
    stage = ["-m", "stages", str(folder.path), "--attempt", str(attempt)]
    if processes == 1:
        return [sys.executable, *stage]
    # Through a file: the launcher's own servers would listen on every address of the machine, and unpickle what comes.
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", "--local-addr=127.0.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *rendezvous, *stage]


def _environment(compute: Compute) -> dict[str, str]:
    threads = str(compute.threads or max(1, cores() // compute.processes))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        PARENT_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **{name: os.environ.get(name, value) for name, value in WAITING.items()},
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the ranks meet at a store of their own (`engine.ranks`)
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        # The child keeps the working folder, from which relative paths in the configuration start; a folder called
        # `stages` there must not hide ours.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_outcome(attempt: Path, exit_status: int) -> Outcome:
    """What the ranks of an attempt left; an attempt that left nothing has failed."""
    own = attempt / "outcome.json"
    # Rank 0's word comes first where it is as telling as another's.
    files = [*([own] if own.exists() else []), *sorted(attempt.glob("outcome-rank*.json"))]
    found = [(_STATUS.get(item["status"], ExitStatus.FAILED), item) for item in map(_told, files) if item]
    if own.exists() and found and found[0][0] is ExitStatus.DONE:
        return Outcome(ExitStatus.DONE, "", "", attempt)
    for wanted in _TELLING:
        for status, item in found:
            if status is wanted:
                return Outcome(status, item["message"], item["mend"], attempt)
    ending = f"signal {-exit_status}" if exit_status < 0 else f"status {exit_status}"
    message = f"the process ended with {ending} without saying why"
    if exit_status == -signal.SIGKILL:
        message = "the process was killed (signal 9): by hand, or by the system for lack of memory"
    return Outcome(ExitStatus.FAILED, message, f"see the last lines of {attempt / 'log.txt'}", attempt)


def _told(path: Path) -> dict[str, str]:
    """What a rank left; nothing when it cannot be read."""
    try:
        item = read_json(path)
        return {key: str(item[key]) for key in ("status", "message", "mend")}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


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
