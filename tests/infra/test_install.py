"""infra/install.py, which sets up environments: what it refuses, what it passes on to uv and pip, and what it shows."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location("install", ROOT / "infra" / "install.py")
assert SPEC is not None
assert SPEC.loader is not None
install = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(install)
PYPROJECT = '[project]\nrequires-python = ">=3.11"\n'


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a shell script on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("R1_INSTALLER", raising=False)

    def write(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return write


def test_older_python_is_refused_in_one_line(capsys):
    install.demand_python((3, 11, 0), PYPROJECT)
    with pytest.raises(SystemExit) as ended:
        install.demand_python((3, 10, 14), PYPROJECT)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"set-up: Python 3.11 or later is needed, {sys.executable} is 3.10.14; install it, then `make PYTHON=python3.11`\n"
    )


def test_full_disk_is_refused_before_an_environment_is_created(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=3 << 29))
    with pytest.raises(SystemExit) as ended:
        install.demand_room(tmp_path / ".venv")
    assert ended.value.code == 2
    assert f"set-up: 1.5 GiB are free, {tmp_path / '.venv'} takes 2.0 and more; make room" in capsys.readouterr().err
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    install.demand_room(tmp_path / ".venv")


def test_pip_settings_are_passed_on_to_uv(tmp_path, monkeypatch):
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://mirror/simple\nextra-index-url =\n    https://one/simple\n    file:///two\n"
        "find-links = /from/global\n[install]\nfind-links = /a /b\n[freeze]\ntimeout = 1\n"
    )
    for name in ("PIP_FIND_LINKS", "PIP_CERT", "PIP_DEFAULT_TIMEOUT", "PIP_INDEX_URL", "UV_INDEX", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_CERT", "/ca.pem")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own/simple")
    variables = install.uv_variables(install.pip_settings(Path(sys.executable)))
    names = ("UV_INDEX", "UV_FIND_LINKS", "SSL_CERT_FILE", "UV_DEFAULT_INDEX", "UV_HTTP_TIMEOUT")
    assert [variables.get(name) for name in names] == ["https://one/simple file:///two", "/a,/b", "/ca.pem", None, None]


def test_torch_build_is_left_to_pips_index_where_pytorchs_does_not_answer(monkeypatch, capsys):
    monkeypatch.setattr(install, "answers", lambda _address: True)
    assert [install.torch_build(wanted) for wanted in ("", "auto", "cpu")] == ["", "auto", "cpu"]
    monkeypatch.setattr(install, "answers", lambda _address: False)
    assert [install.torch_build(wanted) for wanted in ("", "auto")] == ["", ""]
    with pytest.raises(SystemExit) as ended:
        install.torch_build("cpu")
    assert ended.value.code == 2
    assert "does not answer, so there is no `cpu` build of PyTorch; leave out TORCH=cpu" in capsys.readouterr().err


def test_index_that_does_not_answer_is_no_error(monkeypatch):
    assert not install.answers("https://127.0.0.1:9/cpu/torch/")


def test_pip_is_the_fallback_where_uv_cannot_be_installed(program, capsys):
    python = program("python", "exit 1")
    assert install.find_uv(python) is None
    assert capsys.readouterr().err == "set-up: uv cannot be installed; pip does the same in some minutes more\n"
    uv = program("uv", "")
    assert install.find_uv(python) == str(uv)


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_installer_gets_environment_arguments_and_torch_build(tmp_path, program, monkeypatch, capsys, installer):
    program("uv", f'echo "$UV_INDEX_STRATEGY" "$@" > {tmp_path}/called')
    python = program("python", f'echo "$@" > {tmp_path}/called')
    monkeypatch.setattr(install, "create_environment", lambda _folder: python)
    monkeypatch.setattr(install, "demand_room", lambda _folder: None)
    monkeypatch.setattr(install, "pip_settings", lambda _python: {})
    monkeypatch.setattr(install, "answers", lambda _address: True)
    monkeypatch.delenv("UV_INDEX_STRATEGY", raising=False)
    monkeypatch.setenv("R1_INSTALLER", installer)
    arguments = ["--torch", "cpu", str(tmp_path), "--constraint", "c.txt", "--editable", ".[dev]"]
    monkeypatch.setattr(sys, "argv", ["install.py", *arguments])
    assert install.main() == 0
    assert not (tmp_path / install.UNFINISHED).exists()
    given = {
        "uv": f"unsafe-best-match pip install --compile-bytecode --python {python} --constraint c.txt --editable .[dev] "
        "--torch-backend=cpu\n",
        "pip": "-m pip install --progress-bar off --constraint c.txt --editable .[dev] "
        "--extra-index-url https://download.pytorch.org/whl/cpu\n",
    }
    assert (tmp_path / "called").read_text() == given[installer]
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == f"{tmp_path}: {installer} install .[dev]: 0 s …"
    assert last.startswith(f"{tmp_path}: {installer} install .[dev]: ")
    assert last.endswith(" s done")


def test_failed_installer_shows_its_last_lines_and_ends_with_1(capfd):
    script = "for n in $(seq 40); do echo line $n; done; echo 'no space left' >&2; exit 7"
    with pytest.raises(SystemExit) as ended:
        install.run_with_progress(["sh", "-c", script], {}, ".venv: uv install x")
    assert ended.value.code == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2:] == [
        "no space left",
        "set-up: .venv: uv install x: failed (status 7); the same command goes on with what was downloaded",
    ]
    assert "line 40" in lines
    assert "line 20" not in lines


def test_environment_in_which_an_installer_was_killed_is_created_anew(tmp_path, program, monkeypatch):
    venv = tmp_path / "venv"
    monkeypatch.setattr(install, "create_environment", lambda _folder: venv / "bin" / "python")
    monkeypatch.setattr(sys, "argv", ["install.py", str(venv), "x"])
    program("uv", "kill -9 $$")
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "half").touch()
    with pytest.raises(SystemExit):
        install.main()
    monkeypatch.undo()
    calls: list[list[str]] = []

    def record(command, **_options):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", record)
    install.create_environment(venv)
    (venv / install.UNFINISHED).unlink()
    install.create_environment(venv)
    created, looked_at = calls
    assert created == [sys.executable, "-m", "venv", "--clear", str(venv)]
    assert looked_at == [str(venv / "bin" / "python"), "-m", "pip", "--version"]


def test_environment_of_a_failed_set_up_is_not_marked_ready(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    for python, status in (("false", 2), ("true", 2)):  # the second: the installer works, the index of tasks does not
        done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert not (tmp_path / ".venv" / ".ready").exists()
