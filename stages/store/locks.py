"""A lock on a stage folder, so that two pipelines never work in the same one.

The lock itself is the operating system's (released when its owner dies, however it dies); a file beside it says who holds it.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

from filelock import FileLock, Timeout

from stages.store.files import read_json, write_json
from stages.store.folders import StageFolder


@contextlib.contextmanager
def hold(folder: StageFolder, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock. While another owner has it, `waiting` is told once who, and this call waits."""
    folder.path.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder.lock), folder.path / ".owner.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting(f"waiting for {folder.path.name}, held by {_owner(folder)}")
        lock.acquire()
    try:
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(folder: StageFolder) -> str:
    try:
        owner = read_json(folder.path / ".owner.json")
    except (OSError, ValueError):
        return "another process"
    return f"process {owner['pid']} on {owner['host']}"
