"""What starts a stage's ranks and ends them. All else its parent learns from the stage's folder (flows/launch/attempt.py)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, Protocol

from stages.contract.config import Compute
from stages.store.folders import StageFolder


@dataclass(frozen=True)
class Job:
    """One attempt of a stage."""

    folder: StageFolder
    attempt: Path
    """The attempt's folder."""
    compute: Compute
    node: int = 0
    """Number of this machine among the stage's, under the launcher `local`."""
    command: list[str] | None = None
    """In place of the stage's own command; the attempt's folder is appended."""
    share: int = 1
    """Stages that may run on this machine at once: by so many its cores are divided."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """More of the environment."""
    note: Callable[[str], None] = field(default=lambda _: None)
    """Takes a line for the user."""
    forks: "Forker | None" = None
    """What forks a stage of one process on this machine; None: every stage has an interpreter of its own."""


class Running(Protocol):
    """A stage that was started."""

    def poll(self) -> int | None:
        """Its exit status (negative: a signal's number), None while it runs."""

    def end(self, grace_s: float) -> None:
        """Ask it to stop, wait so long, and end what is left, whatever interrupts the waiting."""


class Forker(Protocol):
    """What forks stages from a process that has their libraries loaded."""

    def start(self, job: Job, environment: Mapping[str, str], arguments: list[str], log: IO[bytes]) -> Running | None:
        """Fork a stage; None when it is to have an interpreter of its own."""


def launcher_of(compute: Compute) -> Literal["local", "slurm", "kubernetes"]:
    """The launcher of a stage: in an allocation of Slurm, one machine is the one that we are on."""
    return "local" if compute.launcher == "slurm" and compute.hosts == 1 else compute.launcher


def log_name(compute: Compute) -> str:
    """The file for what a launcher says; `log.txt` is what the ranks of the first machine say, wherever they are."""
    return "log.txt" if launcher_of(compute) == "local" else "launcher.log"
