"""Stages as processes of their own, and ranks that run a test's own module.

Without a GPU they are forked from an interpreter that has done their imports (`tests.forked`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stages.kinds.registry import stage_kind
from stages.store.files import digest_path
from stages.tracking.journal import read
from tests.conftest import OF_RANKS, ROOT
from tests.forked import Forked, fork


def prepare(folder: Path, config: Any, inputs: Mapping[str, Path]) -> Path:
    """A stage folder with its `config.json`: all that the process is told. Inputs by role."""
    folder.mkdir(parents=True)
    record = {
        "kind": config.kind,
        "version": stage_kind(config.kind).version,
        "fingerprint": "0" * 64,
        "config": config.model_dump(mode="json"),
        "inputs": {role: {"digest": digest_path(path), "path": str(path)} for role, path in inputs.items()},
    }
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def start(folder: Path, processes: int = 1) -> subprocess.Popen[bytes] | Forked:
    """Start the stage; what it says goes to the folder's `log.txt`."""
    if processes == 1 and not torch.cuda.is_available():
        return fork("stages", folder, folder / "log.txt", environment())
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command("stages", folder, processes), cwd=ROOT, env=environment(), stdout=log, stderr=log)


def finish(folder: Path, processes: int = 1, *, status: int = 0, timeout: float = 300) -> Path:
    """Run the stage to its end, which has to be `status`."""
    assert start(folder, processes).wait(timeout=timeout) == status, said(folder)
    return folder


def wait_for_steps(folder: Path, process: subprocess.Popen[bytes] | Forked, count: int) -> None:
    """Wait until the stage has told of so many steps."""
    until = time.monotonic() + 120
    while len(read(folder / "journal.jsonl")) < count:
        assert process.poll() is None, said(folder)
        assert time.monotonic() < until
        time.sleep(0.01)


def killed(folder: Path, at: int) -> None:
    """Start the stage, and kill it after so many steps."""
    process = start(folder)
    wait_for_steps(folder, process, at)
    process.kill()
    process.wait()


def stopped(folder: Path, at: int, steps: int) -> None:
    """Start the stage, and ask it to stop after so many of its steps."""
    process = start(folder)
    wait_for_steps(folder, process, at)
    process.send_signal(signal.SIGTERM)
    status = process.wait(timeout=20)
    if len(read(folder / "journal.jsonl")) < steps:  # else it was as good as done when the signal came
        assert status == 75


def said(folder: Path) -> str:
    """The end of the stage's log."""
    return (folder / "log.txt").read_text()[-2000:]


def on_ranks(module: str, folder: Path, processes: int, *, timeout: float = 500) -> None:
    """Run `python -m module FOLDER` on so many ranks; it has to succeed."""
    done = subprocess.run(
        command(module, folder, processes, torchrun=True),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def on_forked_ranks(module: str, folder: Path, processes: int, *, timeout: float = 500) -> None:
    """Run what `python -m module FOLDER` is on so many ranks, as torchrun describes them; it has to succeed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(processes):
        described = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        described |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {**environment(), "TORCHELASTIC_RUN_ID": "test", **{key: str(value) for key, value in described.items()}}
        ranks.append(fork(module, folder, folder / "log.txt", variables))
    until = time.monotonic() + timeout
    while None in (found := [rank.poll() for rank in ranks]) and not any(found) and time.monotonic() < until:
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
    assert found == [0] * processes, said(folder)


def command(module: str, folder: Path, processes: int, *, torchrun: bool = False) -> list[str]:
    """The command line of `python -m module FOLDER`, under torchrun where several processes, or `torchrun`, ask for it."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(ranks if torchrun or processes > 1 else []), "-m", module, str(folder)]


def environment() -> dict[str, str]:
    """One thread a process: tests run in two workers on two cores. What this process's own rank has set stays here: ranks on
    machines of their own would look for each other on their loopback interfaces.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(OF_RANKS)}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
