"""Where things lie under the runs folder.

```
runs/stages/<kind>-<fingerprint12>[-g2]/   one per distinct computation, shared by all pipelines
runs/pipelines/<name>-<date>-<n>/          one per `r1 run`
```
"""

import os
import re
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import UserError
from stages.store.files import TEMPORARY, write_json
from stages.store.seals import SEAL, opened, read_document, sealed


@dataclass(frozen=True)
class StageFolder:
    """The folder of one computation. `config.json` says what is to be computed; `manifest.json` proves that it was."""

    path: Path

    @property
    def config(self) -> Path:
        """What is to be computed: kind, version, fingerprint, config, inputs (written by the parent)."""
        return self.path / "config.json"

    @property
    def manifest(self) -> Path:
        """Written last: the only proof that the stage is done."""
        return self.path / "manifest.json"

    @property
    def journal(self) -> Path:
        """One line per step: the stage's metrics."""
        return self.path / "journal.jsonl"

    @property
    def checkpoints(self) -> Path:
        """`step-000120/` each, whole once it holds COMPLETE."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of so many finished steps."""
        return self.checkpoints / f"step-{step:06d}"

    @property
    def rollouts(self) -> Path:
        """Sampled answers as parquet, one file per step or chunk."""
        return self.path / "rollouts"

    @property
    def attempts(self) -> Path:
        """`1/`, `2/` …: log.txt and outcome.json of each attempt."""
        return self.path / "attempts"

    def host(self, number: int) -> Path:
        """What machine `number` leaves, from 1: `1/`, `2/` … of its own attempts. The first machine's are `attempts`."""
        return self.path / "hosts" / str(number)

    @property
    def lock(self) -> Path:
        """Held by the pipeline that works in this folder."""
        return self.path / ".lock"

    def output(self, kind: str) -> Path:
        """The folder of the output: `model`, `dataset` or `report`."""
        return self.path / kind

    def new_attempt(self, host: int = 0) -> Path:
        """Make the next numbered attempt folder of a machine."""
        attempts = self.host(host) if host else self.attempts
        done = [int(p.name) for p in attempts.glob("*") if re.fullmatch("[0-9]+", p.name)]
        attempt = attempts / str(max(done, default=0) + 1)
        attempt.mkdir(parents=True)
        return attempt


@dataclass(frozen=True)
class Runs:
    """The runs folder."""

    path: Path

    def __post_init__(self) -> None:
        """Raises UserError for a path that no folder can have here; whether it can be read or written is seen later."""
        try:
            self.path.stat()
        except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError):
            pass
        except OSError as error:  # too long, or links that go round in a circle
            raise UserError(
                f"the runs folder cannot be written ({error.strerror})",
                where=str(self.path),
                mend="choose another folder for the runs",
            ) from error

    def prepare(self) -> "Runs":
        """Make the folder and prove that it can be written.

        Raises UserError when it cannot, or when its path cannot stand in a database's address.
        """
        if odd := [c for c in str(self.path) if c == "?" or unicodedata.category(c) in ("Cc", "Cs")]:
            mend = "choose another with `--set runs=FOLDER`"
            raise UserError(f"the runs folder's path has {odd[0]!r} in it", where=str(self.path), mend=mend)
        try:
            for name in ("stages", "pipelines"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"r1")
            probe.unlink()
        except (OSError, ValueError) as error:  # ValueError: a NUL in its name
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"the runs folder cannot be written ({reason})",
                where=str(self.path),
                mend="choose another with `--set runs=FOLDER` or mend its permissions",
            ) from error
        return self

    def stage(self, kind: str, fingerprint: str, *, fresh: bool = False) -> StageFolder:
        """The newest generation of a computation's folder, or with `fresh` the next, empty one."""
        base = f"{kind}-{fingerprint[:12]}"
        pattern = re.compile(re.escape(base) + r"(?:-g([0-9]+))?")
        matches = (pattern.fullmatch(p.name) for p in (self.path / "stages").glob(f"{base}*"))
        newest = max((int(m.group(1) or 1) for m in matches if m), default=0)
        generation = newest + 1 if fresh else max(newest, 1)
        return StageFolder(self.path / "stages" / (base if generation == 1 else f"{base}-g{generation}"))

    def stages(self, kind: str) -> list[Path]:
        """The folders of all computations of a kind."""
        return sorted((self.path / "stages").glob(f"{kind}-*"))

    def new_pipeline(self, name: str) -> "PipelineFolder":
        """Make the folder of a new pipeline run, `<name>-<date>-<n>`."""
        stem = f"{name}-{time.strftime('%Y%m%d')}"
        for number in range(1, 100_000):
            path = self.path / "pipelines" / f"{stem}-{number}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return PipelineFolder(path)
        raise UserError("too many runs today", where=str(self.path), mend="use another `name:` or runs folder")

    def pipelines(self) -> list["PipelineFolder"]:
        """Every pipeline run whose record can be read, the oldest first; `damaged` tells of the others."""
        return self._look()[0]

    def damaged(self) -> list[UserError]:
        """What is wrong with the records of pipeline runs that cannot be read."""
        return self._look()[1]

    def pipeline(self, run: str) -> "PipelineFolder":
        """The pipeline run named `run` (its folder's name or path, or `latest`).

        Raises UserError when there is none, when its record is damaged, or when damage keeps the latest from being known.
        """
        known, damaged = self._look()
        if run == "latest" and damaged:
            what = f"which run is the latest cannot be told: {damaged[0].what}"
            raise UserError(what, where=damaged[0].where, mend=f"name the run; {damaged[0].mend}")
        if run == "latest" and known:
            return known[-1]
        for folder in known:
            if run == folder.path.name or Path(run).resolve() == folder.path.resolve():
                return folder
        for error in damaged:
            if Path(run).name == Path(error.where).parent.name:
                raise error
        names = ", ".join(p.path.name for p in known[-5:]) or "none yet"
        raise UserError(f"no run `{run}`", where=str(self.path / "pipelines"), mend=f"the newest runs are: {names}")

    def _look(self) -> tuple[list["PipelineFolder"], list[UserError]]:
        try:
            found = [path for path in sorted((self.path / "pipelines").glob("*")) if path.is_dir() and _begun(path)]
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})", where=str(self.path), mend="name another folder") from error
        whole: list[tuple[str, PipelineFolder]] = []
        damaged: list[UserError] = []
        for folder in map(PipelineFolder, found):
            try:
                whole.append((str(folder.read().get("started", "")), folder))
            except UserError as error:
                damaged.append(error)
        return [folder for _, folder in sorted(whole, key=lambda item: item[0])], damaged


def _begun(path: Path) -> bool:
    """Whether there is more in a run's folder than what is left of a run that was killed at its very start."""
    return any(not below.name.startswith(TEMPORARY) for below in path.iterdir())


@dataclass(frozen=True)
class PipelineFolder:
    """One `r1 run`: `pipeline.json` has the resolved config and which folder each stage uses."""

    path: Path

    def read(self) -> dict[str, Any]:
        """The pipeline's record.

        Raises UserError when it is missing, or not what was written.
        """
        path, mend = self.path / "pipeline.json", "copy it again, or remove its folder and start a new run"
        document = read_document(path, "the run's record", mend)
        if SEAL not in document:
            raise UserError("the run's record has no seal: it is damaged, or of an older version", where=str(path), mend=mend)
        try:
            return opened(document)
        except ValueError as error:
            raise UserError(f"the run's record is damaged ({error})", where=str(path), mend=mend) from error

    def write(self, record: dict[str, Any]) -> None:
        """Replace the pipeline's record, whole."""
        write_json(self.path / "pipeline.json", sealed(record))
