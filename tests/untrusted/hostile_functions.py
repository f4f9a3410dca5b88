"""A reward function that does what a worker's process must survive, by the name of the deed."""

import os
import signal
import sys
import time


def reward(answer):
    """Do what the text says; 1.0 for everything else."""
    deed = answer["text"] if isinstance(answer, dict) else answer
    return DEEDS[deed]() if deed in DEEDS else 1.0


def _fork():
    if os.fork() == 0:
        return 2.0  # a second process goes on in the worker's loop
    return 1.0


def _fork_and_wait():
    if os.fork() == 0:
        time.sleep(600)
    return 1.0


def _close_everything():
    os.closerange(0, 64)
    return 1.0


def _write(line):
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, line)
        except OSError:
            continue
    return 1.0


def _unprintable():
    class Strange(Exception):
        def __str__(self):
            raise ValueError("no text")

    raise Strange


def _nested():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


def _deaf():
    for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)


DEEDS = {
    "print": lambda: print('[1, 1.0, ""]\n' * 1000, flush=True) or 1.0,
    "print to stdout's descriptor": lambda: os.write(1, b"5\n" * 1000) and 1.0,
    "exit": lambda: sys.exit(0),
    "exit with a text": lambda: sys.exit("\x1b[2J"),
    "exit at once": lambda: os._exit(0),
    "exit as at the end of the input": lambda: os._exit(79),
    "interrupt": lambda: signal.raise_signal(signal.SIGINT),
    "abort": os.abort,
    "stop": lambda: signal.raise_signal(signal.SIGSTOP),
    "kill the parent": lambda: os.kill(os.getppid(), signal.SIGKILL) or 1.0,
    "fork": _fork,
    "fork and wait": _fork_and_wait,
    "close everything": _close_everything,
    "read the input": lambda: float(len(sys.stdin.buffer.read()) == 0),
    "close the input": lambda: os.close(0) or 1.0,
    "write a number": lambda: _write(b"5\n"),
    "write null": lambda: _write(b"null\n"),
    "write an object": lambda: _write(b'{"a": 1}\n'),
    "write brackets": lambda: _write(b"[" * 100_000 + b"\n"),
    "write a reply to another request": lambda: _write(b'[999, 7.0, ""]\n'),
    "write ready": lambda: _write(b"ready x\n"),
    "write bytes": lambda: _write(b"\xff\xfe\x00\n"),
    "surrogates": lambda: "\ud800" * 100,
    "100 MB": lambda: "x" * 100_000_000,
    "100 MB without end": lambda: [_write(b"x" * 1_000_000) for _ in range(100)],
    "bytes": lambda: b"\xff",
    "huge integer": lambda: 10**400,
    "integer too long to print": lambda: 10**5000,
    "not a number": lambda: float("nan"),
    "infinity": lambda: float("-inf"),
    "nested": _nested,
    "an object": object,
    "an error without a text": _unprintable,
    "an error with surrogates": lambda: (_ for _ in ()).throw(ValueError("\ud800\x1b[2J\n" * 1000)),
    "recursion": lambda: DEEDS["recursion"](),
    "memory": lambda: bytearray(1 << 40),
    "wait": lambda: time.sleep(600),
    "ignore the timers": _deaf,
}
