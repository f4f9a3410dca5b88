"""Processes of stages forked from an interpreter that has their imports done: those take 5 s of processor time, a fork 0.02 s.

Each process has an environment, a log and signals of its own, as `python -m MODULE` has. Only without a GPU: CUDA and the
choice of DeepSpeed's accelerator belong to one process.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = [
    "stages.__main__",
    "stages.kinds.rl",
    "stages.kinds.sft",
    "stages.kinds.toy_base",
    "stages.engine.deepspeed_engine",
    "stages.rl.train",
    "stages.rollout.torch_engine",
    "stages.supervised.train",
    "transformers.models.llama.modeling_llama",
    "tests.conftest",
]
THREADS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""What the libraries read when they are imported."""


class Forked:
    """A forked process, with the methods of `subprocess.Popen` that tests call."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process; raises TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process.name), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def fork(module: str, folder: Path, log: Path, variables: Mapping[str, str]) -> Forked:
    """Start what `python -m MODULE FOLDER` is, with the environment `variables`; its output is appended to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    own = {**THREADS, "PYTHONPATH": str(ROOT)}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)  # the server that forks is started by the first process
    try:
        process = context.Process(target=_run, args=(module, str(folder), str(log), dict(variables)), daemon=True)
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return Forked(process)


def _run(module: str, folder: str, log: str, variables: dict[str, str]) -> None:
    """The body of the forked process."""
    gc.freeze()  # DeepSpeed collects garbage three times for an engine, which would go through all that was imported
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update({**variables, **THREADS})
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [module, folder]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
