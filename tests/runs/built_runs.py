"""Runs folders built by hand: records, stages and answers without any training."""

import importlib
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from flows.cli.app import COMMANDS, parser
from flows.processes import birth
from stages.contract.config import OutputKind
from stages.contract.errors import ExitStatus
from stages.problems.episode import Episode, Group, Problem, Reward
from stages.rollout.records import write_groups
from stages.store.files import write_json
from stages.store.folders import PipelineFolder, StageFolder
from stages.store.manifest import InputRecord, StageRecord, write_manifest


def call(*arguments: object) -> tuple[ExitStatus, dict[str, Any]]:
    """A command of r1 in this process: its status and document."""
    options = parser().parse_args([str(argument) for argument in arguments])
    module, _, function = COMMANDS[options.command].partition(":")
    status, document = getattr(importlib.import_module(module), function)(options)
    return status, document


def folder_name(kind: str, number: int) -> str:
    """Name of a stage folder."""
    return f"{kind}-{number:012x}"


def build_stage(
    runs: Path,
    name: str,
    *,
    inputs: dict[str, str] | None = None,
    model: Path | None = None,
    finished: bool = True,
    config: dict[str, Any] | None = None,
) -> StageFolder:
    """A stage folder whose output is a copy of `model` (or a small file); `inputs`: role -> stage folder's name."""
    folder = StageFolder(runs / "stages" / name)
    found = {
        role: InputRecord(digest="d", path=str(runs / "stages" / below / "model"), stage=below)
        for role, below in (inputs or {}).items()
    }
    kind = name.partition("-")[0]
    record = StageRecord(kind=kind, version=1, fingerprint=name.split("-")[1].ljust(64, "0"), config=config or {}, inputs=found)
    write_json(folder.config, record.model_dump())
    if model is not None:
        shutil.copytree(model, folder.output("model"))
    else:
        (folder.output("model")).mkdir()
        (folder.output("model") / "weights").write_bytes(b"w" * 100)
    if finished:
        finish(folder, record)
    return folder


def finish(folder: StageFolder, record: StageRecord, output: OutputKind = "model") -> None:
    """Write the manifest of what is in the folder."""
    facts: dict[str, Any] = {"metrics": {"steps": 2.0}, "notes": {}, "tokens": 3, "wall_seconds": 1.0, "device_seconds": 2.0}
    write_manifest(folder, record, output, **facts)


def build_run(
    runs: Path,
    name: str,
    stages: dict[str, str | None],
    *,
    status: str = "done",
    sections: dict[str, dict[str, Any]] | None = None,
) -> PipelineFolder:
    """The record of a run; `stages`: name -> stage folder's name, None when it has not begun."""
    folder = PipelineFolder(runs / "pipelines" / name)
    facts = {
        stage: {
            "kind": (sections or {}).get(stage, {}).get("kind", (below or "rl").partition("-")[0]),
            "status": "done" if below else "pending",
            "folder": str(runs / "stages" / below) if below else None,
            "fingerprint": below.split("-")[1].ljust(64, "0") if below else None,
            "seconds": None,
            "mlflow_run_id": None,
            "remarks": [],
        }
        for stage, below in stages.items()
    }
    folder.write(
        {
            "name": name,
            "started": "2026-01-01T00:00:00",
            "config_file": "made.yaml",
            "working_folder": str(runs.parent),
            "document": {"name": name, "runs": "runs", "stages": sections or {}},
            "status": status,
            "error": None,
            "owner": {"pid": os.getpid(), "host": socket.gethostname(), "born": birth(os.getpid())},
            "stages": facts,
            "mlflow": {"tracking_uri": None, "experiment": None, "parent_run_id": None, "experiment_id": None},
            "models": {},
        }
    )
    return folder


def write_answers(folder: StageFolder, step: int, answers: list[tuple[str, str, float]], name: str = "step") -> Path:
    """A file of answers to two problems in turn: (text, verdict, reward) each, as long as the text is."""
    groups = [Group(Problem(f"p{n}", f"question {n}", str(n), "made")) for n in range(2)]
    for number, (text, verdict, reward) in enumerate(answers):
        group = groups[number % 2]
        group.episodes.append(
            Episode(
                problem=group.problem,
                sample=len(group.episodes),
                prompt=group.problem.question,
                prompt_ids=[1],
                completion_ids=[2] * len(text),
                logprobs=[-0.5] * len(text),
                text=text,
                finish="stop",
                reward=Reward(reward, {"accuracy": reward}, verdict),  # type: ignore[arg-type]
            )
        )
    path = folder.rollouts / f"{name}-{step:06d}.parquet"
    write_groups(path, groups)
    return path
