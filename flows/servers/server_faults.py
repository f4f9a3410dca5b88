"""Reasons for which a server of ours ends at its start, read from its log: each a line with a hint, not the name of a log."""

import re
from pathlib import Path

from stages.contract.errors import UserError

_FAULTS = (
    (
        r"Can't locate revision|out-of-date database schema",
        "its database was written by another version of it",
        "install that version again, or move {database} aside: it holds records of runs, no results",
    ),
    (
        r"file is not a database|database disk image is malformed|file is encrypted",
        "its database is damaged",
        "move {database} aside: it holds records of runs, no results",
    ),
    (
        r"No space left on device|database or disk is full|Disk quota exceeded",
        "no room is left on its disk (bytes or inodes: `df -h`, `df -i`)",
        "free some (`r1 gc --dry-run`), or use another runs folder",
    ),
    (
        r"attempt to write a readonly database|unable to open database file|Permission denied|Read-only file system",
        "it may not write its database",
        "make {database} and its folder writable, or use another runs folder",
    ),
    (
        r"address already in use",
        "another program has taken its port",
        "start again",
    ),
    (
        r"can't start new thread|Resource temporarily unavailable|Too many open files",
        "the limits of this user are too low for it",
        "raise them (`ulimit -n`, `ulimit -u`)",
    ),
)
"""Pattern in the log, what it means, what to do. The first that fits counts."""
_TAIL_BYTES = 1 << 16


def start_fault(server: str, log: Path, offset: int, database: str) -> UserError | None:
    """Return why a server ended at its start; None when its log does not say it in words that are known here.

    `server`: its name in messages; `log`: the file that its output goes to; `offset`: bytes of `log` that were there before
    this start; `database`: where it keeps its records, for the hint.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(offset, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    for pattern, meaning, hint in _FAULTS:
        if re.search(pattern, text):
            return UserError(f"{server} cannot start: {meaning}", where=str(log), mend=hint.format(database=database))
    return None
