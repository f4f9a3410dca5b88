"""The stage contract: what a kind of stage declares, what it is given, what it hands back.

A stage turns inputs on disk into one output on disk. Its module under stages/ has a constant `KIND: StageKind`. Everything
a running stage may know is in its `StageContext`; it never looks at other stages, Prefect, or MLflow.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from stages.contract.config import OutputKind, StageConfig
from stages.contract.errors import Interrupted
from stages.store.folders import StageFolder

C = TypeVar("C", bound=StageConfig)


@dataclass
class StopRequest:
    """Set by SIGTERM or SIGINT; stages look at it at their boundaries (a step, a chunk)."""

    requested: bool = False

    def listen(self) -> None:
        """Take SIGTERM and SIGINT as requests to stop at the next boundary."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "requested", True))

    def check(self) -> None:
        """Raise `Interrupted` when a stop was asked for. Single-process stages call it between chunks."""
        if self.requested:
            raise Interrupted


@dataclass
class Result:
    """What a finished stage says of itself; its output is already in `folder.output(kind.output)`."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Headline metrics: they go into the manifest and to MLflow."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping: why it stopped early, which checkpoint was chosen, rows refused."""
    remarks: list[str] = field(default_factory=list)
    """Sentences to be shown wherever the stage's results are: rows left out, an early stop, what the model really is."""
    tokens: int = 0
    """Tokens sampled or trained on."""


def warn(sentences: Sequence[str], *, main: bool = True) -> None:
    """Print warnings of a stage's start on standard error, once (`main`: rank 0); its result has them as remarks too."""
    for sentence in sentences if main else ():
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


@dataclass
class StageContext(Generic[C]):
    """What a running stage is given. Under torchrun every rank has one; only rank 0 writes into `folder`."""

    config: C
    folder: StageFolder
    inputs: dict[str, Path]
    """Role -> path of the input's output folder (`policy` -> …/model)."""
    input_digests: dict[str, str]
    """Role -> digest of that input, for provenance columns."""
    stop: StopRequest
    rank: int = 0
    world_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0


@dataclass(frozen=True)
class StageKind(Generic[C]):
    """A kind of stage: what a recipe's `kind:` names."""

    name: str
    version: int
    """Raised whenever a change of the code changes results; part of the fingerprint."""
    config: type[C]
    output: OutputKind
    run: Callable[[StageContext[C]], Result]
    """Called on every rank; heavy imports belong inside."""
    distributed: bool = False
    """Whether it may run on several ranks (training kinds)."""
    expand: Callable[[str, C], dict[str, StageConfig]] | None = None
    """Turns one stage of a recipe into several (evaluation: one per model, then a summary). The last one keeps the name."""
