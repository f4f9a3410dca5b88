"""`pipeline.json`: what one `r1 run` was asked for and how far it is.

It is written after every change, so a resumed run knows everything from it.
"""

import datetime as dt
import os
import socket
import threading
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from flows.processes import alive, birth
from stages.contract.errors import UserError
from stages.recipe.resolve import ResolvedRecipe
from stages.store.folders import PipelineFolder, Runs, StageFolder
from stages.store.manifest import verify_manifest
from stages.store.seals import read_document

Results = dict[str, dict[str, float]]
FINISHED = ("done", "reused")
"""Status of a stage that has a manifest."""
COMPARING = ("summary", "study")
"""Kinds of stages whose report has the headline results of models."""
_RESULTS = TypeAdapter(dict[str, dict[str, float | None]])


class _StageFacts(BaseModel):
    kind: str
    status: str
    folder: str | None
    fingerprint: str | None
    seconds: float | None
    mlflow_run_id: str | None
    remarks: list[str]


class _Facts(BaseModel):
    """What a record must have to be read; one of another version may lack it."""

    started: str
    working_folder: str
    document: dict[str, Any]
    status: str
    error: str | None
    stages: dict[str, _StageFacts]
    mlflow: dict[str, str | None]


class RunRecord:
    """The record of one run, in memory and on disk."""

    def __init__(self, folder: PipelineFolder, content: dict[str, Any]) -> None:
        self.folder = folder
        self.content = content
        self._lock = threading.Lock()  # stages side by side write into one record

    @classmethod
    def create(
        cls,
        recipe: ResolvedRecipe,
        config_file: str,
        from_stage: str | None = None,
        until_stage: str | None = None,
        fresh: list[str] | None = None,
    ) -> "RunRecord":
        """Make the folder of a new run and write its first record."""
        folder = Runs(recipe.runs).prepare().new_pipeline(recipe.name)
        record = cls(
            folder,
            {
                "name": recipe.name,
                "started": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
                "config_file": config_file,
                "working_folder": str(Path.cwd()),
                "code_folders": list(recipe.code_folders),
                "document": recipe.document,
                "from": from_stage,
                "until": until_stage,
                "fresh": fresh or [],
                "status": "running",
                "error": None,
                "stages": {
                    name: {
                        "kind": config.kind,
                        "status": "pending",
                        "folder": None,
                        "fingerprint": None,
                        "seconds": None,
                        "mlflow_run_id": None,
                        "remarks": [],
                    }
                    for name, config in recipe.stages.items()
                },
                "mlflow": {"tracking_uri": None, "experiment": None, "parent_run_id": None, "experiment_id": None},
                "models": {},
            },
        )
        record.begin()
        return record

    @classmethod
    def open(cls, folder: PipelineFolder) -> "RunRecord":
        """The record of an earlier run.

        Raises UserError when it cannot be read, or lacks what this version needs.
        """
        content = folder.read()
        try:
            _Facts.model_validate(content)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"])
            what = f"not a run's record of this version (`{place}`: {error.errors()[0]['msg']})"
            raise UserError(what, where=str(folder.path / "pipeline.json"), mend="start a new run") from error
        return cls(folder, content)

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.folder.path.name

    @property
    def code_folders(self) -> tuple[str, ...]:
        """Absolute paths in which modules of the user's are searched: the recipe's folder and the working folder."""
        return tuple(self.content.get("code_folders") or [self.content["working_folder"]])

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Stage name -> its facts, in running order."""
        stages: dict[str, dict[str, Any]] = self.content["stages"]
        return stages

    def begin(self) -> None:
        """Say that this process works on the run from now on."""
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "born": birth(os.getpid())}
        self.update(status="running", error=None, owner=owner)

    def update(self, **facts: Any) -> None:
        """Change facts of the run and write them."""
        with self._lock:
            self.content.update(facts)
            self.folder.write(self.content)

    def stage(self, name: str, **facts: Any) -> None:
        """Change facts of a stage and write them."""
        with self._lock:
            self.stages[name].update(facts)
            self.folder.write(self.content)

    def status(self) -> str:
        """`done`, `failed`, `interrupted`, `running`; a run whose process is gone counts as `killed`."""
        status = str(self.content["status"])
        owner = self.content.get("owner") or {}
        if status == "running" and owner.get("host") == socket.gethostname():
            return status if alive(owner.get("pid", -1), owner.get("born")) else "killed"
        return status

    def place(self, name: str) -> StageFolder:
        """The folder that a stage has chosen, in this runs folder: a copy of a run does not look into the original."""
        return StageFolder(self.folder.path.parents[1] / "stages" / Path(self.stages[name]["folder"] or "none").name)

    def lost(self) -> UserError | None:
        """What to say of a stage that is recorded as finished and has no manifest: the runs folder was copied in part."""
        for name, stage in self.stages.items():
            if stage["status"] in FINISHED and not self.place(name).manifest.is_file():
                return _lost(name, self.place(name))
        return None

    def results(self) -> Results:
        """Headline results per model, from the reports of the run's finished summaries and studies.

        Raises UserError when a report is not what its manifest says.
        """
        found: Results = {}
        for name, stage in self.stages.items():
            if stage["kind"] in COMPARING and stage["status"] in FINISHED:
                models = _summary(name, self.place(name), stage["fingerprint"])
                found |= {label if label not in found else f"{name}/{label}": row for label, row in models.items()}
        return found

    def remarks(self) -> list[str]:
        """What the stages want said wherever their results are shown."""
        return [f"{name}: {text}" for name, stage in self.stages.items() for text in stage["remarks"]]

    def report(self) -> Path | None:
        """The run's page if it has one, otherwise the newest report among its stages."""
        page = self.folder.path / "report.html"
        if page.exists():
            return page
        # The summary's report comes last of all, whatever was run after it.
        ordered = sorted(self.stages, key=lambda name: self.stages[name]["kind"] in COMPARING)
        reports = [self.place(name).output("report") for name in ordered if self.stages[name]["status"] in FINISHED]
        existing = [path for path in reports if path.is_dir()]
        return existing[-1] if existing else None


def _lost(name: str, folder: StageFolder) -> UserError:
    mend = "copy the runs folder again, or start a new run with `r1 run`"
    return UserError(f"stage `{name}` was finished, and has no manifest", where=str(folder.path), mend=mend)


def _summary(name: str, folder: StageFolder, fingerprint: str | None) -> Results:
    if verify_manifest(folder, fingerprint) is None:
        raise _lost(name, folder)
    path, mend = folder.output("report") / "summary.json", f"run `{name}` again with --fresh"
    models: Results = read_document(path, "the summary", mend).get("models", {})
    try:
        _RESULTS.validate_python(models)
    except ValidationError as error:
        raise UserError("not a readable summary", where=str(path), mend=mend) from error
    return models
