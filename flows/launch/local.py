"""The stage's processes on this machine: one, or several under torchrun; of several machines, this one's share.

Every machine has its own torchrun, and they meet at `rendezvous`, in the store of the first one's. The numbers of machines are
given, not negotiated: rank 0 must be where the stage's folder is written and the pipeline listens.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil

import flows
from flows.launch.launcher import Job, Running
from flows.processes import MARK_VARIABLE, ProcessTree
from stages.__main__ import PARENT_VARIABLE
from stages.contract.config import Compute
from stages.runtime.platform import usable_cores
from stages.store.user_code import child_environment

ROOT = Path(flows.__file__).resolve().parents[1]
"""Where the packages `flows` and `stages` lie."""
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}
"""A thread that waits spins for a moment, then sleeps. Sleeping at once made PyTorch's decoding 1.3 times as slow on an idle
machine (SmolLM2-135M, two threads); spinning on makes a busy one 2 to 3 times as slow."""


class Processes:
    """A process of this machine and all below it."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], log: IO[bytes], mark: Path, *, launcher: bool
    ) -> None:
        """`launcher`: the ranks are the process's children."""
        self._child = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, MARK_VARIABLE: str(mark)},
            start_new_session=True,
        )
        self._tree = ProcessTree(self._child.pid, mark=str(mark), launcher=launcher)

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._child.poll()

    def end(self, grace_s: float) -> None:
        """Ask, wait, kill."""
        self._tree.end(grace_s)
        self._child.wait()


def start(job: Job, log: IO[bytes]) -> Running:
    """Start this machine's processes."""
    compute = job.compute
    several = compute.processes > 1 or compute.hosts > 1
    variables = {**environment(compute, job.share), **job.variables}
    stage = [str(job.folder.path), "--attempt", str(job.attempt)]
    alone = job.command is None and not several
    if alone and job.forks is not None and (forked := job.forks.start(job, variables, stage, log)) is not None:
        return forked
    if job.command is not None:
        arguments = [*job.command, str(job.attempt)]
    else:
        arguments = [sys.executable, *(torchrun(compute, job.node) if several else []), "-m", "stages", *stage]
    if compute.hosts > 1 and job.node == 0 and job.command is None:
        others = "one more machine" if compute.hosts == 2 else f"{compute.hosts - 1} more machines"
        job.note(f"waiting for {others} (--node-rank 1 …): r1 join {job.folder.path} --node-rank 1")
    return Processes(arguments, variables, log, job.attempt, launcher=several)


def torchrun(compute: Compute, node: int) -> list[str]:
    """The arguments of the interpreter that start the ranks of machine `node`."""
    processes = f"--nproc_per_node={compute.processes}"
    if compute.hosts == 1:
        # Through a file: the launcher's own servers would listen on every address of the machine, and unpickle what comes.
        where = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", "--local-addr=127.0.0.1"]
        return ["-m", "torch.distributed.run", processes, *where]
    assert compute.rendezvous is not None  # which the configuration sees to
    address, _, port = compute.rendezvous.rpartition(":")
    where = [f"--nnodes={compute.hosts}", f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"]
    return ["-m", "torch.distributed.run", processes, *where, f"--rdzv-conf=timeout={compute.join_s:.0f}"]


def environment(compute: Compute, share: int) -> dict[str, str]:
    """What a stage's process on this machine finds in its environment; `share`: stages that the cores are divided by."""
    threads = str(compute.threads or max(1, usable_cores() // (compute.processes * share)))
    return {
        **child_environment(),
        **_interfaces(compute),
        PARENT_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **{name: os.environ.get(name, value) for name, value in WAITING.items()},
        # On one machine the ranks meet at a store of their own (`engine.ranks`).
        **({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if compute.hosts == 1 else {}),
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _interfaces(compute: Compute) -> dict[str, str]:
    """The network interface between machines. By itself gloo takes that of this machine's name, which is often loopback."""
    if compute.interface is not None:
        return {"GLOO_SOCKET_IFNAME": compute.interface, "NCCL_SOCKET_IFNAME": compute.interface}
    if compute.hosts == 1 or compute.rendezvous is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    address, _, port = compute.rendezvous.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, int(port)))  # sends nothing: it only asks which way it would go
            own = probe.getsockname()[0]
    except OSError:  # unknown as yet, or IPv6: gloo's choice stands
        return {}
    found = [name for name, addresses in psutil.net_if_addrs().items() if any(a.address == own for a in addresses)]
    return {"GLOO_SOCKET_IFNAME": found[0]} if found else {}
