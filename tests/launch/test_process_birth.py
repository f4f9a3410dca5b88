"""Which process an id stands for, whatever becomes of the wall clock, and who starts a server alone."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.processes import alive, birth
from flows.servers.prefect_env import alone_at_start, home
from tests.conftest import ROOT


def test_process_is_alive_after_the_wall_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `psutil.boot_time()` moves when the clock is set, and `create_time()` with it."""
    process = psutil.Process()
    born, by_the_clock = birth(os.getpid()), process.create_time()
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 3600)
    assert alive(os.getpid(), born)
    assert not alive(os.getpid(), by_the_clock)  # what records of earlier versions hold


def test_birth_stays_and_differs_between_processes() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            born = birth(child.pid)
            assert born == birth(child.pid)
            assert born != birth(os.getpid())
            assert alive(child.pid, born)
            assert not alive(child.pid, birth(os.getpid()))
        finally:
            child.kill()
        child.wait()
        assert not alive(child.pid, born)
    with pytest.raises(psutil.NoSuchProcess):
        birth(child.pid)


def test_birth_of_a_program_with_an_odd_name(tmp_path: Path) -> None:
    program = tmp_path / "a) 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as child:
        try:
            assert alive(child.pid, birth(child.pid))
            ticks = int(str(birth(child.pid)).split()[1])
            seconds = ticks / os.sysconf("SC_CLK_TCK")
            assert abs(time.clock_gettime(time.CLOCK_BOOTTIME) - seconds) < 30
        finally:
            child.kill()


def test_servers_of_one_runs_folder_start_one_after_the_other(tmp_path: Path) -> None:
    """Two that migrate a fresh database at once: one of them fails."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom flows.servers.prefect_env import alone_at_start\n"
        "with alone_at_start(Path(sys.argv[1])):\n"
        "    begun = time.monotonic(); time.sleep(0.5); print(begun, time.monotonic())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    spans = sorted(tuple(map(float, pipe.communicate(timeout=60)[0].split())) for pipe in pipes)
    assert [len(span) for span in spans] == [2, 2, 2]
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))


def test_start_of_a_killed_run_holds_nobody_up(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom flows.servers.prefect_env import alone_at_start\n"
        "with alone_at_start(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False, timeout=60)
    assert (home(tmp_path) / ".starting.lock").exists()
    begun = time.monotonic()
    with alone_at_start(tmp_path):
        assert time.monotonic() - begun < 5
