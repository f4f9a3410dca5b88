"""One stage's task, called without Prefect, with a small program in place of the stage's own."""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.launch.attempt import launch
from flows.pipeline.progress import Lines
from flows.pipeline.run_state import Work
from flows.pipeline.stage_task import finish_stage, stage_record
from flows.runs.record import RunRecord
from flows.runs.selection import Selection
from stages.contract.errors import Interrupted, UserError
from stages.recipe.resolve import load_recipe
from stages.store.files import read_json
from stages.store.manifest import verify_manifest

STAGE = """
import json, sys
from pathlib import Path
from stages.store.folders import StageFolder
from stages.store.manifest import StageRecord, write_manifest
attempt = Path(sys.argv[1])
folder = StageFolder(attempt.parents[1])
folder.output("model").mkdir(exist_ok=True)
(folder.output("model") / "config.json").write_text('{"model_type": "llama"}')
record = StageRecord.model_validate(json.loads(folder.config.read_text()))
write_manifest(folder, record, "model", metrics={}, notes={}, tokens=0, wall_seconds=0.1, device_seconds=0.1)
(attempt / "outcome.json").write_text('{"status": "done", "message": "", "mend": ""}')
"""
"""What a stage leaves when it is done, without its imports."""


class NoTracking:
    """Stands where MLflow would."""

    def stage(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(run_id="x", start=lambda: None, finish=lambda *_: None)


@pytest.fixture
def own(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe with a runs folder that no other test uses."""
    monkeypatch.setattr("flows.pipeline.stage_task.launch", functools.partial(launch, command=[sys.executable, "-c", STAGE]))
    document = json.loads(recipe.read_text())
    document["runs"] = str(tmp_path / "runs")
    recipe.write_text(json.dumps(document))
    return recipe


def work(recipe: Path, *, fresh: set[str] | None = None, needed: set[str] | None = None) -> Work:
    resolved = load_recipe(recipe)
    record = RunRecord.create(resolved, str(recipe))
    selection = Selection(order=list(resolved.stages), finished=needed or set(), fresh=fresh or set())
    return Work(resolved, record, Lines(lambda _: None), NoTracking(), selection)


def test_what_must_be_finished_and_is_not_is_named(own: Path) -> None:
    with pytest.raises(UserError, match="stage `base` isn't finished"):
        finish_stage(work(own, needed={"base"}), "base")


def test_done_then_reused_then_fresh_then_damaged(own: Path) -> None:
    first = work(own)
    assert finish_stage(first, "base") == "done"
    folder = first.finished["base"].folder
    assert finish_stage(work(own), "base") == "reused"

    resumed = work(own, fresh={"base"})
    assert finish_stage(resumed, "base") == "done"
    assert resumed.finished["base"].folder.path.name == f"{folder.path.name}-g2"
    assert finish_stage(resumed, "base") == "reused"  # a resumed run does not compute it once more

    newest = resumed.finished["base"].folder
    (newest.output("model") / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not what the manifest says; run the stage again with `--fresh"):
        finish_stage(work(own), "base")


def test_execution_settings_change_without_a_new_computation(own: Path) -> None:
    before = work(own)
    record = stage_record(before.recipe.stages["base"], {})
    folder = before.runs.stage(record.kind, record.fingerprint)
    assert finish_stage(before, "base") == "done"
    folder.manifest.unlink()
    document = json.loads(own.read_text())
    document["stages"]["base"]["compute"] = {"threads": 1}
    own.write_text(json.dumps(document))
    assert finish_stage(work(own), "base") == "done"
    assert read_json(folder.config)["config"]["compute"]["threads"] == 1
    assert verify_manifest(folder, record.fingerprint) is not None


@pytest.mark.parametrize(("done", "status"), [(True, "done"), (False, "interrupted")])
def test_a_stage_that_ends_while_it_is_asked_to_stop_is_what_it_came_to(
    own: Path, monkeypatch: pytest.MonkeyPatch, done: bool, status: str
) -> None:
    stopped = work(own)

    def asked_to_stop(*arguments: Any, **options: Any) -> None:
        if done:
            launch(*arguments, **options, command=[sys.executable, "-c", STAGE])
        raise Interrupted("SIGTERM")

    monkeypatch.setattr("flows.pipeline.stage_task.launch", asked_to_stop)
    with pytest.raises(Interrupted):
        finish_stage(stopped, "base")
    assert stopped.record.stages["base"]["status"] == status
