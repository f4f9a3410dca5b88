"""A stage's process tree, with small programs in place of stages."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows.launch.attempt import launch, read_outcome
from stages.contract.config import Compute
from stages.contract.errors import ExitStatus
from stages.store.folders import StageFolder
from tests.commands import environment

STEPS = """
import json, pathlib, sys, time
attempt = pathlib.Path(sys.argv[1])
journal = attempt.parents[1] / "journal.jsonl"
with journal.open("a") as file:
    for step in (1, 2, 3):
        file.write(json.dumps({"step": step, "of": 3, "time": 0, "metrics": {"a": 1.0}}) + "\\n"); file.flush(); time.sleep(0.1)
print("said")
(attempt / "outcome.json").write_text(json.dumps({"status": "done", "message": "", "mend": ""}))
"""
STOPPABLE = """
import json, os, pathlib, signal, subprocess, sys, time
attempt = pathlib.Path(sys.argv[1])
def stop(*_):
    (attempt / "checkpoint").write_text("whole")
    (attempt / "outcome.json").write_text(json.dumps({"status": "interrupted", "message": "stopped", "mend": ""}))
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
far = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(attempt / "pids").write_text(f"{os.getpid()} {far.pid}")
time.sleep(600)
"""
STUBBORN = STOPPABLE.replace("signal.signal(signal.SIGTERM, stop)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def folder_at(path: Path) -> StageFolder:
    path.mkdir()
    return StageFolder(path)


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids)


def pids_of(folder: StageFolder) -> list[int]:
    for _ in range(200):
        found = list(folder.attempts.glob("*/pids"))
        if found and len(text := found[0].read_text().split()) == 2:
            return [int(pid) for pid in text]
        time.sleep(0.05)
    raise AssertionError("the program did not start")


def test_a_finished_attempt_gives_its_lines_and_log(tmp_path: Path) -> None:
    folder, lines = folder_at(tmp_path / "s"), []
    outcome = launch(folder, Compute(), on_line=lines.append, command=program(STEPS))
    assert outcome.status is ExitStatus.DONE
    assert [line.step for line in lines] == [1, 2, 3]
    assert (outcome.attempt / "log.txt").read_text() == "said\n"
    assert not (outcome.attempt / "ended.json").exists()


def test_an_attempt_that_says_nothing_has_failed(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "s")
    outcome = launch(folder, Compute(), command=program("import os; os._exit(9)"))
    assert outcome.status is ExitStatus.FAILED
    assert "status 9" in outcome.message
    assert "log.txt" in outcome.mend
    ended = json.loads((outcome.attempt / "ended.json").read_text())
    assert ended["status"] == 3
    assert ended["seconds"] >= 0


def test_threads_are_shared_among_processes(tmp_path: Path) -> None:
    text = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'], os.environ['R1_PARENT_PID'])"
    outcome = launch(folder_at(tmp_path / "s"), Compute(threads=3), command=program(text))
    assert (outcome.attempt / "log.txt").read_text().split() == ["3", "3", str(os.getpid())]


@pytest.mark.parametrize("child", [STOPPABLE, STUBBORN])
def test_an_interrupted_parent_leaves_nothing_running(tmp_path: Path, child: str) -> None:
    folder = folder_at(tmp_path / "s")
    parent = (
        # What a shell starts in the background begins with SIGINT ignored, and so would this.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys, pathlib; from flows.launch.attempt import launch; from stages.contract.config import Compute; "
        "from stages.store.folders import StageFolder; "
        "launch(StageFolder(pathlib.Path(sys.argv[1])), Compute(), 3.0, command=[sys.executable, '-c', sys.argv[2]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(folder.path), child], env=environment(), stderr=subprocess.DEVNULL
    )
    pids = pids_of(folder)
    time.sleep(1.5)  # so that the tree has been looked at
    process.send_signal(signal.SIGINT)
    process.wait(20)
    assert gone(pids)
    attempt = folder.attempts / "1"
    if child is STOPPABLE:
        assert (attempt / "checkpoint").read_text() == "whole"
        assert json.loads((attempt / "ended.json").read_text())["status"] == 75


def test_a_child_stopped_by_somebody_else_is_interrupted(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "s")

    def stop() -> None:
        os.kill(pids_of(folder)[0], signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    outcome = launch(folder, Compute(), command=program(STOPPABLE))
    thread.join()
    assert outcome.status is ExitStatus.INTERRUPTED
    assert gone(pids_of(folder))


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [
        ({"": "interrupted", "-rank1": "mistake"}, ExitStatus.MISTAKE),
        ({"": "failed", "-rank1": "mistake"}, ExitStatus.MISTAKE),
        ({"": "interrupted", "-rank1": "failed"}, ExitStatus.FAILED),
        ({"-rank1": "failed"}, ExitStatus.FAILED),
        ({"": "done", "-rank1": "failed"}, ExitStatus.DONE),
        ({}, ExitStatus.FAILED),
    ],
)
def test_the_most_telling_rank_is_believed(tmp_path: Path, ranks: dict[str, str], wanted: ExitStatus) -> None:
    for suffix, status in ranks.items():
        document = {"status": status, "message": f"{suffix} {status}", "mend": ""}
        (tmp_path / f"outcome{suffix}.json").write_text(json.dumps(document))
    assert read_outcome(tmp_path, 1).status is wanted


SIGNS = """
import os, pathlib, signal, sys, time
from stages.runtime import heartbeat
attempt = pathlib.Path(sys.argv[1])
heartbeat.PERIOD = 0.1
heartbeat.start(attempt, 0)
until = time.monotonic() + float(os.environ["GETS_ON_S"])
while time.monotonic() < until:
    heartbeat.progress()
    time.sleep(0.05)
if os.environ["THEN"] == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
if os.environ["THEN"] == "hang":
    time.sleep(600)
(attempt / "outcome.json").write_text('{"status": "done", "message": "", "mend": ""}')
"""


@pytest.mark.parametrize(
    ("then", "says"), [("stop", "rank0 has given no sign of life"), ("hang", "no rank has got on for"), ("", "")]
)
def test_what_hangs_is_ended_and_what_gets_on_is_not(tmp_path, monkeypatch, then, says):
    monkeypatch.setenv("THEN", then)
    monkeypatch.setenv("GETS_ON_S", "3")
    folder = folder_at(tmp_path / "stage")
    # What gets on for 3 s is not ended by a bound of 2.
    compute = Compute(frozen_s=1.5 if then == "stop" else 60, silent_s=2.0)
    began = time.monotonic()
    outcome = launch(folder, compute, command=program(SIGNS))
    assert outcome.status is (ExitStatus.FAILED if then else ExitStatus.DONE)
    assert says in outcome.message
    assert time.monotonic() - began < 12
