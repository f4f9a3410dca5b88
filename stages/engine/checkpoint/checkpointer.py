"""Checkpoints at step boundaries: written aside and in the background, COMPLETE last, renamed; the newest whole one wins.

A checkpoint is `step-000120/`: state.json (counters), `<part>-rank<n>.safetensors` (each rank's share of a model's or a
reference's tensors, whole parameters: see state.py), a copy of the journal, and COMPLETE, the sha256 and size of all
others. What is written is what the tensors were when `begin` was called, however far training has gone meanwhile.

A rank on another machine that does not share the folder gives its share to rank 0, one after the other, and training waits.
"""

import contextlib
import re
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stages.contract.errors import StageFailed, UserError
from stages.engine import distributed, multi_node
from stages.engine.checkpoint.reader import JOURNAL, Relayed, Stored
from stages.engine.settings import Checkpoints
from stages.store.files import TEMPORARY, digest_file, publish_folder, read_json, remove, sync_file, write_bytes, write_json

COMPLETE = "COMPLETE"
"""Name of the file that makes a checkpoint whole."""
SPARE = 1.1
"""A checkpoint is begun when the disk has so many times its size free."""

Digests = dict[str, list[Any]]
Parts = Mapping[str, Mapping[str, Tensor]]
"""Part -> name -> tensor."""


def _name(step: int) -> str:
    return f"step-{step:06d}"


class Checkpointer:
    """A stage's checkpoints. Every rank has one and calls everything on it."""

    def __init__(self, folder: Path, settings: Checkpoints, rank: int) -> None:
        self.folder, self.settings, self.rank = folder, settings, rank
        self._pending: _Pending | None = None
        self._apart = _apart(folder, rank)
        """Ranks that have another folder of that name."""

    def begin(self, step: int, state: dict[str, Any], parts: Parts) -> None:
        """Begin to write the checkpoint of `step` finished steps; `finish` makes it whole.

        state: JSON values, those of rank 0 count; parts: part -> this rank's tensors, which must not change any more.
        Raises StageFailed when the disk has no room for it; what is there already stays.
        """
        self.finish()
        temporary = self.folder / f"{TEMPORARY}{_name(step)}"
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        size = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
        told = distributed.gather((size, shutil.disk_usage(self.folder).free if self.rank == 0 else 0))
        needed, free = sum(size for size, _ in told) * SPARE, told[0][1]
        if needed > free:
            raise StageFailed(
                f"no room for a checkpoint: {needed / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB are free "
                f"at {self.folder}; the last whole checkpoint stands: make room and go on with `r1 resume`"
            )
        journal = self.folder.parent / JOURNAL
        lines = journal.read_bytes() if self.rank == 0 and journal.exists() else b""
        received = self._received(temporary, parts)
        self._pending = _Pending(temporary, step, state, lines, {} if self.rank in self._apart else parts, self.rank, received)

    def _received(self, temporary: Path, parts: Parts) -> list["_Written"]:
        """Of the ranks that cannot write into the folder rank 0 writes the shares. Every rank calls it."""
        written = []
        for rank in self._apart:
            share = distributed.to_first(parts, rank)
            if share is not None:
                written.append(_write_share(temporary, rank, share))
        return written

    def finish(self) -> None:
        """Wait for what was begun, and publish it. Nothing happens when nothing was begun."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        told = distributed.gather(pending.wait())
        errors = [error for _, error in told if error]
        if errors:
            shutil.rmtree(pending.folder, ignore_errors=True)
            raise StageFailed(
                f"the checkpoint of step {pending.step} could not be written: {errors[0]}; the last whole one stands"
            )
        if self.rank == 0:
            files: Digests = {name: found for digests, _ in told for name, found in digests.items()}
            state = {"step": pending.step, "fingerprint": fingerprint_beside(self.folder), **pending.state}
            write_json(pending.folder / "state.json", state)
            write_bytes(pending.folder / JOURNAL, pending.journal)
            for name in ("state.json", JOURNAL):
                files[name] = [digest_file(pending.folder / name), (pending.folder / name).stat().st_size]
            write_json(pending.folder / COMPLETE, dict(sorted(files.items())))
            publish_folder(pending.folder, self.folder / _name(pending.step))
            self._retain()

    def _retain(self) -> None:
        """Remove all but the newest, and those that are kept for good."""
        for step in steps(self.folder)[: -self.settings.keep]:
            if not (self.settings.keep_every and step % self.settings.keep_every == 0):
                remove(self.folder / _name(step))

    def restore(self, world_size: int, continues: Path | None = None) -> "Stored | None":
        """The newest whole checkpoint, or `continues`, another stage's, when there is none; None without either.

        Newer, broken ones are named on standard error and set aside. That it was written by another number of ranks is said;
        it reads the same. Raises UserError when `continues` is not whole.
        """
        found = distributed.gather(_chosen(self.folder) if self.rank == 0 else None)[0]
        if found is None and continues is not None:
            if reason := broken(continues):
                raise UserError(f"the checkpoint is not whole: {reason}", where=str(continues), mend="continue another one")
            found = continues
        if found is None:
            return None
        stored = Relayed(found, self.rank) if self._apart and found != continues else Stored(found)
        if self.rank == 0 and stored.ranks != world_size:
            print(
                f"checkpoint {found.name} was written by {stored.ranks} processes and goes on with {world_size}: "
                "from here on the numbers are equal within rounding, not to the bit",
                file=sys.stderr,
                flush=True,
            )
        return stored


_Written = tuple[Digests, str]
"""Digests and sizes of a share's files, and why it could not be written."""


def _apart(folder: Path, rank: int) -> list[int]:
    """Ranks to which the folder that rank 0 writes into is not there. Every rank calls it."""
    if multi_node.count() == 1:
        return []
    token = distributed.gather(multi_node.mark(folder.parent) if rank == 0 else "")[0]
    return [number for number, there in enumerate(distributed.gather(multi_node.sees(folder.parent, token))) if not there]


def _write_share(folder: Path, rank: int, parts: Parts) -> _Written:
    """Write the share of a rank."""
    digests: Digests = {}
    try:
        for part, tensors in parts.items():
            file = folder / f"{part}-rank{rank}.safetensors"
            save_file(dict(tensors), file)
            sync_file(file)
            digests[file.name] = [digest_file(file), file.stat().st_size]
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        return digests, str(error)
    return digests, ""


class _Pending:
    """A checkpoint that is being written by this rank's thread."""

    def __init__(
        self, folder: Path, step: int, state: dict[str, Any], journal: bytes, parts: Parts, rank: int, received: list[_Written]
    ) -> None:
        """`received`: what this rank has written for others."""
        self.folder, self.step, self.state, self.journal = folder, step, state, journal
        self._parts, self._rank = parts, rank
        self._written = received
        self._thread = threading.Thread(target=self._write, daemon=True, name="checkpoint")
        self._thread.start()

    def _write(self) -> None:
        self._written.append(_write_share(self.folder, self._rank, self._parts))

    def wait(self) -> _Written:
        """What this rank has written, and why it could not."""
        self._thread.join()
        digests = {name: found for share, _ in self._written for name, found in share.items()}
        return digests, next((error for _, error in self._written if error), "")


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there, sorted; whether they are whole is not looked at."""
    found = (re.fullmatch(r"step-([0-9]+)", p.name) for p in folder.glob("step-*"))
    numbers = sorted(int(m.group(1)) for m in found if m)
    return [step for step in numbers if (folder / _name(step)).exists()]


def states(folder: Path) -> list[dict[str, Any]]:
    """The state that each checkpoint there was written with; one that is not what was written is left out."""
    found = []
    for path in (folder / _name(step) for step in steps(folder)):
        with contextlib.suppress(*_UNREADABLE):
            if digest_file(path / "state.json") == _listed(path)["state.json"][0]:
                found.append(read_json(path / "state.json"))
    return found


_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def _listed(path: Path) -> dict[str, tuple[str, int]]:
    """Name -> sha256 and size of the files of a checkpoint, as its COMPLETE says. Raises one of `_UNREADABLE`."""
    return {str(name): (str(digest), int(size)) for name, (digest, size) in read_json(path / COMPLETE).items()}


def fingerprint_beside(folder: Path) -> str | None:
    """Fingerprint of the stage whose checkpoints lie in `folder`; None when its config cannot tell."""
    try:
        return str(read_json(folder.parent / "config.json")["fingerprint"])
    except _UNREADABLE:
        return None


def broken(path: Path) -> str:
    """Why a checkpoint is not whole, or not the one that its place says; empty when all is well."""
    try:
        listed = _listed(path)
    except OSError:
        return "it has no COMPLETE file"
    except _UNREADABLE:
        return "its COMPLETE file is damaged"
    if "state.json" not in listed:
        return "its COMPLETE file is damaged"
    for name, (digest, size) in listed.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or digest_file(file) != digest:
            return f"`{name}` is not what it was"
    if more := {file.name for file in path.glob("*.safetensors")} - listed.keys():
        return f"`{min(more)}` does not belong to it"
    stored = Stored(path)
    if not stored.has("policy"):
        return "it is of another version"
    if path.name != _name(stored.state.get("step", 0)):
        return f"it is of step {stored.state.get('step')}"
    own = fingerprint_beside(path.parent)
    return "" if stored.state.get("fingerprint", own) == own else "it belongs to another stage"


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is what was written; broken ones are named on standard error and passed over."""
    for step in reversed(steps(folder)):
        path = folder / _name(step)
        reason = broken(path)
        if not reason:
            return path
        print(f"checkpoint {path.name} is passed over: {reason}", file=sys.stderr, flush=True)
    return None


def _chosen(folder: Path) -> Path | None:
    """The newest whole checkpoint; newer, broken ones are set aside so that they are never counted as kept ones."""
    chosen = newest_whole(folder)
    for step in steps(folder):
        path = folder / _name(step)
        if chosen is None or path.name > chosen.name:
            aside = folder / f"broken-{path.name}"
            if aside.is_file():  # where a folder should be
                aside.unlink()
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return chosen
