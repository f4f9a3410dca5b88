"""What is on disk about a run, as its page wants it. What cannot be read is named, and the rest is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.contract.errors import UserError
from stages.store.files import read_json
from stages.store.folders import PipelineFolder, StageFolder
from stages.tracking.journal import Line, read

TRAINED = "train/loss"
"""A metric that the journals of training stages have, and no others."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str
    kind: str
    status: str
    seconds: float | None
    remarks: list[str]
    folder: StageFolder
    needs: list[str]
    """Names of the stages whose outputs it takes."""
    config: dict[str, Any]
    """With which it is computed; empty as long as it has not begun."""
    manifest: dict[str, Any]
    """Empty as long as it is not done."""
    lines: list[Line]
    """Of its journal."""

    @property
    def trained(self) -> bool:
        """Whether it has learning curves."""
        return any(TRAINED in line.metrics for line in self.lines)


@dataclass
class Run:
    """A run and its stages, in running order."""

    name: str
    content: dict[str, Any]
    """Its record."""
    stages: list[Stage] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """What could not be read."""

    def of_kind(self, kind: str) -> list[Stage]:
        """The finished stages of a kind."""
        return [stage for stage in self.stages if stage.kind == kind and stage.manifest]


def read_run(
    folder: PipelineFolder, content: dict[str, Any] | None = None, needs: Mapping[str, Sequence[str]] | None = None
) -> Run:
    """Everything about the run in `folder`.

    `content`: its record, where that on disk is not the newest; `needs`: stage -> stages whose outputs it takes, where known
    (otherwise the folders of the stages that have begun tell). Raises UserError when the record cannot be read.
    """
    record = folder.read() if content is None else content
    run = Run(folder.path.name, record)
    place = folder.path.parents[1] / "stages"  # not the recorded one: a copy of a run does not look into the original
    by_folder = {Path(facts["folder"]).name: name for name, facts in reversed(record["stages"].items()) if facts.get("folder")}
    for name, facts in record["stages"].items():
        stage_folder = StageFolder(place / Path(facts.get("folder") or "none").name)
        begun = _document(stage_folder.config, run.faults)
        made_by = (by_folder.get(str(item.get("stage"))) for item in begun.get("inputs", {}).values())
        done = facts["status"] in ("done", "reused")
        run.stages.append(
            Stage(
                name=name,
                kind=facts["kind"],
                status=facts["status"],
                seconds=facts.get("seconds"),
                remarks=[str(text) for text in facts.get("remarks", [])],
                folder=stage_folder,
                needs=list((needs or {}).get(name) or dict.fromkeys(found for found in made_by if found)),
                config=begun.get("config", {}),
                manifest=_document(stage_folder.manifest, run.faults) if done else {},
                lines=_lines(stage_folder, run.faults),
            )
        )
    return run


def _document(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        document = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        faults.append(f"{path}: {error}")
        return {}
    return document if isinstance(document, dict) else {}


def _lines(folder: StageFolder, faults: list[str]) -> list[Line]:
    try:
        return read(folder.journal)
    except UserError as error:
        faults.append(str(error))
        return []
