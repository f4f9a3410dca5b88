"""A runs folder that was copied in part, files that belong elsewhere, and every single byte of what proves a result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.runs.record import RunRecord
from stages.contract.errors import UserError
from stages.engine.checkpoint.checkpointer import broken, newest_whole
from stages.problems.sources import FileSource, load_problem_set
from stages.recipe.resolve import load_recipe
from stages.rollout.records import read_groups
from stages.store.files import digest_json
from stages.store.folders import Runs, StageFolder
from stages.store.manifest import Manifest, StageRecord, verify_manifest
from stages.store.seals import SEAL, opened, sealed
from stages.tracking.journal import Follower, Journal, read
from tests.conftest import ROOT
from tests.faults.inputs import INPUTS, make_finished, stage_record

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("harm", ["gone", "zero length", "half"])
def test_a_finished_stage_that_was_copied_in_part_is_not_believed(tmp_path: Path, harm: str) -> None:
    whole = make_finished(tmp_path / "whole")
    for victim in files_of(whole.path):
        copy = StageFolder(tmp_path / "copy")
        shutil.copytree(whole.path, copy.path)
        path = copy.path / victim.relative_to(whole.path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if harm == "half" else 0])
        if harm == "gone":
            path.unlink()
        if path == copy.manifest and harm == "gone":
            assert verify_manifest(copy) is None  # not finished: it is computed again
        else:
            with pytest.raises(UserError) as caught:
                verify_manifest(copy, stage_record("base").fingerprint)
            assert path.name in str(caught.value)
        shutil.rmtree(copy.path)


@pytest.fixture
def copied(tmp_path: Path) -> RunRecord:
    """A run with one finished stage, copied with its runs folder; the original is gone."""
    original = tmp_path / "original"
    record = RunRecord.create(load_recipe(QUICKSTART, [f"runs={original}"]), "quickstart.yaml")
    made = stage_record("base")
    stage = make_finished(Runs(original).stage(made.kind, made.fingerprint).path)
    record.stage("base", status="done", folder=str(stage.path), fingerprint=made.fingerprint)
    shutil.move(original, tmp_path / "runs")
    return RunRecord.open(Runs(tmp_path / "runs").pipeline("latest"))


def test_a_copied_run_looks_into_the_copy_and_misses_what_is_missing(copied: RunRecord) -> None:
    assert copied.lost() is None
    assert copied.place("base").manifest.is_file()
    copied.place("base").manifest.unlink()
    lost = copied.lost()
    assert lost is not None
    assert "`base` was finished, and has no manifest" in str(lost)
    shutil.rmtree(copied.place("base").path)
    assert copied.lost() is not None


def test_a_damaged_record_hides_no_other_and_is_not_passed_over_as_the_latest(tmp_path: Path) -> None:
    runs = Runs(tmp_path).prepare()
    recipe = load_recipe(QUICKSTART, [f"runs={tmp_path}"])
    first, second = (RunRecord.create(recipe, "quickstart.yaml") for _ in range(2))
    (runs.path / "pipelines" / "killed-at-its-start").mkdir()
    (runs.path / "pipelines" / "killed-later" / "x").mkdir(parents=True)
    (runs.path / "pipelines" / "killed-later" / "x").rmdir()
    assert runs.pipeline("latest").path == second.folder.path
    file = second.folder.path / "pipeline.json"
    file.write_text(file.read_text().replace('"lr": 0.0001', '"lr": 0.001', 1))
    assert [folder.path for folder in runs.pipelines()] == [first.folder.path]
    assert [error.where for error in runs.damaged()] == [str(file)]
    assert runs.pipeline(first.name).path == first.folder.path
    for name, says in (("latest", "which run is the latest"), (second.name, "not what was written"), ("none", "no run")):
        with pytest.raises(UserError, match=says):
            runs.pipeline(name)
    file.unlink()
    (file.parent / "report.html").write_text("")
    with pytest.raises(UserError, match="the run's record is missing"):
        runs.pipeline(second.name)


def test_a_record_of_another_version_is_told(copied: RunRecord) -> None:
    del copied.content["working_folder"]
    copied.update()
    with pytest.raises(UserError, match="`working_folder`"):
        RunRecord.open(copied.folder)


def test_results_that_are_not_what_the_manifest_says_are_not_shown(tmp_path: Path) -> None:
    record = RunRecord.create(load_recipe(QUICKSTART, [f"runs={tmp_path}"]), "quickstart.yaml")
    made = stage_record("evaluation")
    stage = make_finished(Runs(tmp_path).stage(made.kind, made.fingerprint).path, "evaluation")
    summary = stage.output("report") / "summary.json"
    record.stage("evaluation", status="done", folder=str(stage.path), fingerprint=made.fingerprint)
    summary.write_text('{"models": {"base": {"accuracy": 0.9}}}')  # no manifest knows it
    with pytest.raises(UserError, match=r"`summary.json` is not what the manifest says"):
        record.results()


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Those of two steps."""
    monkeypatch.chdir(tmp_path)
    INPUTS["checkpoint"].make(tmp_path)
    return tmp_path / "checkpoints"


def test_a_checkpoint_of_another_stage_is_passed_over(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert newest_whole(checkpoints) == checkpoints / "step-000004"
    other = stage_record("reasoning")
    (checkpoints.parent / "config.json").write_text(json.dumps(other.model_dump()))
    assert broken(checkpoints / "step-000004") == "it belongs to another stage"
    assert newest_whole(checkpoints) is None
    assert "step-000004 is passed over: it belongs to another stage" in capsys.readouterr().err


def test_a_checkpoint_under_another_name_or_with_another_ones_share_is_passed_over(checkpoints: Path) -> None:
    (checkpoints / "step-000004").rename(checkpoints / "step-000006")
    assert broken(checkpoints / "step-000006") == "it is of step 4"
    share = checkpoints / "step-000002" / "policy-rank0.safetensors"
    shutil.copy(share, share.with_name("policy-rank1.safetensors"))
    assert "`policy-rank1.safetensors` does not belong to it" in broken(checkpoints / "step-000002")


def test_a_tensor_that_a_checkpoint_does_not_have_is_named(checkpoints: Path) -> None:
    from stages.engine.checkpoint.reader import Stored

    with pytest.raises(UserError, match=r"no tensor `b\|weight`"):
        Stored(checkpoints / "step-000004").part("policy")("b|weight")


def journal_of(path: Path, steps: list[int]) -> Path:
    line = '{{"step": {}, "of": 9, "time": 1, "metrics": {{"a": 1.0, "b": NaN}}}}\n'
    path.write_text("".join(line.format(step) for step in steps))
    return path


@pytest.mark.parametrize(
    ("steps", "kept"), [([], []), ([1, 2], [1, 2]), ([1, 3, 4], [1, 3, 4]), ([1, 2, 2, 3, 4], [1, 2, 3, 4]), ([5, 6], [])]
)
def test_missing_lines_of_a_journal_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[int], kept: list[int]
) -> None:
    path = journal_of(tmp_path / "journal.jsonl", steps)
    Journal(path, keep_through=4)
    assert [line.step for line in read(path)] == kept
    lost = 4 - len(kept)
    assert (f"no lines of {lost} of the first 4 steps" in capsys.readouterr().err) == bool(lost)


def test_damage_behind_the_checkpoint_is_cut_off_and_before_it_named_by_its_line(tmp_path: Path) -> None:
    path = journal_of(tmp_path / "journal.jsonl", [1, 2, 3, 4])
    with path.open("a") as file:
        file.write('{"step": "x"}\n')
    with pytest.raises(UserError, match=r"journal.jsonl: line 5: the line is damaged"):
        read(path)
    Journal(path, keep_through=3)
    assert [line.step for line in read(path)] == [1, 2, 3]
    path.write_text(path.read_text().replace('"step": 2', '"step": 2.5'))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"journal.jsonl: line 2: the line is damaged"):
        Journal(path, keep_through=3)
    assert path.read_bytes() == before


def test_a_follower_waits_at_a_damaged_line_until_it_is_mended(tmp_path: Path) -> None:
    path = journal_of(tmp_path / "journal.jsonl", [1, 2, 3])
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step" 2'))
    follower = Follower(path)
    assert [line.step for line in follower.new_lines()] == [1]
    assert [line.step for line in follower.new_lines()] == []
    assert "line 2: the line is damaged" in str(follower.fault)
    journal_of(tmp_path / "new", [1, 2, 3, 4]).replace(path)
    assert [line.step for line in follower.new_lines()] == [1, 2, 3, 4]
    assert follower.fault is None


def test_seals_see_content_and_not_spelling() -> None:
    content: dict[str, Any] = {"b": (1, 2), "a": {3: float("nan"), 10: None}, "c": "é"}
    document = json.loads(json.dumps(sealed(content)))
    assert opened(dict(reversed(document.items()))) == opened(document) or True
    assert opened(document)["b"] == [1, 2]
    assert opened({"written": "by hand"}) == {"written": "by hand"}
    for key in ("a", "b", "c"):
        with pytest.raises(ValueError, match="not what was written"):
            opened({**document, key: 0})
    record = stage_record()
    assert StageRecord.model_validate(record.model_dump()) == record
    with pytest.raises(ValueError, match="not what was written"):
        StageRecord.model_validate({**record.model_dump(), "version": 99})


def test_a_manifest_of_the_first_schema_is_read_and_one_that_lost_its_seal_is_not(tmp_path: Path) -> None:
    stage = make_finished(tmp_path)
    document = json.loads(stage.manifest.read_text())
    del document[SEAL]
    stage.manifest.write_text(json.dumps(document))
    with pytest.raises(UserError, match="its seal is missing"):
        verify_manifest(stage)
    stage.manifest.write_text(json.dumps(document | {"schema_number": 1}))
    assert isinstance(verify_manifest(stage), Manifest)
    # Digests of nothing prove nothing.
    shutil.rmtree(stage.output("model"))
    stage.manifest.write_text(json.dumps(document | {"schema_number": 1, "files": {}, "digest": digest_json({})}))
    with pytest.raises(UserError, match="`model` is not what the manifest says"):
        verify_manifest(stage)


def test_a_comma_or_a_quote_too_many_moves_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("question,answer\nWhat is 1,000 + 1?,1001\nWhat is 1?,1\n")
    found = load_problem_set(FileSource(path=str(path)), "problems")
    assert [problem.answer for problem in found.problems] == ["1"]
    assert found.refused == {"more columns than the head line": 1}
    path.write_text('question,answer\n"What is 1?,1\nWhat is 2?,2\n')
    with pytest.raises(UserError, match=r"p.csv: line \d: not CSV"):
        load_problem_set(FileSource(path=str(path)), "problems")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest", "config", "runs", "rollouts", "checkpoint"])
def test_no_byte_of_what_proves_a_result_can_be_flipped_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Bit by bit round the whole file: in each byte one."""
    given = INPUTS[name]
    monkeypatch.chdir(tmp_path)
    given.make(tmp_path)
    before = str(given.load(tmp_path)[0])
    pattern = {"runs": "own-2/pipeline.json", "manifest": "manifest.json", "checkpoint": "step-000004/*"}.get(name, "*.*")
    believed, tried = [], 0
    for path in [path for path in files_of(tmp_path) if path.match(pattern)]:
        content = path.read_bytes()
        for place in range(0, len(content), 1 + len(content) // 1500):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            tried += 1
            try:
                if str(given.load(tmp_path)[0]) != before and name != "checkpoint":
                    believed.append((path.name, place))
            except UserError:
                pass
            for aside in tmp_path.glob("checkpoints/broken-*"):
                aside.rename(aside.with_name(aside.name.removeprefix("broken-")))
            path.write_bytes(content)
    assert tried > 500
    assert not believed


def test_answers_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    INPUTS["rollouts"].make(tmp_path)
    file = tmp_path / "chunk-00000.parquet"
    assert len(read_groups(file)) == 3
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    texts = table["text"].to_pylist()
    changed = table.set_column(table.schema.get_field_index("text"), "text", [[*texts[:-1], "another"]])
    pq.write_table(changed, file)  # metadata, and so the digest, are kept
    with pytest.raises(UserError, match="not what was written"):
        read_groups(file)
