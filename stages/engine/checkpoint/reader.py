"""Checkpoints as they are read: tensors by name, whichever rank wrote them, and passed on to machines that cannot read them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from stages.contract.errors import UserError
from stages.engine import distributed
from stages.store.files import read_json

JOURNAL = "journal.jsonl"
"""Name of the journal, and of a checkpoint's copy of it as it was: what a damaged journal is mended from."""


class Stored:
    """A whole checkpoint on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = read_json(path / "state.json")

    @property
    def ranks(self) -> int:
        """How many ranks wrote it."""
        return len(list(self.path.glob("policy-rank*.safetensors")))

    def steps_done(self, steps: int, *, continued: bool) -> int:
        """How many steps are done. Raises UserError when that is more than `steps`, or leaves none of them to continue with."""
        step: int = self.state["step"]
        if step > steps or (continued and step == steps):
            raise UserError(
                f"the checkpoint is of step {step}, the stage ends at {steps}", where="steps", mend="make it larger"
            )
        return step

    @property
    def journal(self) -> Path:
        """The journal as it was."""
        return self.path / JOURNAL

    def has(self, part: str) -> bool:
        """Whether there is such a part."""
        return any(self.path.glob(f"{part}-rank*.safetensors"))

    def part(self, name: str) -> Callable[[str], Tensor]:
        """The tensors of a part, of all ranks that wrote it."""
        return StoredPart(sorted(self.path.glob(f"{name}-rank*.safetensors")))


class StoredPart:
    """Reads tensors by name, whichever file they are in."""

    def __init__(self, files: list[Path]) -> None:
        self._place = str(files[0].parent) if files else ""
        self._files = [safe_open(file, framework="pt") for file in files]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  no mapping

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU.

        Raises UserError when there is none: the checkpoint is of another model, or without an optimizer's moments.
        """
        if name not in self._where:
            mend = "start the stage again with --fresh"
            raise UserError(f"the checkpoint has no tensor `{name}`", where=self._place, mend=mend)
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor


class Relayed(Stored):
    """A checkpoint that lies on the first machine alone: rank 0 reads it and tells the others.

    Every rank calls everything on it, and the same at the same time.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self._own = Stored(path) if rank == 0 else None
        files = [file.name for file in path.glob("*.safetensors")] if self._own else []
        self.state, self._files = distributed.gather((self._own.state if self._own else {}, files))[0]

    @property
    def ranks(self) -> int:
        """How many ranks wrote it."""
        return sum(name.startswith("policy-rank") for name in self._files)

    def has(self, part: str) -> bool:
        """Whether there is such a part."""
        return any(name.startswith(f"{part}-rank") for name in self._files)

    def part(self, name: str) -> Callable[[str], Tensor]:
        """The tensors of a part, each read by rank 0 when it is asked for."""
        own = self._own.part(name) if self._own else None

        def read(tensor: str) -> Tensor:
            found: Tensor = distributed.from_first(own(tensor) if own else None)
            return found

        return read
