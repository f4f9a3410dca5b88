"""A user's mistakes end `r1 run` within seconds, before anything is computed: exit 2, one line, no folder left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.app import parser
from stages.evals import task_index
from tests.commands import environment, r1_in_process
from tests.conftest import ROOT

SECONDS = 5.0
"""Of processor time of the command and its children: what a busy machine does not change."""
MISTAKES = {
    "column": "stages.zero.problems: p.jsonl: no problem is left of it (2 × no column `question`); `problems` wants the",
    "reward": "stages.zero.rewards.functions.own: `my_rewards:own` gives a right answer no number (KeyError: 'solution'; ",
    "syntax": "my_rewards.py",
    "name": "my_rewards.py: line 1: `my_rewards:own` cannot be loaded (NameError: name 'undefined' is not defined)",
    "task": "stages.evaluation.tasks: lm-eval has no task `gms8k`; did you mean `gsm8k`?",
}

OF_CODE = ("reward", "syntax", "name")
"""Mistakes in a module of the user's, which a process of its own imports."""


@pytest.fixture(scope="module", autouse=True)
def task_names() -> None:
    """As `make setup` leaves them."""
    task_index.builtin_tasks()


def recipe(folder: Path, mistake: str) -> Path:
    """The quickstart with one mistake."""
    (folder / "p.jsonl").write_text('{"qestion": "1+1", "answer": "2"}\n{"qestion": "1+2", "answer": "3"}\n')
    sources = {"syntax": "def own(answer:\n    return 1\n", "name": "weight = undefined\n\ndef own(answer): return weight\n"}
    reward = sources.get(mistake, "def own(answer):\n    return answer['solution']\n")
    (folder / "my_rewards.py").write_text(reward)
    zero: dict[str, object] = {}
    if mistake == "column":
        zero = {"problems": {"source": "file", "path": "p.jsonl"}}
    elif mistake != "task":
        zero = {"rewards": {"functions": {"own": {"function": "my_rewards:own"}}}}
    stages = {"zero": zero, "evaluation": {"tasks": ["gms8k"] if mistake == "task" else []}}
    document = {"extends": str(ROOT / "configs" / "quickstart.yaml"), "runs": str(folder / "runs"), "stages": stages}
    file = folder / "own.yaml"
    file.write_text(json.dumps(document))
    return file


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(done, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_run_refuses_a_mistake_within_seconds_before_anything_is_computed(tmp_path: Path, mistake: str) -> None:
    recipe(tmp_path, mistake)
    before = os.times()
    done = command(tmp_path, "run", "own.yaml") if mistake in OF_CODE else r1_in_process("run", "own.yaml", folder=tmp_path)
    after = os.times()
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("r1: ")
    assert MISTAKES[mistake] in line
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()
    took = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    assert took < SECONDS


def test_plan_and_doctor_show_all_mistakes(tmp_path: Path) -> None:
    document = json.loads(recipe(tmp_path, "column").read_text())
    for mistake in ("reward", "task"):
        for name, settings in json.loads(recipe(tmp_path, mistake).read_text())["stages"].items():
            document["stages"][name] |= settings
    (tmp_path / "own.yaml").write_text(json.dumps(document))
    planned = command(tmp_path, "plan", "own.yaml")
    assert planned.returncode == 2
    assert MISTAKES["column"] in planned.stderr  # the first one
    assert "assumed:" in planned.stdout
    looked = command(tmp_path, "doctor", "own.yaml", "--runs", "runs", "--json")
    assert looked.returncode == 3
    fails = [check for check in json.loads(looked.stdout)["checks"] if check["state"] == "fail"]
    for mistake in ("column", "reward", "task"):
        assert MISTAKES[mistake] in planned.stdout
        assert any(MISTAKES[mistake] in f"{check['where']}: {check['found']}; {check['mend']}" for check in fails)


def test_deploy_refuses_a_mistake_before_it_looks_for_a_server(tmp_path: Path) -> None:
    recipe(tmp_path, "reward")
    done = command(tmp_path, "deploy", "own.yaml")
    assert done.returncode == 2
    assert MISTAKES["reward"] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_code_leaves_the_reward_module_alone(tmp_path: Path) -> None:
    recipe(tmp_path, "reward")
    (tmp_path / "my_rewards.py").write_text("import pathlib\npathlib.Path('imported').touch()\n\ndef own(answer): return 1\n")
    assert command(tmp_path, "plan", "own.yaml", "--no-code").returncode == 0
    assert not (tmp_path / "imported").exists()
    assert command(tmp_path, "plan", "own.yaml").returncode == 0
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize("name", ["run", "resume", "stage", "study", "plan", "doctor", "deploy"])
def test_help_says_that_the_reward_module_is_executed(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args([name, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "its reward functions are executed on a made-up answer" in words
    assert "--no-code" in words


def test_resume_looks_at_what_is_still_to_be_computed(tmp_path: Path) -> None:
    from flows.runs.record import RunRecord
    from stages.recipe.resolve import load_recipe

    file = recipe(tmp_path, "reward")
    record = RunRecord.create(load_recipe(file), str(file))
    record.update(working_folder=str(tmp_path), status="failed", error="stage `zero` failed")
    before = (record.folder.path / "pipeline.json").read_text()
    done = command(tmp_path, "resume", record.name, "--runs", str(tmp_path / "runs"))
    assert done.returncode == 2, done.stderr
    assert MISTAKES["reward"] in done.stderr
    assert (record.folder.path / "pipeline.json").read_text() == before


def test_what_takes_years_is_the_last_line_of_plan(tmp_path: Path) -> None:
    file = recipe(tmp_path, "none")
    document = json.loads(file.read_text())
    document["stages"] = {"zero": {"steps": 10**9}}
    file.write_text(json.dumps(document))
    planned = r1_in_process("plan", "own.yaml", folder=tmp_path)
    assert planned.returncode == 0, planned.stderr
    last = planned.stdout.strip().splitlines()[-1]
    assert last.startswith("this machine: about ")
    assert "years on this machine, by the cost model (`zero` alone" in last
