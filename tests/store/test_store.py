"""Folders, manifests, whole files, the journal, locks: what makes a finished stage a fact."""

import errno
import fcntl
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from stages.contract.config import (
    EXECUTION,
    Config,
    DatasetRef,
    ExternalPath,
    ModelRef,
    StageConfig,
    external_paths,
    semantic,
    stage_inputs,
)
from stages.contract.errors import UserError
from stages.store.files import TEMPORARY, digest_path, files_below, whole_folder, write_bytes, write_json
from stages.store.folders import Runs, StageFolder
from stages.store.locks import hold
from stages.store.manifest import InputRecord, StageRecord, verify_manifest, write_manifest
from stages.tracking.journal import Follower, Journal, read


class Inner(Config):
    depth: int = 1
    speed: Annotated[int, EXECUTION] = 2
    file: ExternalPath | None = None


class Example(StageConfig):
    model: ModelRef
    more: dict[str, DatasetRef] = Field(default_factory=dict)
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()


def test_what_is_semantic_and_what_is_an_input():
    config = Example(kind="x", model="base", more={"a": "d1"}, inner=Inner(file="f.txt"), several=(Inner(depth=5, speed=9),))
    assert semantic(config) == {"kind": "x", "seed": 0, "inner": {"depth": 1}, "several": [{"depth": 5}]}
    assert stage_inputs(config) == {"model": ("base", "model"), "more.a": ("d1", "dataset")}
    assert external_paths(config) == {"inner.file": "f.txt"}


def record() -> StageRecord:
    inputs = {"data": InputRecord(digest="d", path="/somewhere")}
    return StageRecord(kind="toy_base", version=1, fingerprint="f" * 64, config={}, inputs=inputs)


@pytest.fixture
def finished(tmp_path: Path) -> StageFolder:
    folder = StageFolder(tmp_path / "stage")
    with whole_folder(folder.output("model")) as output:
        (output / "weights").write_bytes(b"weights")
        (output / "sub").mkdir()
        (output / "sub" / "config").write_bytes(b"config")
    write_json(folder.config, record().model_dump())
    facts: dict[str, Any] = {"metrics": {"loss": 1.0}, "notes": {}, "tokens": 3, "wall_seconds": 1.0, "device_seconds": 2.0}
    write_manifest(folder, record(), "model", **facts)
    return folder


def test_a_manifest_is_believed_when_everything_is_as_it_says(finished: StageFolder):
    manifest = verify_manifest(finished, "f" * 64)
    assert manifest is not None
    assert sorted(manifest.files) == ["sub/config", "weights"]
    assert manifest.files["weights"]["size"] == 7
    # printf weights | sha256sum
    assert manifest.files["weights"]["sha256"].startswith("9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848")
    assert verify_manifest(StageFolder(finished.path / "other")) is None


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "add", "manifest", "empty manifest", "newer", "other"])
def test_a_manifest_is_refused_when_anything_is_not(finished: StageFolder, harm: str):
    weights, manifest = finished.output("model") / "weights", finished.manifest
    document = json.loads(manifest.read_text())
    expected = "f" * 64
    if harm == "flip":
        weights.write_bytes(b"weighty")
    elif harm == "cut":
        weights.write_bytes(b"weight")
    elif harm == "remove":
        weights.unlink()
    elif harm == "add":
        weights.with_name("more").write_bytes(b"")
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif harm == "empty manifest":
        manifest.write_text("")
    elif harm == "newer":
        manifest.write_text(json.dumps(document | {"schema_number": 99}))
    else:
        expected = "e" * 64
    with pytest.raises(UserError) as caught:
        verify_manifest(finished, expected)
    assert str(manifest) in str(caught.value)


def test_digests_see_names_and_contents_but_not_places(tmp_path: Path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(content)
    assert digest_path(tmp_path / "a") == digest_path(tmp_path / "b") != digest_path(tmp_path / "c")
    (tmp_path / "b" / "file").rename(tmp_path / "b" / "renamed")
    assert digest_path(tmp_path / "a") != digest_path(tmp_path / "b")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as temporary:
        (temporary / "half").write_bytes(b"x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in (b"old", b"new"):
        with whole_folder(tmp_path / "out") as temporary:
            (temporary / "file").write_bytes(content)
    assert (tmp_path / "out" / "file").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_unfinished_files_are_passed_over(tmp_path: Path):
    write_bytes(tmp_path / "a", b"1")
    (tmp_path / f"{TEMPORARY}b").write_bytes(b"2")
    assert [p.name for p in files_below(tmp_path)] == ["a"]


def test_generations_of_a_stage_folder(tmp_path: Path):
    runs = Runs(tmp_path).prepare()
    first = runs.stage("rl", "a" * 64)
    assert first.path.name == "rl-aaaaaaaaaaaa"
    assert runs.stage("rl", "a" * 64, fresh=True).path.name == "rl-aaaaaaaaaaaa"  # nothing there yet: the first is fresh
    first.path.mkdir()
    second = runs.stage("rl", "a" * 64, fresh=True)
    assert second.path.name == "rl-aaaaaaaaaaaa-g2"
    second.path.mkdir()
    assert runs.stage("rl", "a" * 64).path == second.path
    assert runs.stage("rl", "b" * 64).path.name == "rl-bbbbbbbbbbbb"


def test_runs_are_numbered_and_found(tmp_path: Path):
    runs = Runs(tmp_path).prepare()
    folders = [runs.new_pipeline("x") for _ in range(2)]
    assert folders[0].path.name.endswith("-1")
    assert folders[1].path.name.endswith("-2")
    for number, folder in enumerate(folders):
        folder.write({"started": str(number)})
    assert runs.pipeline("latest").path == folders[1].path
    assert runs.pipeline(folders[0].path.name).path == folders[0].path
    with pytest.raises(UserError, match="no run `nothing`"):
        runs.pipeline("nothing")


def test_the_journal_is_cut_back_to_the_checkpoint_and_a_torn_line_goes(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, keep_through=0)
    for step in (1, 2, 3):
        journal.append(step, 5, {"x": float(step)})
    with path.open("a") as file:
        file.write('{"step": 4, "of"')
    assert [line.step for line in read(path)] == [1, 2, 3]
    journal = Journal(path, keep_through=2)
    journal.append(3, 5, {"x": 30.0})
    assert [(line.step, line.metrics["x"]) for line in read(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_follower_sees_each_line_once_and_starts_again_after_a_cut(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    follower = Follower(path)
    assert list(follower.new_lines()) == []
    journal = Journal(path, keep_through=0)
    journal.append(1, 3, {})
    journal.append(2, 3, {})
    assert [x.step for x in follower.new_lines()] == [1, 2]
    assert list(follower.new_lines()) == []
    again = Journal(path, keep_through=1)
    again.append(2, 3, {"longer": 1.0})
    again.append(3, 3, {})
    assert [x.step for x in follower.new_lines()] == [1, 2, 3]


def _hold(path: str, seconds: float) -> None:
    with hold(StageFolder(Path(path)), lambda _: None):
        (Path(path) / "held").write_text("")
        time.sleep(seconds)


def test_a_second_owner_waits_and_is_told_for_whom(tmp_path: Path):
    # `spawn`: a fork of a process with threads may hang.
    other = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(tmp_path), 1.5))
    other.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    said: list[str] = []
    started = time.monotonic()
    with hold(StageFolder(tmp_path), said.append):
        waited = time.monotonic() - started
    other.join()
    assert len(said) == 1
    assert f"process {other.pid}" in said[0]
    assert waited > 0.3


def test_a_lock_of_a_dead_owner_holds_nobody_up(tmp_path: Path):
    other = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(tmp_path), 60))
    other.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    other.kill()
    other.join()
    said: list[str] = []
    with hold(StageFolder(tmp_path), said.append):
        pass
    assert said == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"has no locks.*runs=FOLDER"), hold(StageFolder(tmp_path / "s"), print):
        raise AssertionError("held")


def test_json_keeps_its_order(tmp_path: Path):
    write_json(tmp_path / "x.json", {"b": 1, "a": 2})
    assert list(json.loads((tmp_path / "x.json").read_text())) == ["b", "a"]


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "lose"])
def test_a_damaged_journal_is_mended_from_the_checkpoints_copy(tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]):
    path, copy = tmp_path / "journal.jsonl", tmp_path / "copy.jsonl"
    journal = Journal(path, keep_through=0)
    for step in range(1, 5):
        journal.append(step, 9, {"a": float(step)})
    copy.write_bytes(path.read_bytes())
    whole = read(path)
    journal.append(5, 9, {"a": 5.0})  # after the checkpoint: the step is taken again
    lines = path.read_bytes().splitlines(keepends=True)
    if harm == "cut":
        path.write_bytes(b"".join(lines[:3]) + lines[3][:9])
    elif harm == "flip":
        path.write_bytes(lines[0] + b"\x00" + b"".join(lines[1:])[1:])
    elif harm == "lose":
        path.write_bytes(lines[0] + b"".join(lines[2:]))
    else:
        path.unlink()
    Journal(path, keep_through=4, copy=copy)
    assert read(path) == whole
    assert "mended" in capsys.readouterr().err
    Journal(path, keep_through=4, copy=copy)
    assert "mended" not in capsys.readouterr().err
