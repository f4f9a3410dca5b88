"""Errors of the operating system that a user can mend, in words: a full disk, a folder that may not be written, limits."""

import errno
import re
from collections.abc import Iterator

_FAULTS = {
    errno.ENOSPC: "no room is left on the disk{of} (bytes or inodes: `df -h`, `df -i`); free some, `r1 gc --dry-run` lists it",
    errno.EDQUOT: "the disk quota is used up{at}; free some, `r1 gc --dry-run` lists it",
    errno.EROFS: "the file system is read-only{at}; use another runs folder",
    errno.EACCES: "permission denied{at}; make it readable and writable for this user",
    errno.EPERM: "the operation is not permitted{at}; make it readable and writable for this user",
    errno.EIO: "the disk fails{at} (input/output error)",
    errno.EMFILE: "too many open files{at}; raise the limit (`ulimit -n 4096`)",
    errno.ENFILE: "too many open files on this machine{at}",
}
"""Error number -> what it means, and what to do."""
_TEXTS = (
    (re.compile(r"No space left on device|os error 28|database or disk is full"), errno.ENOSPC),
    (re.compile(r"Disk quota exceeded|os error 122"), errno.EDQUOT),
    (re.compile(r"Read-only file system|attempt to write a readonly database|os error 30"), errno.EROFS),
    (re.compile(r"Too many open files|os error 24"), errno.EMFILE),
)
"""How libraries in other languages (safetensors, SQLite, PyTorch's writer) say the same in texts of their own."""


def system_fault(error: BaseException) -> str | None:
    """Return what the operating system refused, and what to do, in one line; None for any other error.

    Looks also at the errors from which this one came: a library's own error often hides the reason.
    """
    for item in _chain(error):
        if isinstance(item, OSError) and item.errno in _FAULTS:
            place = str(item.filename) if item.filename is not None else ""
            return _FAULTS[item.errno].format(of=f" of {place}" if place else "", at=f" at {place}" if place else "")
        if isinstance(item, OSError):
            continue
        for pattern, number in _TEXTS:
            if pattern.search(str(item)):
                return _FAULTS[number].format(of="", at="")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those from which it came."""
    present: BaseException | None = error
    seen: set[int] = set()
    while present is not None and id(present) not in seen:
        seen.add(id(present))
        yield present
        present = present.__cause__ or present.__context__
