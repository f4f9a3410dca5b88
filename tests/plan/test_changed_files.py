"""Why a stage is computed again: the file that has changed, and since which stage."""

from pathlib import Path

import pytest

from flows.plan.changed_files import reasons
from flows.runs.stage_record import stage_record
from stages.contract.config import StageConfig
from stages.recipe.resolve import load_recipe
from stages.store.files import write_json
from stages.store.folders import Runs, StageFolder
from stages.store.manifest import StageRecord
from tests.runs.built_runs import finish

BEFORE = "gsm\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(BEFORE)
    (tmp_path / "x.yaml").write_text("name: x\nstages: {rows: {kind: dataset, path: rows.jsonl}}\n")
    return tmp_path / "rows.jsonl"


@pytest.fixture
def config(data: Path, monkeypatch: pytest.MonkeyPatch) -> StageConfig:
    monkeypatch.chdir(data.parent)
    return load_recipe("x.yaml").stages["rows"]


def prepare(runs: Runs, config: StageConfig, *, done: bool = True) -> StageRecord:
    record = stage_record(config, {})
    folder: StageFolder = runs.stage(record.kind, record.fingerprint)
    write_json(folder.config, record.model_dump())
    (folder.output("dataset")).mkdir()
    (folder.output("dataset") / "rows").write_text("x")
    if done:
        finish(folder, record, "dataset")
    return record


def test_changed_file_is_named_with_the_stage_that_had_the_other(data: Path, config: StageConfig) -> None:
    runs = Runs(data.parent / "runs")
    before = prepare(runs, config)
    assert reasons(runs, config, before) == []
    data.write_text("other\n")
    (line,) = reasons(runs, config, stage_record(config, {}))
    assert line.startswith(f"path: rows.jsonl has changed since dataset-{before.fingerprint[:12]} (")


def test_stage_with_other_settings_says_nothing_of_files(data: Path, config: StageConfig) -> None:
    runs = Runs(data.parent / "runs")
    prepare(runs, config)
    data.write_text("other\n")
    other = config.model_copy(update={"seed": 5})
    assert reasons(runs, other, stage_record(other, {})) == []


def test_stage_that_reads_another_file_has_no_changed_file(data: Path, config: StageConfig) -> None:
    runs = Runs(data.parent / "runs")
    prepare(runs, config)
    (data.parent / "more.jsonl").write_text("other\n")
    other = config.model_copy(update={"path": "more.jsonl"})
    assert reasons(runs, other, stage_record(other, {})) == []


def test_stage_that_was_only_begun_counts_for_the_run_that_began_it(data: Path, config: StageConfig) -> None:
    runs = Runs(data.parent / "runs")
    before = prepare(runs, config, done=False)
    data.write_text("other\n")
    now = stage_record(config, {})
    assert reasons(runs, config, now) == []
    assert len(reasons(runs, config, now, str(runs.stage(before.kind, before.fingerprint).path))) == 1


def test_record_that_cannot_be_read_is_passed_over(data: Path, config: StageConfig) -> None:
    runs = Runs(data.parent / "runs")
    before = prepare(runs, config)
    runs.stage(before.kind, before.fingerprint).config.write_text("{")
    data.write_text("other\n")
    assert reasons(runs, config, stage_record(config, {})) == []
