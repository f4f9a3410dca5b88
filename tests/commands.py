"""The command `r1` as a process, and in this one."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import OF_RANKS, ROOT


def environment() -> dict[str, str]:
    """This process's environment without the user's Prefect, MLflow, PostgreSQL and ranks, and with the clone importable."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "PG", *OF_RANKS))}
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))}


def r1(*arguments: object, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for it."""
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment(), check=False)


def r1_in_process(*arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command as `r1` does, but in this process, which saves an interpreter's start and imports.

    Not for recipes with code of the user's: this process would keep the module.
    """
    from flows.cli.app import main

    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    variables, places = dict(os.environ), list(sys.path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    os.environ.clear()
    os.environ.update(environment())
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = main([*map(str, arguments)])
    finally:
        os.environ.clear()
        os.environ.update(variables)
        sys.path[:] = places
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = [stream.buffer.getvalue().decode("utf-8") for stream in (output, errors)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(["r1", *map(str, arguments)], status, *said)


def refused(*arguments: object) -> str:
    """Run the command, which has to refuse: exit 2, one line, nothing on standard output; returns the line."""
    done = r1_in_process(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]
