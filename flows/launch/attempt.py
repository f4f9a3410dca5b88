"""An attempt of a stage: started by its launcher, followed through its journal, ended whole, and its outcome read.

The stage runs in a session of its own, so that a terminal's Ctrl-C reaches only the parent, which then gives the child
`grace_s` seconds to write a checkpoint. Whatever ends the parent's wait, nothing of the tree is left running.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from flows.launch import kubernetes, local, slurm
from flows.launch.forked import Forks
from flows.launch.launcher import Job, Running, launcher_of, log_name
from stages.contract.config import Compute
from stages.contract.errors import ExitStatus, UserError
from stages.runtime.heartbeat import Watchdog
from stages.runtime.log_filter import filtered_log
from stages.store.files import read_json, write_json
from stages.store.folders import StageFolder
from stages.tracking.journal import Follower, Line

GRACE_SECONDS = 20.0
"""A Prefect worker kills 30 s after it asked; a checkpoint has to be whole before."""
_POLL_SECONDS = 0.1
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
    note: Callable[[str], None] = lambda _: None,
    command: list[str] | None = None,
    share: int = 1,
    variables: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
    attempt: Path | None = None,
    node: int = 0,
    forks: Forks | None = None,
) -> Outcome:
    """Run one attempt of the stage whose config lies in `folder`, and wait for its end.

    `on_line` gets every journal line as it comes, `note` what else the user should know. `command` replaces the stage's own
    command (the attempt's folder is appended). `share`: stages that may run at once, by which the cores are divided;
    `variables`: more of the environment. `attempt`: its folder, by default a new one; `node`: number of this machine;
    `forks`: what may fork the stage. An exception in this process (a signal, say, or one that `check`, which is called all the
    time, raises) ends the tree within about `grace_s` and then goes on.
    """
    if attempt is None:
        attempt = folder.new_attempt(node)
    else:  # whose signs of an earlier start would be taken for this one's
        for old in (path for name in ("outcome", "alive-", "progress-") for path in attempt.glob(f"{name}*")):
            old.unlink()
    journal, started = Follower(folder.journal), time.monotonic()
    with filtered_log(attempt / log_name(compute)) as log:
        child = start(Job(folder, attempt, compute, node, command, share, variables or {}, note, forks), log)
        watchdog, complaint = Watchdog(attempt, compute.frozen_s, compute.silent_s), ""
        try:
            while child.poll() is None and not complaint:
                with contextlib.suppress(UserError):  # a damaged journal of an earlier attempt: the stage is about to mend it
                    for line in journal.new_lines():
                        on_line(line)
                time.sleep(_POLL_SECONDS)
                check()
                complaint = watchdog.complaint()
        finally:
            # What hangs does not hear; its newest whole checkpoint stands.
            child.end(0.0 if complaint else grace_s)
            status = child.poll()
            status = -signal.SIGKILL if status is None else status
            outcome = read_outcome(attempt, status, first_rank=node * compute.processes, complaint=complaint)
            if outcome.status is not ExitStatus.DONE:
                seconds = round(time.monotonic() - started, 3)
                write_json(attempt / "ended.json", {"seconds": seconds, "status": int(outcome.status)})
    with contextlib.suppress(UserError):  # what a stage that failed has left unmended is its next attempt's to mend
        for line in journal.new_lines():
            on_line(line)
    return outcome


def read_outcome(attempt: Path, exit_status: int, first_rank: int = 0, complaint: str = "") -> Outcome:
    """What the ranks of an attempt left; an attempt that left nothing has failed.

    `first_rank`: the first rank of the machine whose attempt it is; `complaint`: why it was ended, which a rank that failed
    before knows better.
    """
    own = attempt / ("outcome.json" if first_rank == 0 else f"outcome-rank{first_rank}.json")
    # Its word comes first where it is as telling as another's.
    files = [*([own] if own.exists() else []), *sorted(set(attempt.glob("outcome*.json")) - {own})]
    found = [(_STATUS.get(item["status"], ExitStatus.FAILED), item) for item in map(_told, files) if item]
    if own.exists() and found and found[0][0] is ExitStatus.DONE:
        return Outcome(ExitStatus.DONE, "", "", attempt)
    for wanted in _TELLING:
        for status, item in found:
            if status is wanted and not (complaint and wanted is ExitStatus.INTERRUPTED):
                return Outcome(status, item["message"], item["mend"], attempt)
    if complaint:
        return Outcome(ExitStatus.FAILED, f"{complaint}; it was ended", "r1 resume", attempt)
    ending = f"signal {-exit_status}" if exit_status < 0 else f"status {exit_status}"
    message = f"the process ended with {ending} without saying why"
    if exit_status == -signal.SIGKILL:
        message = "the process was killed (signal 9): by hand, or by the system for lack of memory"
    told = max((path for path in attempt.glob("*log*") if path.stat().st_size), default=attempt / "log.txt")
    return Outcome(ExitStatus.FAILED, message, f"see the last lines of {told}", attempt)


def _told(path: Path) -> dict[str, str]:
    """What a rank left; nothing when it cannot be read."""
    try:
        item = read_json(path)
        return {key: str(item[key]) for key in ("status", "message", "mend")}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def start(job: Job, log: IO[bytes]) -> Running:
    """Start an attempt; what its launcher says goes to `log`.

    Raises UserError when the launcher cannot work here.
    """
    match launcher_of(job.compute):
        case "kubernetes":
            return kubernetes.start(job, log)
        case "slurm":
            return slurm.start(job, log)
        case "local":
            return local.start(job, log)
