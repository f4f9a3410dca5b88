"""A stage on the machines of a Slurm allocation: one step of it, with an `r1 join` on every machine.

`r1 run` itself runs in the allocation's script (infra/slurm/run.sbatch), on its first machine. Exit statuses come through the
stage's folder, as ever: `srun` only has to end.
"""

import os
import shutil
import signal
import subprocess
import sys
from typing import IO

from flows.launch.launcher import Job
from stages.contract.errors import UserError
from stages.store.user_code import child_environment

STOP = signal.SIGUSR1
"""What `r1 join` takes for a request to stop. `srun` passes it on to every task; at SIGTERM it would end them itself."""
_KILL_SECONDS = 40.0
"""How long a step may take to end when Slurm ends it (its KillWait is 30 s)."""
_PORT, _PORTS = 29400, 1000


class Step:
    """A step of the allocation."""

    def __init__(self, srun: subprocess.Popen[bytes]) -> None:
        self._srun = srun

    def poll(self) -> int | None:
        """The exit status of srun."""
        return self._srun.poll()

    def end(self, grace_s: float) -> None:
        """Have every task asked; then have Slurm end the step."""
        try:
            if grace_s > 0 and self.poll() is None:
                self._srun.send_signal(STOP)
                self._wait(grace_s)
        finally:
            if self.poll() is None:
                self._srun.send_signal(signal.SIGTERM)
                self._wait(_KILL_SECONDS)
            if self.poll() is None:
                self._srun.kill()
            self._srun.wait()

    def _wait(self, seconds: float) -> None:
        try:
            self._srun.wait(seconds)
        except subprocess.TimeoutExpired:
            return


def start(job: Job, log: IO[bytes]) -> Step:
    """Start the step.

    Raises UserError outside an allocation, or in one of too few machines.
    """
    hosts, environment = job.compute.hosts, os.environ
    mend = "sbatch infra/slurm/run.sbatch CONFIG"
    if "SLURM_JOB_ID" not in environment:
        raise UserError(
            "the launcher `slurm` works within an allocation, and this is none", where="compute.launcher", mend=mend
        )
    if shutil.which("srun") is None:
        raise UserError(
            "there is no `srun` on the PATH", where="compute.launcher", mend="install Slurm's commands, or use `local`"
        )
    machines = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    if machines < hosts:
        what = f"{hosts} machines are wanted, the allocation has {machines}"
        raise UserError(what, where="compute.hosts", mend=f"sbatch --nodes={hosts} infra/slurm/run.sbatch CONFIG")
    where = job.compute.rendezvous or f"{first_machine()}:{_PORT + int(environment['SLURM_JOB_ID']) % _PORTS}"
    processors = environment.get("SLURM_CPUS_PER_TASK")  # which srun does not take over from sbatch since 22.05
    step = [f"--nodes={hosts}", f"--ntasks={hosts}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--unbuffered", "--label"]
    join = [
        sys.executable,
        "-m",
        "flows.cli",
        "join",
        str(job.folder.path),
        "--attempt",
        str(job.attempt),
        "--rendezvous",
        where,
    ]
    command = [
        *("srun", *step, *([f"--cpus-per-task={processors}"] if processors else [])),
        *("sh", "-c", 'exec "$@" --node-rank "$SLURM_PROCID"', "sh", *join),
    ]
    return Step(
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            start_new_session=True,
        )
    )


def first_machine() -> str:
    """Name of the allocation's first machine, where rank 0 will be.

    Raises UserError when Slurm does not say.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return told.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        mend = "name its first machine with `compute.rendezvous: HOST:PORT`"
        raise UserError(f"Slurm does not name the machines of {nodes!r}", where="compute.launcher", mend=mend) from error
