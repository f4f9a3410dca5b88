"""Functions that tests have called in worker processes."""

import contextlib
import os
import time
from pathlib import Path


def spin(seconds, _more=""):
    """Compute for so many seconds of processor time; -1 waits, -2 ends the process."""
    if seconds == -1:
        time.sleep(1000)
    if seconds == -2:
        os._exit(7)
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return "done"


def brevity(answer):
    """Minus the words of the text; nothing for an answer without a final one, and some that go wrong."""
    if "spin" in answer["text"]:
        spin(1e9)
    if "raise" in answer["text"]:
        raise ValueError(answer["text"])
    if "nan" in answer["text"]:
        return float("nan")
    return None if answer["answer"] is None else -len(answer["text"].split())


def told(answer):
    """Whether everything that is promised is there."""
    return float(sorted(answer) == ["answer", "metadata", "question", "reference", "text", "tokens", "truncated"])


def raising(answer):
    """Never a number."""
    raise ValueError(answer["question"])


def hold(mib):
    """Hold so many MiB for a moment."""
    return len(bytearray(mib << 20)) >> 20


def not_a_number(answer):
    """Never a number, without an error."""
    return f"good: {answer['question']}"


def raising_on_wrong_answers(answer):
    """A number for right answers alone."""
    if answer["answer"] != answer["reference"]:
        raise ValueError("wrong")
    return 0.0


def raising_on_right_answers(answer):
    """A number for some answers alone."""
    if answer["answer"] == answer["reference"]:
        raise ValueError("right")
    return 0.0


def write_and_return(line, times=1):
    """Write into the pipe of the replies, as no function should, then return a value."""
    replies = [fd for fd in range(3, 20) if _is_pipe(fd)]
    for descriptor in replies:
        with contextlib.suppress(OSError):  # the pipe of the requests cannot be written
            os.write(descriptor, line.encode() * times + b"\n")
    return "done"


def _is_pipe(descriptor):
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("pipe:")
    except OSError:
        return False


def long_value(size):
    """Return so many characters."""
    return "x" * size


def fork_and_return(value):
    """Return in two processes."""
    os.fork()
    return value
