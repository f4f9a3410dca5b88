"""Runs a Python module as a program that ends when another process is gone: `python exit_with_parent.py PID MODULE ARGUMENTS…`.

Started by path, so that it works from any folder. It keeps servers from outliving the command that started them, even when
that was killed.
"""

import os
import runpy
import signal
import sys
import threading
import time


def _end_with(parent: int) -> None:
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            # The server's own helpers are in its group, of which this process is the leader.
            os.kill(0, signal.SIGTERM)
            time.sleep(5.0)
            os.kill(0, signal.SIGKILL)
        time.sleep(1.0)


def main() -> None:
    """Watch the process named first while running the module named second."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    threading.Thread(target=_end_with, args=(parent,), daemon=True, name="end-with-parent").start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
