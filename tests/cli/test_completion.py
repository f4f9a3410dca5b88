"""Completion in shells, and the examples of `--help`: what they offer is there, and is accepted."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.app import COMMANDS, parser
from flows.cli.examples import EXAMPLES
from tests.commands import environment, r1
from tests.conftest import ROOT
from tests.runs.built_runs import build_run


def offered(line: str, folder: Path) -> list[str]:
    """What a shell is offered behind `line`."""
    answer = folder / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
    }
    command = [sys.executable, "-m", "flows.cli"]
    subprocess.run(command, env={**environment(), **asked}, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return [word.strip() for word in answer.read_text().split("\n") if word.strip()]


def test_commands_options_recipes_runs_and_stages(tmp_path: Path) -> None:
    build_run(tmp_path, "a-1", {"zero": None, "evaluation.zero": None})
    assert {"rollouts", "run"} <= set(offered("r1 r", tmp_path))
    assert "--older-than" in offered("r1 gc --o", tmp_path)
    assert "configs/quickstart.yaml" in offered("r1 run configs/quicks", tmp_path)
    assert offered(f"r1 rollouts --runs {tmp_path} a", tmp_path) == ["a-1"]
    assert offered(f"r1 sample --runs {tmp_path} latest ", tmp_path)[:2] == ["zero", "evaluation.zero"]
    assert offered("r1 run configs/quickstart.yaml --until cold_start_", tmp_path) == ["cold_start_data"]
    assert offered(f"r1 rollouts --runs {tmp_path} none z", tmp_path) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_one(shell: str, tmp_path: Path) -> None:
    done = r1("completion", shell)
    assert done.returncode == 0, done.stderr
    assert "r1" in done.stdout
    if found := shutil.which(shell):
        (tmp_path / "script").write_text(done.stdout)
        subprocess.run([found, "-n", str(tmp_path / "script")], check=True)


def test_every_command_ends_its_help_with_an_example_that_it_accepts() -> None:
    assert EXAMPLES.keys() == COMMANDS.keys()
    for name, example in EXAMPLES.items():
        program, *words = shlex.split(example.partition(" > ")[0])
        assert program == "r1"
        assert parser().parse_args(words).command == name
        assert len(example) <= 80
