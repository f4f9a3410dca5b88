"""The servers of a runs folder in a process of their own: started, and ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.processes import alive
from flows.servers.prefect_env import running_servers
from flows.servers.server_process import START_SECONDS
from stages.contract.errors import ExitStatus, StageFailed, UserError
from stages.store.user_code import child_environment

STOP_SECONDS = 60.0
"""How long both servers may take to end."""


def start(options: list[str], runs: Path) -> dict[str, Any]:
    """Start `r1 up` with these options, wait until its servers answer, and leave it running; returns what it wrote down.

    Raises what it failed with.
    """
    command = [sys.executable, "-m", "flows.cli", "up", "--json", "--runs", str(runs), *options]
    answer, log = runs / "servers" / "up.json", runs / "servers" / "up.log"
    answer.parent.mkdir(exist_ok=True)
    with answer.open("wb") as output, log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=child_environment(),
            start_new_session=True,
        )
    try:
        return _wait(process, runs, answer, log)
    except BaseException:
        process.terminate()
        raise


def _wait(process: subprocess.Popen[bytes], runs: Path, answer: Path, log: Path) -> dict[str, Any]:
    until = time.monotonic() + 2 * START_SECONDS
    while (facts := running_servers(runs)) is None:
        if process.poll() is not None:
            _raise_its_error(answer, log)
        if time.monotonic() > until:
            raise StageFailed(f"the servers do not answer within {2 * START_SECONDS:.0f} s; the log is {log}")
        time.sleep(0.2)
    return facts


def _raise_its_error(answer: Path, log: Path) -> None:
    try:
        error = json.loads(answer.read_text(encoding="utf-8"))["error"]
    except (OSError, ValueError, KeyError) as unread:
        raise StageFailed(f"`r1 up` ended at its start; its log is {log}") from unread
    if error["exit_status"] == ExitStatus.MISTAKE:
        raise UserError(error["message"], where=error.get("where", ""), mend=error.get("mend", ""))
    raise StageFailed(error["message"])


def stop(servers: Mapping[str, Any]) -> list[str]:
    """End the `r1 up` that wrote down these servers, wherever it was started; returns their addresses.

    Raises StageFailed when it doesn't end.
    """
    process = servers["up"]
    os.kill(process["pid"], signal.SIGTERM)
    until = time.monotonic() + STOP_SECONDS
    while alive(process["pid"], process["born"]):
        if time.monotonic() > until:
            raise StageFailed(f"process {process['pid']} did not end within {STOP_SECONDS:.0f} s")
        time.sleep(0.1)
    return [servers[name]["address"] for name in ("prefect", "mlflow")]
