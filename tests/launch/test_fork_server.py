"""Stages forked from a server that has their libraries loaded: what they find, how they end, what is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.launch.attempt import launch
from flows.launch.forked import Forked, Forks, ForkServer
from flows.launch.launcher import Job
from flows.launch.local import environment
from flows.processes import MARK_VARIABLE
from flows.runs.stage_record import stage_record
from stages.contract.config import Compute
from stages.contract.errors import ExitStatus
from stages.kinds.dataset import DatasetConfig
from stages.store.files import write_json
from stages.store.folders import StageFolder
from stages.store.manifest import verify_manifest

PROGRAMS = ("tests.launch.forked_programs",)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    variables = environment(Compute(threads=1), 1) | {"PYTHONDEVMODE": "1"}  # in which libraries do not work
    server = ForkServer(variables, tmp_path_factory.mktemp("server") / "log", PROGRAMS)
    yield server
    server.stop()


def started(server: ForkServer, folder: Path, program: str, *arguments: str) -> Forked:
    with (folder / "log").open("ab") as log:
        forked = server.start(folder, [program, *arguments], folder / "attempt", log)
    assert forked is not None
    return forked


def wait(forked: Forked, seconds: float = 30.0) -> int:
    until = time.monotonic() + seconds
    while (status := forked.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return status


def appears(path: Path) -> str:
    until = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    return path.read_text()


def test_forked_stage_has_its_own_session_folder_environment_and_log(server: ForkServer, tmp_path: Path) -> None:
    facts = (
        "dict(pid=os.getpid(), session=os.getsid(0), folder=os.getcwd(), mark=os.environ['R1_ATTEMPT'],"
        " threads=os.environ['OMP_NUM_THREADS'], stdin=sys.stdin.read(),"
        " switched=[sys.flags.dev_mode, 'PYTHONDEVMODE' in os.environ])"
    )
    program = f"import json, os, sys; print('said', file=sys.stderr); print(json.dumps({facts}))"
    assert wait(started(server, tmp_path, program)) == 0
    said, line = (tmp_path / "log").read_text().splitlines()
    found = json.loads(line)
    assert said == "said"
    assert found["session"] == found["pid"]
    assert (found["folder"], found["mark"], found["threads"], found["stdin"]) == (
        str(tmp_path),
        str(tmp_path / "attempt"),
        "1",
        "",
    )


def test_forked_stages_do_not_share_what_they_change(server: ForkServer, tmp_path: Path) -> None:
    program = "print(hasattr(module, 'changed')); module.changed = True"
    for _ in range(2):
        assert wait(started(server, tmp_path, program)) == 0
    assert (tmp_path / "log").read_text().split() == ["False", "False"]


@pytest.mark.parametrize(
    ("program", "status"),
    [("status = 2", 2), ("import os; os._exit(75)", 75), ("import os; os.kill(os.getpid(), 9)", -9), ("1 / 0", 1)],
)
def test_status_of_a_forked_stage(server: ForkServer, tmp_path: Path, program: str, status: int) -> None:
    assert wait(started(server, tmp_path, program)) == status
    assert ("ZeroDivisionError" in (tmp_path / "log").read_text()) == (program == "1 / 0")


def test_status_of_stages_side_by_side(server: ForkServer, tmp_path: Path) -> None:
    long = started(server, tmp_path, "import time; time.sleep(0.5); status = 3")
    short = started(server, tmp_path, "status = 4")
    assert (wait(short), wait(long)) == (4, 3)


def test_end_of_a_forked_stage_asks_it_and_leaves_nothing_running(server: ForkServer, tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "def stop(*_): pathlib.Path('checkpoint').write_text('whole'); os._exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "far = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "pathlib.Path('pids').write_text(f'{os.getpid()} {far.pid}')\n"
        "time.sleep(600)"
    )
    forked = started(server, tmp_path, program)
    pids = [int(pid) for pid in appears(tmp_path / "pids").split()]
    forked.end(10.0)
    assert (tmp_path / "checkpoint").read_text() == "whole"
    assert forked.poll() == 75
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_server_that_was_killed_is_noticed_and_its_stage_followed_to_the_end(tmp_path: Path) -> None:
    server = ForkServer(environment(Compute(threads=1), 1), tmp_path / "server.log", PROGRAMS)
    forked = started(server, tmp_path, "import pathlib, time; time.sleep(1.0); pathlib.Path('end').write_text('reached')")
    server._process.kill()
    server._process.wait()
    assert forked.poll() is None
    assert wait(forked) == 1
    assert (tmp_path / "end").read_text() == "reached"
    with (tmp_path / "log").open("ab") as log:
        assert server.start(tmp_path, ["status = 0"], tmp_path, log) is None
    server.stop()


def test_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flows.launch.forked import ForkServer; import os\n"
        "server = ForkServer(dict(os.environ), Path(sys.argv[1]), ())\n"
        "print(server._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    variables = environment(Compute(threads=1), 1)
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pid, until = int(done.stdout), time.monotonic() + 30
    while psutil.pid_exists(pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_both_stages_of_a_run_are_forked_by_one_server_and_equal(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    forks = Forks(tmp_path / "server.log", ("stages.kinds.dataset",))
    digests, notes = [], list[str]()
    try:
        for number in (1, 2):
            config = DatasetConfig(kind="dataset", path=str(tmp_path / "rows.jsonl"), compute=Compute(threads=1))
            folder = StageFolder(tmp_path / f"stage{number}")
            record = stage_record(config, {}, [str(tmp_path)])
            write_json(folder.config, record.model_dump())
            outcome = launch(folder, config.compute, note=notes.append, forks=forks)
            assert outcome.status is ExitStatus.DONE, outcome.message
            manifest = verify_manifest(folder, record.fingerprint)
            assert manifest is not None
            digests.append(manifest.digest)
        assert digests[0] == digests[1]
        assert notes == []
        parents = [psutil.Process(forks._server._process.pid).ppid()]  # type: ignore[union-attr]
        assert parents == [os.getpid()]
    finally:
        forks.stop()


def test_stage_with_another_environment_has_an_interpreter_of_its_own_once_the_server_was_used(tmp_path: Path) -> None:
    forks = Forks(tmp_path / "server.log", PROGRAMS)
    job: Any = Job(StageFolder(tmp_path), tmp_path / "attempt", Compute())
    variables = environment(Compute(threads=1), 1)
    other = variables | {"OMP_NUM_THREADS": "7"}
    tracked = other | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    try:
        assert forks.load(variables) is forks.load(variables)
        with (tmp_path / "log").open("ab") as log:
            forked = forks.start(job, other, ["import os; print(os.environ['OMP_NUM_THREADS'])"], log)
            assert forked is not None  # the server that nothing had used made way
            assert wait(forked) == 0
            again = forks.start(job, tracked, ["import os; print(os.environ['MLFLOW_HTTP_REQUEST_TIMEOUT'])"], log)
            assert again is not None  # what MLflow's client sets is the stage's, and no reason to load anew
            assert wait(again) == 0
            assert forks.start(job, variables, [], log) is None
        assert (tmp_path / "log").read_text() == "7\n10\n"
    finally:
        forks.stop()
    assert MARK_VARIABLE not in variables
