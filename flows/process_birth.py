"""Which process an id stands for: ids are used again, so that a record names the process's birth beside its id."""

from pathlib import Path

import psutil

START_FIELD = 22
"""Number of the field `starttime` in /proc/PID/stat, from 1."""


def birth(pid: int) -> str | float:
    """Return what no other process has: the boot's id and the clock ticks from boot to the process's start.

    Not a time of the wall clock: `psutil.Process.create_time()` moves with each correction of that clock, and a run that goes
    on would be taken for a dead one. Systems without /proc: that time. Raises psutil.NoSuchProcess.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        if Path("/proc/self/stat").exists():
            raise psutil.NoSuchProcess(pid) from error
        return psutil.Process(pid).create_time()
    # The second field is the program's name in parentheses, which may hold spaces and parentheses itself.
    return f"{boot} {stat.rpartition(')')[2].split()[START_FIELD - 3]}"


def alive(pid: int, born: str | float | None) -> bool:
    """Whether the process that had this id and this birth still runs. `born` is a number in records of earlier versions."""
    try:
        process = psutil.Process(pid)
        same = birth(pid) == born if isinstance(born, str) else born is None or abs(process.create_time() - born) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError, ValueError):
        return False
