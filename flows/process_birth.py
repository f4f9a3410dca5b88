"""Which process an id stands for: ids are used again, so that a record names the process's birth beside its id."""

import psutil

from stages.runtime.platform import start_of_process


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
