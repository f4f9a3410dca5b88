"""A process that has the libraries of stages loaded and starts each stage by a fork, so that only one process loads them.

`python -m flows.launch.fork_server SOCKET MODULE…` loads the modules and then takes requests from the socket (a descriptor
that it inherits, which keeps messages apart): a JSON object with `environment`, `folder` (the working directory) and
`arguments` of `python -m stages`, and the descriptor of the log. It answers `{"pid": …}`, and later `{"pid": …, "status": …}`.
It ends when the other end of the socket is closed. It computes nothing itself: a library that has started threads before a
fork would not work after it.
"""

import gc
import importlib
import json
import os
import select
import socket
import sys
from typing import Any, NoReturn

from stages.runtime.python_switches import SWITCHES, restart_without_switches

WAIT_SECONDS = 0.1
"""Pause between two looks for stages that have ended."""
LONGEST = 1 << 17
"""Bytes of a request."""


def main() -> int:
    """Load, then serve until the other end is closed."""
    restart_without_switches()
    connection = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a stage would copy the pages of everything that is shared
    connection.send(b"{}")
    while True:
        ready, _, _ = select.select([connection], [], [], WAIT_SECONDS)
        if ready:
            data, descriptors, _, _ = socket.recv_fds(connection, LONGEST, 1)
            if not data:
                return 0
            if (pid := os.fork()) == 0:
                connection.close()
                _become_stage(json.loads(data), descriptors[0])
            os.close(descriptors[0])
            _say(connection, {"pid": pid})
        for pid, status in _ended():
            _say(connection, {"pid": pid, "status": os.waitstatus_to_exitcode(status)})


def _say(connection: socket.socket, message: dict[str, int]) -> None:
    try:
        connection.send(json.dumps(message).encode())
    except OSError:  # the pipeline is gone; the stages see that too
        os._exit(0)


def _ended() -> list[tuple[int, int]]:
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def _become_stage(request: dict[str, Any], log: int) -> NoReturn:
    """Be the process that `python -m stages` with these arguments would be."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    os.environ.clear()
    os.environ.update({name: value for name, value in request["environment"].items() if name not in SWITCHES})
    os.chdir(request["folder"])
    from stages.__main__ import main as run

    sys.argv = ["stages", *request["arguments"]]
    status = 1
    try:
        status = run(request["arguments"])
    finally:  # whatever it raises: nothing of the server's must go on in this process
        if (error := sys.exc_info()[1]) is not None:
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
