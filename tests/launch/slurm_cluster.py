"""A real Slurm on this machine for tests: controller and two nodes, with a key, ports and folders of their own. Root only.

Both nodes are this machine, so what differs between machines is not shown by it: that is test_hosts.py's part.
"""

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.requirements import require

NODES = ("one", "two")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@dataclass(frozen=True)
class Cluster:
    """Slurm's commands know it by their environment."""

    folder: Path
    environment: dict[str, str]

    def say(self, *command: object, **environment: str) -> str:
        """Run one of Slurm's commands; what it prints."""
        done = subprocess.run(
            [*map(str, command)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def state(self, job: str) -> tuple[str, int]:
        """A job's state, and how often it was started again."""
        words = dict(word.partition("=")[::2] for word in self.say("scontrol", "--oneliner", "show", "job", job).split())
        return words["JobState"], int(words["Restarts"])

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """The cluster, while the block lasts. Skips the test where Slurm is not installed."""
    require("slurm", "root")
    key, control = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    controller, *nodes = _free_ports(3)
    conf = folder / "slurm.conf"
    lines = [
        "ClusterName=r1test",
        f"SlurmctldHost={socket.gethostname()}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={control}",
        "CryptoType=crypto/munge",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",
        "MpiDefault=none",
        "ReturnToService=2",
        "KillWait=10",
        "MinJobAge=3000",
        "SchedulerParameters=requeue_delay=1",
        "JobRequeue=1",
        *(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
            for name, port in zip(NODES, nodes, strict=True)
        ),
        f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
    ]
    conf.write_text("\n".join(lines) + "\n")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    cluster = Cluster(folder, {**os.environ, "SLURM_CONF": str(conf), "PATH": PATH})
    munge = [f"--socket={control}", f"--key-file={key}", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"]
    daemons = [
        ["munged", "--foreground", "--force", f"--log-file={folder}/munged.log", *munge],
        ["slurmctld", "-D", "-i"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}-{len(processes)}.out.log").open("wb") as log:
                processes.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))
            time.sleep(1.0)
        until = time.monotonic() + 60
        while cluster.say("sinfo", "--noheader", "--format=%t %D") != f"idle {len(NODES)}":
            assert time.monotonic() < until, cluster.logs()
            assert all(process.poll() is None for process in processes), cluster.logs()
            time.sleep(0.5)
        yield cluster
        cluster.say("scancel", "--state=RUNNING", "--user=root")
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
