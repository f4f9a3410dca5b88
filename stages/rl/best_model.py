"""The model with the best held-out reward so far, on disk until the stage's output is written."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from stages.contract.errors import UserError
from stages.engine import distributed
from stages.store.files import digest_path, remove, whole_folder

Save = Callable[[Path, bool], None]
"""Writes the model of now into a folder. Every rank calls it; the one that is told so writes."""


class Kept:
    """The folders best/step-000060/. Every rank calls everything on it."""

    def __init__(self, stage: Path, save: Save, *, main: bool) -> None:
        """`stage`: its folder; `main`: whether this rank writes."""
        self._folder, self._save, self._main = stage / "best", save, main
        self.digest = ""
        """Of the model kept last, on the rank that writes; part of a checkpoint."""

    def keep(self, step: int) -> None:
        """The model of now, after `step` steps, is the best."""
        self._write(self._of(step))
        if self._main:
            self.digest = digest_path(self._of(step))

    def forget_but(self, steps: Iterable[int]) -> None:
        """Remove those of all other steps."""
        if self._main:
            for old in self._folder.glob("step-*"):
                if int(old.name.removeprefix("step-")) not in steps:
                    remove(old)

    def publish(self, step: int | None, output: Path) -> None:
        """Make the model kept at `step`, or with None the one of now, the stage's output.

        Raises UserError when it is gone, or not what was written.
        """
        if step is None:
            self._write(output)
        elif self._main and self._of(step).exists() and digest_path(self._of(step)) == self.digest:
            with whole_folder(output) as temporary:
                shutil.copytree(self._of(step), temporary, dirs_exist_ok=True)
        elif self._main and not (output.exists() and digest_path(output) == self.digest):
            # An attempt that was killed before its manifest may have published it already, and nothing else is believed.
            what = f"the model kept at step {step} is gone, or not what was written"
            raise UserError(what, where=str(self._of(step)), mend="compute the stage again with --fresh")
        if self._main:
            shutil.rmtree(self._folder, ignore_errors=True)
        distributed.barrier()

    def _of(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    def _write(self, folder: Path) -> None:
        """Write the model of now into `folder`, whole."""
        if not self._main:
            self._save(folder, False)
            return
        with whole_folder(folder) as temporary:
            self._save(temporary, True)
