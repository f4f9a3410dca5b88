"""A run in surroundings as users have them: the reward module beside a recipe that lies elsewhere, a `datasets/` package of
their own, proxies, an ASCII terminal, odd characters in paths, no home.
"""

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stages.tracking.journal import read
from tests.commands import environment
from tests.conftest import ROOT

TINY = ROOT / "tests" / "pipeline" / "tiny.yaml"
RECIPE = f"""
extends: {TINY}
name: mine
runs: "~/r#1 %41 'é'"
shared:
  rewards: {{functions: {{brevity: {{function: "my_rewards:brevity", weight: 0.01}}}}}}
  compute: {{threads: 1}}
stages:
  base: {{steps: 2}}
  zero: {{steps: 1, evaluation: {{every: 1, problems: 2}}}}
"""
REWARDS = """
from words.count import count

def brevity(answer):
    return -count(answer["text"])
"""


class CountingProxy:
    """Something that listens where the proxies point and answers nothing."""

    def __init__(self) -> None:
        self.calls = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def variables(self) -> dict[str, str]:
        address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
        return {**dict.fromkeys(names, address), "NO_PROXY": "example.org", "no_proxy": ""}

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            self.calls += 1
            connection.close()


@dataclass
class Place:
    """Folders of a user's, and `r1` in them."""

    folder: Path
    variables: dict[str, str]

    @property
    def recipe(self) -> Path:
        return self.folder / "project" / "mine.yaml"

    @property
    def rewards(self) -> Path:
        return self.folder / "project" / "my_rewards.py"

    @property
    def runs(self) -> Path:
        return self.folder / "home" / "r#1 %41 'é'"

    def r1(self, *arguments: object, cwd: str = "work", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "flows.cli", *map(str, arguments)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # a test may ask for another encoding
            timeout=400,
            cwd=self.folder / cwd,
            env={**environment(), "OMP_NUM_THREADS": "1", **self.variables, **variables},
            check=False,
        )

    def refused(self, *arguments: object, **variables: str) -> str:
        done = self.r1(*arguments, **variables)
        lines = done.stderr.strip().splitlines()
        assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), done.stderr
        return lines[0]


def make_place(folder: Path, **variables: str) -> Place:
    """`project/` has the recipe, its module and a `datasets/` package, `work/` another such package."""
    for name in ("project", "work", "elsewhere"):
        (folder / name / "datasets").mkdir(parents=True)
        (folder / name / "datasets" / "__init__.py").write_text('raise RuntimeError("the user\'s datasets was imported")\n')
    (folder / "work" / "words").mkdir()
    (folder / "work" / "words" / "count.py").write_text("def count(text):\n    return len(text.split())\n")
    place = Place(folder, {"HOME": str(folder / "home"), **variables})
    place.recipe.write_text(RECIPE)
    place.rewards.write_text(REWARDS)
    return place


@dataclass
class Ran:
    place: Place
    done: subprocess.CompletedProcess[str]
    proxy: CountingProxy

    @property
    def record(self) -> dict[str, Any]:
        file = min((self.place.runs / "pipelines").glob("*/pipeline.json"))  # a later test may have run again
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """One run for all: a policy and one step of RL with the user's reward."""
    proxy = CountingProxy()
    place = make_place(tmp_path_factory.mktemp("user"), **proxy.variables, PYTHONIOENCODING="ascii")
    yield Ran(place, place.r1("run", "../project/mine.yaml", "--until", "zero"), proxy)


def test_module_beside_the_recipe_rewards_though_the_run_starts_elsewhere(ran: Ran) -> None:
    assert ran.done.returncode == 0, ran.done.stderr
    stage = Path(ran.record["stages"]["zero"]["folder"])
    assert any("brevity" in name for line in read(stage / "journal.jsonl") for name in line.metrics)
    project, work = str(ran.place.recipe.parent), str(ran.place.folder / "work")
    assert ran.record["code_folders"] == [project, work]
    assert json.loads((stage / "config.json").read_text())["code_folders"] == [project, work]


def test_packages_called_datasets_beside_recipe_and_working_folder_hide_nothing(ran: Ran) -> None:
    logs = [path.read_text(encoding="utf-8") for path in ran.place.runs.glob("stages/*/attempts/*/log.txt")]
    assert len(logs) == 2
    assert "the user's datasets was imported" not in "".join(logs)


def test_loopback_is_reached_without_the_proxy(ran: Ran) -> None:
    assert ran.record["status"] == "done"
    assert ran.record["mlflow"]["parent_run_id"]
    assert ran.proxy.calls == 0


def test_home_is_expanded_and_odd_characters_stay_in_one_folder(ran: Ran) -> None:
    assert not (ran.place.folder / "work" / "~").exists()
    assert [path.name for path in (ran.place.folder / "home").iterdir() if path.name.startswith("r")] == [ran.place.runs.name]
    assert {path.name for path in ran.place.runs.iterdir()} >= {"mlflow.db", "mlartifacts", "prefect", "stages", "pipelines"}
    assert list(ran.place.runs.glob("mlartifacts/*/artifacts/report.html"))
    assert (ran.place.runs / "prefect" / "prefect.db").exists()


def test_ascii_terminal_gets_plain_characters_to_the_end(ran: Ran) -> None:
    assert (ran.done.stdout + ran.done.stderr).isascii()
    assert "r#1 %41 'e'" in ran.done.stdout  # é
    shown = ran.place.r1("status", "latest", "--runs", ran.place.runs, "--json")
    assert json.loads(shown.stdout)["report"].startswith(str(ran.place.runs))  # é, as JSON writes it in ASCII
    assert shown.stdout.isascii()


def test_changed_line_in_a_reward_module_is_named_and_computed_again(ran: Ran) -> None:
    def plan() -> list[dict[str, Any]]:
        done = ran.place.r1("plan", ran.place.recipe, "--json")
        assert done.returncode == 0, done.stderr
        stages: list[dict[str, Any]] = json.loads(done.stdout)["stages"]
        return stages

    before = {stage["stage"]: stage["state"] for stage in plan()}
    assert (before["base"], before["zero"]) == ("reused", "reused")
    counting = ran.place.folder / "work" / "words" / "count.py"
    text = counting.read_text()
    try:
        counting.write_text(text.replace("len(", "2 * len("))
        after = {stage["stage"]: stage for stage in plan()}
    finally:
        counting.write_text(text)
    assert after["base"]["state"] == "reused"
    assert after["zero"]["state"] == "to run"
    (reason,) = after["zero"]["reasons"]
    assert reason.startswith("rewards.functions.brevity.function: words/count.py has changed since rl-")
    assert after["cold_start_data"]["waits_for"] == ["zero"]  # and so is what comes after it


@pytest.mark.slow
def test_run_after_a_changed_line_computes_that_stage_and_those_below_it(ran: Ran) -> None:
    ran.place.rewards.write_text(REWARDS.replace("return -", "return -2 * "))
    try:
        ranks = ("--set", "stages.zero.compute.processes=2")  # which import it too
        done = ran.place.r1("run", ran.place.recipe, "--until", "zero", *ranks, "--json")
    finally:
        ran.place.rewards.write_text(REWARDS)
    assert done.returncode == 0, done.stderr
    states = {stage["stage"]: stage["status"] for stage in json.loads(done.stdout)["stages"]}
    assert (states["base"], states["zero"]) == ("reused", "done")
    assert "zero: computed again: rewards.functions.brevity.function: my_rewards.py has changed since rl-" in done.stderr


def as_elsewhere(folder: Path) -> subprocess.CompletedProcess[str]:
    """The stage's process as a pod or another machine starts it: it is given the stage's folder alone."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "stages", str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd="/",
        env={**environment(), "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture
def prepared(ran: Ran, tmp_path: Path) -> Path:
    """What a stage's folder has before its first attempt."""
    folder = tmp_path / "rl-prepared"
    folder.mkdir()
    shutil.copy(Path(ran.record["stages"]["zero"]["folder"]) / "config.json", folder)
    return folder


def test_stage_whose_reward_has_changed_since_it_was_prepared_is_refused(ran: Ran, prepared: Path) -> None:
    ran.place.rewards.write_text(REWARDS + "# changed\n")
    try:
        done = as_elsewhere(prepared)
    finally:
        ran.place.rewards.write_text(REWARDS)
    assert done.returncode == 2, done.stderr
    outcome = json.loads((prepared / "attempts" / "1" / "outcome.json").read_text())
    says = f"rewards.functions.brevity.function: {ran.place.rewards}: my_rewards.py is not what the stage was prepared with"
    assert outcome["message"].startswith(says)


@pytest.mark.slow
def test_stage_folder_alone_tells_where_the_reward_is(prepared: Path) -> None:
    done = as_elsewhere(prepared)
    assert done.returncode == 0, done.stderr
    assert any("brevity" in name for line in read(prepared / "journal.jsonl") for name in line.metrics)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def brevity(answer:\n    return 1\n", "my_rewards.py: line 1: SyntaxError: "),
        ("import datasets\n\ndef brevity(answer): return 1\n", "datasets/__init__.py is hidden by the installed module"),
        (None, "stages.zero.rewards.functions.brevity.function: there is no module `my_rewards` in "),
    ],
)
def test_reward_module_that_cannot_be_used_is_refused_before_anything_is_computed(
    place: Place, text: str | None, says: str
) -> None:
    place.rewards.unlink()
    if text is not None:
        place.rewards.write_text(text)
    assert says in place.refused("run", place.recipe).replace("shared.", "stages.zero.")
    assert not place.runs.exists()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1080", "r1: ALL_PROXY: a proxy of kind socks5 needs packages that are not installed"),
        ("https_proxy", "socks4://127.0.0.1:1080", "r1: https_proxy: proxies of kind `socks4` cannot be used"),
        ("HTTP_PROXY", "http://[::1", "r1: HTTP_PROXY: not the address of a proxy"),
    ],
)
def test_proxy_that_no_client_can_use_is_refused_in_one_line(place: Place, name: str, value: str, says: str) -> None:
    assert place.refused("run", place.recipe, **{name: value}).startswith(says)


@pytest.mark.parametrize("runs", ["what?", "two\\nlines"])
def test_runs_path_that_no_database_address_can_hold_is_refused(place: Place, runs: str) -> None:
    line = place.refused("run", place.recipe, "--set", f'runs="{place.folder}/{runs}"')
    assert "the runs folder's path has" in line
    assert not [path for path in place.folder.iterdir() if path.name not in ("project", "work", "elsewhere")]


def test_runs_folder_on_a_file_system_that_cannot_be_written_is_refused(place: Place) -> None:
    assert "/proc/none/runs: the runs folder cannot be written" in place.refused(
        "run", place.recipe, "--set", "runs=/proc/none/runs"
    )


def test_home_in_an_option_is_expanded(place: Place) -> None:
    done = place.r1("status", "--runs=~/other")
    assert done.stdout == f"no runs in {place.folder}/home/other\n"


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/proc/none", "missing", None])
def test_run_without_a_usable_home_in_a_foreign_locale(
    tmp_path: Path, model_folder: Path, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(tmp_path)
    place.recipe.write_text(json.dumps({"name": "one", "stages": {"base": {"kind": "model", "path": str(model_folder)}}}))
    place.variables = {"TMPDIR": str(tmp_path / "none"), "LC_ALL": "C", "PYTHONIOENCODING": "latin-1"}
    if home is not None:
        place.variables["HOME"] = str(tmp_path / home) if home == "missing" else home
    command = ["run", place.recipe, "--set", f"runs={tmp_path}/läuft"]
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
    done = place.r1(*command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "missing").exists() or not list((tmp_path / "missing").glob("**/*.db"))
