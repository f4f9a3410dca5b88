"""Stages as processes of their own, as the pipeline starts them, and ranks that run a test's own module."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.kinds import stage_kind
from stages.store.files import digest_path
from stages.tracking.journal import read
from tests.conftest import ROOT


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


def start(folder: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    """Start the stage; what it says goes to the folder's `log.txt`."""
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command("stages", folder, processes), cwd=ROOT, env=environment(), stdout=log, stderr=log)


def finish(folder: Path, processes: int = 1, *, status: int = 0, timeout: float = 300) -> Path:
    """Run the stage to its end, which has to be `status`."""
    assert start(folder, processes).wait(timeout=timeout) == status, said(folder)
    return folder


def wait_for_steps(folder: Path, process: subprocess.Popen[bytes], count: int) -> None:
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


def command(module: str, folder: Path, processes: int, *, torchrun: bool = False) -> list[str]:
    """The command line of `python -m module FOLDER`, under torchrun where several processes, or `torchrun`, ask for it."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(ranks if torchrun or processes > 1 else []), "-m", module, str(folder)]


def environment() -> dict[str, str]:
    """One thread a process: tests run in two workers on two cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
