"""The process in which a verifier runs: a request per line in, a reply per line out, each by a function with JSON arguments.

A guard by SIGALRM, as math-verify has one, works in a main thread only, and does not interrupt one long operation on big
integers. Here the kernel ends whatever goes on for too long: timers whose signals nobody handles. The first process has
imported the verifier and used it once (`warm`); copies of it (fork) do the work, so that a new one costs milliseconds where
an import and cold parser tables cost seconds.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import psutil

from stages.contract.errors import UserError
from stages.rewards.answers.plain_number import plain_number
from stages.rewards.verifier_pool.user_fault import Fault, fault_of
from stages.runtime.platform import limit_address_space
from stages.store.user_code import check_not_hidden, inherited_code_folders, use_code_folders

READY, ENDED, MISTAKE = "ready", "ended", "mistake"
"""First words of what is told between replies: a copy is there (with its process id), one has ended, there can be none."""

INPUT_OVER = 79
"""Exit status of a copy that has read the input to its end. Not 0, with which a function may exit."""

Called = Callable[..., Any]


def main(function: str, cpu_s: float, wall_s: float, memory_bytes: int) -> int:
    """Answer the lines of standard input until it ends.

    `function`: `module:function`; limits of each request: seconds of processor time and of the clock; bytes of address space
    that a process may take beside what it has taken when the function is loaded and warm, 0 for no limit.
    """
    requests, told = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what libraries print must not be taken for a reply
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor may a function that reads standard input take a request
    _tell(told, "")  # ends a line that a sitecustomize.py has begun there
    logging.disable(logging.WARNING)
    use_code_folders(inherited_code_folders())
    try:
        called = load(function)
        if (warm := getattr(sys.modules[called.__module__], "warm", None)) is not None:
            warm()
    except BaseException as error:  # noqa: BLE001 - a user's module may do anything when it is imported, `sys.exit()` too
        fault = Fault(str(error)) if isinstance(error, UserError) else fault_of(error)
        _tell(told, f"{MISTAKE} {fault.as_json()}")
        return 2
    if memory_bytes:
        # Libraries reserve far more than they use (threads, CUDA), and more of it the more cores there are.
        limit_address_space(psutil.Process().memory_info().vms + memory_bytes)
    while True:
        copy = os.fork()
        if copy == 0:
            _serve(called, requests, told, cpu_s, wall_s)
            os._exit(INPUT_OVER)
        _, status = os.waitpid(copy, 0)
        if os.waitstatus_to_exitcode(status) == INPUT_OVER:
            return 0
        _tell(told, ENDED)


def load(function: str) -> Called:
    """The function that `module:function` names.

    Raises ImportError, AttributeError or TypeError when there is none, UserError when an installed module hides the user's.
    """
    module, _, name = function.partition(":")
    check_not_hidden(module, inherited_code_folders())
    found = getattr(import_module(module), name)
    if not callable(found):
        raise TypeError(f"`{function}` cannot be called")
    return found  # type: ignore[no-any-return]


def _serve(called: Called, requests: int, told: int, cpu_s: float, wall_s: float) -> None:
    own = os.getpid()
    _tell(told, f"{READY} {own}")
    with open(requests, "rb", closefd=False) as lines:
        for line in lines:
            try:
                number, arguments = json.loads(line)
            except ValueError:  # the rest of a request whose reader was ended
                continue
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            signal.setitimer(signal.ITIMER_REAL, wall_s)
            try:
                reply = _reply(number, called(*arguments))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a verifier raises is its having no verdict
                reply = json.dumps([number, None, str(fault_of(error))])
            if os.getpid() != own:  # a child of the function's, which must not read the next request
                os._exit(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _tell(told, reply)


def _reply(number: int, value: Any) -> str:
    try:
        return json.dumps([number, value, ""], default=plain_number)
    except (TypeError, ValueError, RecursionError) as error:  # a value that JSON does not have
        return json.dumps([number, None, str(error)[:300] or type(error).__name__])


def _tell(told: int, line: str) -> None:
    os.write(told, line.encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
