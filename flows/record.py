"""`pipeline.json`: what one `r1 run` was asked for and how far it is.

It is written after every change, so a resumed run knows everything from it.
"""

import datetime as dt
import os
import socket
from pathlib import Path
from typing import Any

import psutil

from stages.recipe import ResolvedRecipe
from stages.store.errors import UserError
from stages.store.files import read_json
from stages.store.folders import PipelineFolder, Runs

Results = dict[str, dict[str, float]]


class RunRecord:
    """The record of one run, in memory and on disk."""

    def __init__(self, folder: PipelineFolder, content: dict[str, Any]) -> None:
        self.folder = folder
        self.content = content

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

        Raises UserError when it cannot be read.
        """
        return cls(folder, folder.read())

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.folder.path.name

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Stage name -> its facts, in running order."""
        stages: dict[str, dict[str, Any]] = self.content["stages"]
        return stages

    def begin(self) -> None:
        """Say that this process works on the run from now on."""
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "born": psutil.Process().create_time()}
        self.update(status="running", error=None, owner=owner)

    def update(self, **facts: Any) -> None:
        """Change facts of the run and write them."""
        self.content.update(facts)
        self.folder.write(self.content)

    def stage(self, name: str, **facts: Any) -> None:
        """Change facts of a stage and write them."""
        self.stages[name].update(facts)
        self.folder.write(self.content)

    def status(self) -> str:
        """`done`, `failed`, `interrupted`, `running`; a run whose process is gone counts as `killed`."""
        status = str(self.content["status"])
        owner = self.content.get("owner") or {}
        if status == "running" and owner.get("host") == socket.gethostname():
            return status if alive(owner.get("pid", -1), owner.get("born")) else "killed"
        return status

    def results(self) -> Results:
        """Headline results per model, from the reports of the run's finished summaries."""
        found: Results = {}
        for name, stage in self.stages.items():
            if stage["kind"] == "summary" and stage["status"] in ("done", "reused"):
                models = _summary(Path(stage["folder"]) / "report" / "summary.json")
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
        ordered = sorted(self.stages.values(), key=lambda stage: stage["kind"] == "summary")
        reports = [Path(s["folder"]) / "report" for s in ordered if s["status"] in ("done", "reused")]
        existing = [path for path in reports if path.is_dir()]
        return existing[-1] if existing else None


def alive(pid: int, born: float | None) -> bool:
    """Whether the process that had this id at that time still runs."""
    try:
        process = psutil.Process(pid)
        same = born is None or abs(process.create_time() - born) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
        return False


def _summary(path: Path) -> Results:
    try:
        models: Results = read_json(path)["models"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError("not a readable summary", where=str(path), mend="run the stage again with --fresh") from error
    return models
