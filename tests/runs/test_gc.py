"""`r1 gc`: never what something needs, always the rest, whole or not at all, whoever starts meanwhile."""

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.cli.gc import _remove
from flows.runs.retention import AWAY, Choice, Survey, Surveyor, newest_change
from stages.contract.errors import UserError
from stages.store.folders import Runs, StageFolder
from stages.store.locks import hold, is_held, try_hold
from tests.runs.built_runs import build_run, build_stage, call, folder_name


def names(runs: Path) -> set[str]:
    """The stage folders there."""
    return {path.name for path in (runs / "stages").iterdir()}


def rl(number: int) -> str:
    return folder_name("rl", number)


@st.composite
def worlds(draw: Any) -> dict[str, Any]:
    """Stages (each with inputs among those before it, pinned or not) and runs (stages, status, pinned or not)."""
    count = draw(st.integers(1, 6))
    stages = [
        {"inputs": draw(st.sets(st.integers(0, n - 1), max_size=2)) if n else set(), "pinned": draw(st.integers(0, 5)) == 0}
        for n in range(count)
    ]
    run = st.fixed_dictionaries(
        {
            "stages": st.sets(st.integers(0, count - 1), max_size=2),
            "status": st.sampled_from(["done", "failed", "mistake", "interrupted"]),
            "pinned": st.sampled_from([False, False, True]),
        }
    )
    return {"stages": stages, "runs": draw(st.lists(run, max_size=3)), "failed": draw(st.booleans())}


def expected(world: dict[str, Any]) -> tuple[set[int], set[int]]:
    """The stages and runs that stay: worked out stage by stage until nothing changes."""
    gone = {
        n
        for n, run in enumerate(world["runs"])
        if world["failed"] and run["status"] in ("failed", "mistake") and not run["pinned"]
    }
    stay = {n for n, stage in enumerate(world["stages"]) if stage["pinned"]}
    for n, run in enumerate(world["runs"]):
        stay |= run["stages"] if n not in gone else set()
    while more := {below for n in stay for below in world["stages"][n]["inputs"]} - stay:
        stay |= more
    return stay, set(range(len(world["runs"]))) - gone


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_what_is_needed_stays_and_the_rest_goes(world: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        for n, stage in enumerate(world["stages"]):
            build_stage(runs, rl(n), inputs={f"in.{i}": rl(i) for i in stage["inputs"]}, finished=False)
            if stage["pinned"]:
                call("pin", rl(n), "--runs", runs, "--json")
        for n, run in enumerate(world["runs"]):
            build_run(runs, f"r-{n}", {f"s{i}": rl(i) for i in run["stages"]}, status=run["status"])
            if run["pinned"]:
                call("pin", f"r-{n}", "--runs", runs, "--json")
        options = ["--runs", runs, "--json", *(["--failed"] if world["failed"] else [])]
        stay, runs_that_stay = expected(world)
        before = names(runs)
        _, shown = call("gc", "--dry-run", *options)
        assert names(runs) == before
        _, done = call("gc", "--yes", *options)
        assert names(runs) == {rl(n) for n in stay}
        there = (runs / "pipelines").iterdir() if world["runs"] else []
        assert {path.name for path in there} == {f"r-{n}" for n in runs_that_stay}
        assert shown["items"] == done["items"]
        assert call("gc", "--yes", *options)[1]["items"] == []


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three stages: 1 is an input of 2, which a run names; 3 is nobody's."""
    for number, inputs in ((1, {}), (2, {"policy": rl(1)}), (3, {})):
        build_stage(tmp_path, rl(number), inputs=inputs)
    build_run(tmp_path, "a-1", {"zero": rl(2)})
    return tmp_path


def test_it_asks_and_says_how_much(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--yes"):
        call("gc", "--runs", runs)
    assert names(runs) == {rl(1), rl(2), rl(3)}
    _, document = call("gc", "--runs", runs, "--dry-run")
    assert f"stages/{rl(3)}" in capsys.readouterr().out
    size = sum(path.stat().st_size for path in (runs / "stages" / rl(3)).rglob("*") if path.is_file())
    assert (document["bytes"], document["dry_run"], document["kept"][rl(1)]) == (size, True, f"input of {rl(2)}")


def test_what_a_recipe_names_by_path_stays(runs: Path) -> None:
    sections = {"next": {"kind": "rl", "problems": {"pass_rate": {"path": f"runs/stages/{rl(3)}/rollouts"}}}}
    build_run(runs, "b-1", {"next": None}, status="interrupted", sections=sections)
    assert call("gc", "--runs", runs, "--yes", "--json")[1]["items"] == []


def test_what_is_at_work_stays_with_its_inputs(runs: Path) -> None:
    build_stage(runs, rl(4), inputs={"rewards.preference_model.stage": rl(3)}, finished=False)
    with hold(StageFolder(runs / "stages" / rl(4)), lambda _: None):
        _, document = call("gc", "--runs", runs, "--yes", "--json")
    assert (document["items"], document["kept"][rl(4)]) == ([], "in use")
    alive = runs / "stages" / rl(4) / "attempts" / "1" / "alive-rank0"  # `python -m stages` takes no lock
    alive.parent.mkdir(parents=True)
    alive.touch()
    assert call("gc", "--runs", runs, "--yes", "--json")[1]["items"] == []
    os.utime(alive, (1, 1))
    call("gc", "--runs", runs, "--yes", "--json")
    assert names(runs) == {rl(1), rl(2)}


def test_checkpoints_go_when_asked_unless_something_continues_them(runs: Path) -> None:
    for number in (1, 2):
        checkpoint = StageFolder(runs / "stages" / rl(number)).checkpoint(4)
        checkpoint.mkdir(parents=True)
        (checkpoint / "policy-rank0.safetensors").write_bytes(b"x" * 1000)
    sections = {"old": {"kind": "rl"}, "more": {"kind": "rl", "continues": "old@4"}}
    build_run(runs, "b-1", {"old": rl(1), "more": None}, status="interrupted", sections=sections)
    unfinished = build_stage(runs, rl(5), finished=False)
    unfinished.checkpoint(2).mkdir(parents=True)
    build_run(runs, "c-1", {"zero": rl(5)}, status="interrupted")
    call("gc", "--runs", runs, "--yes", "--json")
    assert StageFolder(runs / "stages" / rl(2)).checkpoint(4).is_dir()
    _, document = call("gc", "--runs", runs, "--yes", "--json", "--checkpoints")
    assert [Path(item["path"]).parts[-3] for item in document["items"]] == [rl(2)]
    assert document["bytes"] == 1000
    assert StageFolder(runs / "stages" / rl(1)).checkpoint(4).is_dir()
    assert unfinished.checkpoint(2).is_dir()


def test_a_run_is_forgotten_when_asked_but_not_at_work_or_pinned(runs: Path) -> None:
    build_run(runs, "b-1", {"zero": rl(3)}, status="running")
    with pytest.raises(UserError, match="at work"):
        call("gc", "--runs", runs, "--yes", "--run", "b-1")
    build_run(runs, "b-1", {"zero": rl(3)}, status="interrupted")
    call("pin", "b-1", "--runs", runs)
    assert call("pin", "--runs", runs)[1]["pinned"] == ["b-1"]
    with pytest.raises(UserError, match="pinned"):
        call("gc", "--runs", runs, "--yes", "--run", "b-1")
    call("unpin", "b-1", "--runs", runs)
    call("gc", "--runs", runs, "--yes", "--json", "--run", "b-1")
    assert (names(runs), [p.name for p in (runs / "pipelines").iterdir()]) == ({rl(1), rl(2)}, ["a-1"])


def test_a_damaged_record_stops_it_and_can_be_forgotten(runs: Path) -> None:
    record = runs / "pipelines" / "a-1" / "pipeline.json"
    record.write_text(record.read_text().replace("made.yaml", "mode.yaml"))
    with pytest.raises(UserError, match="gc --run a-1"):
        call("gc", "--runs", runs, "--yes")
    assert names(runs) == {rl(1), rl(2), rl(3)}
    call("gc", "--runs", runs, "--yes", "--json", "--run", "a-1")
    assert names(runs) == set()


def test_what_changed_lately_stays_with_its_inputs(runs: Path) -> None:
    build_stage(runs, rl(4), inputs={"policy": rl(3)})
    for path in [runs / "stages" / rl(3), *(runs / "stages" / rl(3)).rglob("*")]:
        os.utime(path, (1, 1))
    assert newest_change(runs / "stages" / rl(3)) == 1
    assert call("gc", "--runs", runs, "--yes", "--json", "--older-than", "1h")[1]["items"] == []
    call("gc", "--runs", runs, "--yes", "--json", "--older-than", "0")
    assert names(runs) == {rl(1), rl(2)}


def test_what_a_killed_gc_or_attempt_left_goes_and_is_never_a_run(runs: Path) -> None:
    (runs / f"{AWAY}7-{rl(9)}" / "model").mkdir(parents=True)
    (runs / "stages" / rl(2) / "rollouts" / ".tmp-1-step").mkdir(parents=True)
    (runs / "stages" / "mine").mkdir()
    assert [folder.path.name for folder in Runs(runs).pipelines()] == ["a-1"]
    call("gc", "--runs", runs, "--yes", "--json")
    assert not list(runs.rglob(".tmp-*"))
    assert names(runs) == {rl(1), rl(2), "mine"}


def test_a_run_that_begins_meanwhile_keeps_its_stage(runs: Path) -> None:
    surveyor = Surveyor(Runs(runs), Choice())
    items = surveyor.look().items
    assert [item.path.name for item in items] == [rl(3)]
    build_run(runs, "b-1", {"zero": rl(3)}, status="interrupted")
    assert _remove(Runs(runs), surveyor, items[0]) == "something needs it by now"
    (runs / "pipelines" / "b-1" / "pipeline.json").unlink()
    with hold(StageFolder(runs / "stages" / rl(3)), lambda _: None):
        assert _remove(Runs(runs), surveyor, items[0]) == "its stage is in use"
    assert _remove(Runs(runs), surveyor, items[0]) == ""
    assert names(runs) == {rl(1), rl(2)}


def test_who_waits_for_a_folder_that_goes_begins_a_new_one(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, told, again = StageFolder(runs / "stages" / rl(3)), list[str](), list[bool]()
    held, done, look = threading.Event(), threading.Event(), Surveyor.look

    def pipeline() -> None:
        with hold(folder, told.append):
            again.append(folder.manifest.exists())
            held.set()
            done.wait(30)

    worker = threading.Thread(target=pipeline)

    def look_with_somebody_waiting(self: Surveyor, holding: str | None = None) -> Survey:
        if holding == rl(3):
            worker.start()
            while not told:
                time.sleep(0.01)
        return look(self, holding)

    monkeypatch.setattr(Surveyor, "look", look_with_somebody_waiting)
    _, document = call("gc", "--runs", runs, "--yes", "--json")
    assert [Path(item["path"]).name for item in document["items"]] == [rl(3)]
    assert held.wait(30)
    try:
        assert is_held(folder)  # by a lock that is in its place: the next one sees it
        with try_hold(folder) as mine:
            assert not mine
        assert again == [False]
    finally:
        done.set()
        worker.join()


def test_a_gc_that_is_killed_leaves_nothing_in_its_place(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flows.cli.gc.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            call("gc", "--runs", runs, "--yes", "--json")
    assert names(runs) == {rl(1), rl(2)}
    left = list(runs.glob(f"{AWAY}*"))
    assert len(left) == 1
    assert not (left[0] / ".lock").exists()  # whoever waited for it sees that it guards nothing
    call("gc", "--runs", runs, "--yes", "--json")
    assert not list(runs.glob(f"{AWAY}*"))


def test_a_run_that_is_resumed_meanwhile_keeps_everything(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Surveyor.look

    def resumed_after_the_first_look(self: Surveyor, holding: str | None = None) -> Survey:
        found = look(self, holding)
        build_run(runs, "a-1", {"zero": rl(2)}, status="running")
        return found

    monkeypatch.setattr(Surveyor, "look", resumed_after_the_first_look)
    _, document = call("gc", "--runs", runs, "--yes", "--json", "--run", "a-1")
    assert {Path(item["path"]).name: item["reason"] for item in document["skipped"]} == {
        "a-1": "the run was resumed",
        rl(1): "something needs it by now",
        rl(2): "something needs it by now",
    }
    assert names(runs) == {rl(1), rl(2)}
    assert call("status", "a-1", "--runs", runs, "--json")[1]["status"] == "running"
