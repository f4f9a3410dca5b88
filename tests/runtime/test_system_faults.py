"""What the operating system and Python's own switches do to a run: a line with a hint, no traceback, no false hint."""

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flows.servers.server_faults import start_fault
from stages.contract.errors import UserError
from stages.rewards.verifier_pool import pool as pools
from stages.rewards.verifier_pool.pool import Limits, Pool, Reply
from stages.runtime.python_switches import SWITCHES
from stages.store.system_faults import system_fault
from stages.tracking.default_uri import default_uri
from stages.tracking.mlflow.client import Connection
from tests.conftest import ROOT

UNKNOWN_REVISION = "ffffffffffff"


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "no room is left on the disk of /runs/x (bytes or inodes"),
        (errno.EDQUOT, "the disk quota is used up at /runs/x"),
        (errno.EROFS, "the file system is read-only at /runs/x"),
        (errno.EACCES, "permission denied at /runs/x"),
        (errno.EMFILE, "too many open files at /runs/x"),
    ],
)
def test_system_fault_names_the_place_and_what_to_do(number: int, says: str) -> None:
    assert str(system_fault(OSError(number, os.strerror(number), "/runs/x"))).startswith(says)


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "(sqlite3.OperationalError) database or disk is full",
    ],
)
def test_system_fault_reads_what_libraries_say(text: str) -> None:
    assert str(system_fault(RuntimeError(text))).startswith("no room is left on the disk (bytes or inodes")


def test_system_fault_looks_behind_a_librarys_error() -> None:
    hidden = RuntimeError("unexpected pos 64 vs 0")
    hidden.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/runs/model.safetensors")
    assert "/runs/model.safetensors" in str(system_fault(hidden))


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "No such file", "/x"), KeyError("28")])
def test_system_fault_is_silent_about_other_errors(error: Exception) -> None:
    assert system_fault(error) is None


def run_command(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `r1` after `program`, which prepares the process."""
    code = f"import sys\nfrom flows import cli\n{program}\nsys.exit(cli.main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_command_that_meets_a_full_disk_says_so_in_one_line(tmp_path: Path) -> None:
    full = f"OSError({errno.ENOSPC}, 'No space left on device', '/runs/pipeline.json')"
    program = f"import flows.cli.run\ndef fail(_): raise {full}\nflows.cli.run.status = fail"
    done = run_command(program, "status", "--runs", str(tmp_path))
    assert done.returncode == 3
    assert done.stderr.startswith("r1: no room is left on the disk of /runs/pipeline.json")
    assert len(done.stderr.splitlines()) == 1


def test_traceback_of_a_command_holds_no_secret(tmp_path: Path) -> None:
    program = "import flows.cli.run\ndef fail(_): raise RuntimeError(' http://me:geheim@host/ s3cr3t-value')\n"
    done = run_command(program + "flows.cli.run.status = fail", "status", "--runs", str(tmp_path), MY_TOKEN="s3cr3t-value")
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
    assert "geheim" not in done.stderr
    assert "s3cr3t-value" not in done.stderr


def test_python_without_docstrings_is_refused_in_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-OO", "-m", "flows.cli", "status", "--runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("r1: python -OO: without docstrings transformers and MLflow do not work")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("module", ["flows.cli", "stages"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("PYTHONOPTIMIZE", "2"), ("PYTHONWARNINGS", "error"), ("PYTHONINSPECT", "1"), ("PYTHONDEVMODE", "1")],
)
def test_switches_of_python_change_neither_output_nor_status(tmp_path: Path, module: str, name: str, value: str) -> None:
    """A mistake, so that it ends soon: status 2 with one line, where PYTHONINSPECT makes a traceback and 1 of it."""
    arguments = ["status", "no-such-run", "--runs", str(tmp_path)] if module == "flows.cli" else [str(tmp_path / "none")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), name: value}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert str(tmp_path) in done.stderr


def test_switches_of_python_reach_no_child(tmp_path: Path) -> None:
    program = (
        "import os, flows.cli.run\n"
        "def look(_):\n"
        f"    print([name for name in {SWITCHES!r} if name in os.environ], sys.flags.optimize)\n"
        "    raise KeyboardInterrupt\n"
        "flows.cli.run.status = look"
    )
    variables = {"PYTHONWARNINGS": "default", "PYTHONOPTIMIZE": "1", "PYTHONVERBOSE": ""}
    done = run_command(program, "status", "--runs", str(tmp_path), **variables)
    assert done.returncode == 75, done.stderr
    assert done.stdout == "[] 0\n"


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal closed", "nohup"])
def test_closed_terminal_ends_a_command_like_ctrl_c_unless_ignored(ignored: bool) -> None:
    code = (
        "import signal, os, sys\nfrom flows.cli.run import stop_on_signals\n"
        + ("signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" if ignored else "")
        + "stop_on_signals()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGHUP)\nexcept KeyboardInterrupt:\n    sys.exit(75)\nsys.exit(0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], timeout=60, env=environment, check=False)
    assert done.returncode == (0 if ignored else 75)


def test_command_goes_on_to_its_end_when_its_terminal_is_gone(tmp_path: Path) -> None:
    """What it prints then is lost, and no error: what it has to save is saved."""
    saved = tmp_path / "saved"
    code = (
        "import signal, os, time\nfrom pathlib import Path\nfrom flows.cli.run import stop_on_signals\nstop_on_signals()\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopping', flush=True)\n"
        f"    Path({str(saved)!r}).write_text('whole')\n    os._exit(75)\n"
    )
    process, terminal = os.forkpty()
    if process == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", code])
    text = b""
    while b"ready" not in text:
        text += os.read(terminal, 1024)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 75
    assert saved.read_text() == "whole"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alembic.util.exc.CommandError: Can't locate revision identified by '5b0bd3b41a23'", "written by another version"),
        ("sqlalchemy.exc.DatabaseError: (sqlite3.DatabaseError) file is not a database", "its database is damaged"),
        ("sqlite3.OperationalError: database or disk is full", "no room is left"),
        ("sqlite3.OperationalError: attempt to write a readonly database", "may not write its database"),
        ("[Errno 98] error while attempting to bind on address ('127.0.0.1', 4200): address already in use", "taken its port"),
    ],
)
def test_reason_of_a_server_that_does_not_start_is_read_from_its_log(tmp_path: Path, text: str, says: str) -> None:
    log = tmp_path / "server.log"
    log.write_text(f"Traceback\n  File x\n{text}\n\nServer stopped!\n")
    fault = start_fault("the Prefect server", log, 0, "/runs/prefect/prefect.db*")
    assert fault is not None
    assert says in str(fault)
    assert str(log) in str(fault)


def test_reason_of_an_earlier_start_is_not_taken_for_this_one(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("file is not a database\n")
    assert start_fault("the server", log, log.stat().st_size, "x") is None
    assert start_fault("the server", tmp_path / "none", 0, "x") is None


@pytest.mark.parametrize("harm", ["another version", "damaged"])
def test_tracking_database_that_mlflow_cannot_use_says_what_to_do(tmp_path: Path, mlflow_database: Path, harm: str) -> None:
    place = tmp_path / "mlflow.db"
    if harm == "damaged":
        place.write_bytes(b"no database at all " * 400)
    else:
        place.write_bytes(mlflow_database.read_bytes())
        with sqlite3.connect(place) as connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", (UNKNOWN_REVISION,))
    with pytest.raises(UserError) as caught:
        Connection(default_uri(tmp_path), "t").client()
    hint = "move it aside" if harm == "damaged" else "install the MLflow that wrote it"
    assert hint in caught.value.mend


@pytest.mark.parametrize("prints", ["print('hello', flush=True)", "import os; os.write(1, b'no end of line')"])
def test_verifier_starts_whatever_a_sitecustomize_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str) -> None:
    """Replies come over the standard output, on which such a module writes before the worker's own first line."""
    (tmp_path / "sitecustomize.py").write_text(prints)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pools, "START_LIMIT_S", 30.0)
    pool = Pool("tests.rewards.reward_functions:spin", Limits(5.0, 20.0, 0), 1, [str(ROOT)])
    try:
        assert pool.ask([[0]]) == [Reply("done")]
    finally:
        pool.end()


def test_command_whose_messages_nobody_reads_ends_as_it_would(tmp_path: Path) -> None:
    """`r1 run … 2>&1 | head`: a progress line that cannot be written is no reason to end a run, and not its end."""
    program = (
        "import flows.cli.run\n"
        "def talk(_):\n"
        "    print('first', file=sys.stderr, flush=True); sys.stdin.read()\n"
        "    for n in range(10): print('more', file=sys.stderr, flush=True)\n"
        f"    open({str(tmp_path / 'end')!r}, 'w').close()\n"
        "    from stages.contract.errors import StageFailed; raise StageFailed('x')\n"
        "flows.cli.run.status = talk"
    )
    code = f"import sys\nfrom flows import cli\n{program}\nsys.exit(cli.main())"
    command = [sys.executable, "-c", code, "status", "--runs", str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stderr is not None
        assert process.stdin is not None
        assert process.stderr.readline() == b"first\n"
        process.stderr.close()
        process.stdin.close()
        assert process.wait(60) == 3
    assert (tmp_path / "end").exists()


def test_command_without_sighup_goes_on_when_its_terminal_is_gone(tmp_path: Path) -> None:
    """As after `disown`: only what it prints is lost."""
    code = (
        "import signal, sys, time\nfrom flows import cli\nfrom flows.cli import run as commands\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "def talk(_):\n"
        "    print('ready', file=sys.stderr, flush=True)\n"
        "    for n in range(20):\n        time.sleep(0.1); print('on'); print('more', file=sys.stderr, flush=True)\n"
        f"    open({str(tmp_path / 'end')!r}, 'w').close()\n"
        "    return 0, {}\n"
        "commands.status = talk\nsys.exit(cli.main())"
    )
    process, terminal = os.forkpty()
    if process == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", code, "status", "--runs", str(tmp_path)])
    text = b""
    while b"ready" not in text:
        text += os.read(terminal, 1024)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert (tmp_path / "end").exists()
