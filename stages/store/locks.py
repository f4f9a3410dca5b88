"""A lock on a stage folder, so that two pipelines never work in the same one.

The lock itself is the operating system's (released when its owner dies, however it dies); a file beside it says who holds it.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator

from filelock import FileLock, Timeout

from stages.contract.errors import UserError
from stages.runtime.platform import lock_file
from stages.store.files import read_json, write_json
from stages.store.folders import StageFolder

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What such file systems answer."""


@contextlib.contextmanager
def hold(folder: StageFolder, waiting: Callable[[str], None], check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the folder's lock. While another owner has it, `waiting` is told once who, and this call waits.

    `check` is called every second of the wait, and may raise to end it. Raises UserError on a file system without locks,
    where two pipelines could not be kept apart.
    """
    lock, owner = FileLock(folder.lock), folder.path / ".owner.json"
    told = False
    while not lock.is_locked:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            _demand_locks(folder)
            lock.acquire(timeout=1.0 if told else 0.0)
        except Timeout:
            if not told:
                waiting(f"waiting for {folder.path.name}, held by {_owner(folder)}")
            told = True
            check()
        except FileNotFoundError:
            continue  # the folder was removed meanwhile (`r1 gc`): it is made anew
    try:
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def try_hold(folder: StageFolder) -> Iterator[bool]:
    """Hold the folder's lock while nobody else does; gives whether it is held. Nothing is made where there is no folder.

    Raises UserError on a file system without locks.
    """
    lock = FileLock(folder.lock)
    try:
        _demand_locks(folder)
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_held(folder: StageFolder) -> bool:
    """Whether another owner, in whichever process, holds the folder's lock now. Nothing is written."""
    try:
        with folder.lock.open("rb") as file:
            lock_file(file, exclusive=True)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _demand_locks(folder: StageFolder) -> None:
    """A file system that cannot lock looks to the library like one on which somebody else holds the lock for ever."""
    with (folder.path / ".lock-probe").open("w") as probe:
        try:
            lock_file(probe, exclusive=False)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            what = "this file system has no locks, so two pipelines could work in one folder at once"
            mend = "put the runs folder on another (`--set runs=FOLDER`)"
            raise UserError(what, where=str(folder.path), mend=mend) from error


def _owner(folder: StageFolder) -> str:
    try:
        owner = read_json(folder.path / ".owner.json")
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "another process"
