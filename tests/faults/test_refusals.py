"""Damaged input on the real command line: exit 2, one line on standard error, no traceback, in time, nothing touched."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.runs.record import RunRecord
from stages.contract.config import semantic
from stages.kinds.registry import stage_kind
from stages.recipe.resolve import load_recipe
from stages.store.files import digest_file, write_json
from stages.store.folders import Runs, StageFolder
from stages.store.manifest import InputRecord, StageRecord, fingerprint
from tests.commands import environment, r1
from tests.conftest import ROOT
from tests.faults import damage
from tests.faults.inputs import INPUTS, make_finished, stage_record

pytestmark = pytest.mark.slow
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SECONDS = 60.0
"""What a refusal may take on a busy machine; most of it is imports."""
Harm = Callable[[bytes], bytes]
HARMS: dict[str, Harm] = {
    "empty": lambda _: b"",
    "zeros": lambda content: b"\0" * len(content),
    "cut": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content.replace(b"0", b"1", 1),
    "not UTF-8": lambda content: content[:20] + b"\xff\xfe" + content[20:],
    "deep": lambda _: b'{"a":' * 100_000,
    "of another kind": lambda _: b'{"kind": "rl"}',
    "a list": lambda _: b"[1, 2]",
    "escapes": lambda _: b'{"\\u001b[2J\\ud800": 1}',
}


def content(*places: Path) -> dict[Path, str]:
    """The digest of every file below."""
    files = [path for place in places for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file()]
    return {path: digest_file(path) for path in files}


def said(done: subprocess.CompletedProcess[str], *, lines: int = 1) -> str:
    """The line of a refusal."""
    assert done.returncode == 2, (done.returncode, done.stderr[-3000:])
    assert "Traceback" not in done.stderr + done.stdout
    found = done.stderr.strip().splitlines()
    assert len(found) == lines, done.stderr[-3000:]
    assert found[-1].isprintable()
    return found[-1]


def refused(folder: Path, *arguments: object, stdout: str | None = "") -> str:
    """What `r1` says when it refuses, having left everything below `folder` as it was."""
    before, began = content(folder), time.monotonic()
    done = r1(*arguments, timeout=SECONDS)
    assert time.monotonic() - began < SECONDS
    assert content(folder) == before
    assert stdout is None or done.stdout == stdout
    return said(done)


RECIPES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a mapping"),
    "zeros": (b"\0" * 100, "not valid YAML"),
    "cut": (b'name: own\nstages: {base: {kind: "toy', "not valid YAML"),
    "not UTF-8": (b"name: \xff\n", "cannot be read"),
    "bomb": (damage.bomb("{{a: {0}, b: {0}}}").encode(), "more than 20,000 values"),
    "circle": (b"stages: &a {x: *a}", "nested more than"),
    "deep": (b"stages: " + b"[" * 50_000, "nested too deeply"),
    "value": (b"stages: {base: {kind: toy_base, seed: 0x_}}", "a value cannot be read"),
    "date": (b"name: x\nstages: {base: {kind: toy_base, seed: 2024-13-45}}", "seed: input should be a valid integer"),
    "huge": (b"stages: {base: {kind: toy_base, seed: 99999999999999999999}}", "more than 64 bits"),
    "surrogate": (b'name: "\\ud800"\nstages: {}', "half a character"),
    "escape": (b'"\\e[2J": 1\nname: x\nstages: {base: {kind: toy_base}}', "unknown key `\\x1b[2J`"),
    "device": (b"extends: /dev/zero", "not a file"),
    "far": (b"extends: ../../../../../../../../../../etc/passwd", "/etc/passwd"),
    "circle of files": (b"extends: own.yaml", "goes round in a circle"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(tmp_path: Path, name: str) -> None:
    text, says = RECIPES[name]
    file = tmp_path / "own.yaml"
    file.write_bytes(text)
    line = refused(tmp_path, "run", file, "--set", f"runs={tmp_path / 'runs'}")
    assert says in line
    assert str(file) in line or "/etc/passwd" in line or "/dev/zero" in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.base.seed=" + "9" * 5000, "Exceeds the limit"),
        ("stages.base.seed=&a [*a]", "nested more than"),
        ("stages.base.lr=.nan", "finite"),
        ("stages.base=" + "[" * 30_000, "nested too deeply"),
        ("runs=" + "x" * 5000, "cannot be written"),
        ("shared.problems.path=\x1b[31m", "not valid YAML"),
        ("stages." + "n" * 5000 + ".kind=toy_base", "cannot name a stage"),
        ('name="a\\0b"', "name"),
    ],
)
def test_overrides(tmp_path: Path, override: str, says: str) -> None:
    assert says in refused(tmp_path, "run", QUICKSTART, "--set", f"runs={tmp_path / 'runs'}", "--set", override)


@pytest.fixture
def run(tmp_path: Path) -> RunRecord:
    """A run of the quickstart whose base model is finished."""
    record = RunRecord.create(load_recipe(QUICKSTART, [f"runs={tmp_path / 'runs'}"]), "quickstart.yaml", until_stage="base")
    made = stage_record("base")
    stage = make_finished(Runs(tmp_path / "runs").stage(made.kind, made.fingerprint).path)
    record.stage("base", status="done", folder=str(stage.path), fingerprint=made.fingerprint)
    record.update(status="failed", error="stage `zero` failed")
    return record


def harm(path: Path, how: str) -> None:
    path.write_bytes(HARMS[how](path.read_bytes()))


@pytest.mark.parametrize("how", HARMS)
def test_records_of_runs(run: RunRecord, how: str) -> None:
    runs, file = run.folder.path.parents[1], run.folder.path / "pipeline.json"
    harm(file, how)
    for command in (["status", run.name], ["resume", run.name], ["resume", "latest"], ["compare", run.name, run.name]):
        line = refused(runs, *command, "--runs", runs)
        assert str(file) in line
        assert "start a new run" in line
    assert str(file) in refused(runs, "status", "--runs", runs, stdout=f"no runs in {runs}\n")
    document = json.loads(r1("status", run.name, "--runs", runs, "--json").stdout)
    assert document["error"]["exit_status"] == 2


def test_a_runs_folder_that_was_copied_in_part(run: RunRecord) -> None:
    runs = run.folder.path.parents[1]
    run.place("base").manifest.unlink()
    for command in ("resume", "status"):
        line = refused(runs, command, run.name, "--runs", runs, stdout=None)
        assert "stage `base` was finished, and has no manifest" in line
        assert "copy the runs folder again" in line
    shutil.rmtree(run.place("base").path)
    assert "has no manifest" in refused(runs, "resume", "latest", "--runs", runs)


@pytest.mark.parametrize("victim", ["manifest.json", "model/weights"])
def test_a_finished_stage_that_is_not_what_it_was(run: RunRecord, victim: str) -> None:
    runs, stage = run.folder.path.parents[1], run.place("base")
    harm(stage.path / victim, "cut")
    before = content(stage.path)
    done = r1("run", QUICKSTART, "--set", f"runs={runs}", "--until", "base", timeout=180)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("r1: "))
    assert Path(victim).name in line
    assert "--fresh" in line
    assert {path: d for path, d in content(stage.path).items() if path in before} == before


# --- a stage alone ---


def stage(folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m stages FOLDER`."""
    command = [sys.executable, "-m", "stages", str(folder)]
    given = environment() | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT, env=given, check=False)


def prepare(folder: Path, name: str, inputs: dict[str, Path], overrides: list[str]) -> StageFolder:
    """A stage as `r1 run` would hand it to its process."""
    config = load_recipe(ROOT / "tests" / "pipeline" / "tiny.yaml", overrides).stages[name]
    kind = stage_kind(config.kind)
    given = {role: InputRecord(digest="d" * 64, path=str(path)) for role, path in inputs.items()}
    mark = fingerprint(kind.name, kind.version, semantic(config), {role: item.digest for role, item in given.items()})
    record = StageRecord(
        kind=kind.name, version=kind.version, fingerprint=mark, config=config.model_dump(mode="json"), inputs=given
    )
    made = StageFolder(folder)
    write_json(made.config, record.model_dump())
    return made


def stage_refused(folder: StageFolder, *inputs: Path) -> str:
    """What a stage says when it refuses; its folder and inputs are as they were, but for what it says of the attempt."""
    before = content(folder.path, *inputs)
    line = said(stage(folder.path))
    assert {path: digest for path, digest in content(folder.path, *inputs).items() if path in before} == before
    assert not folder.manifest.exists()
    outcome = json.loads((folder.attempts / "1" / "outcome.json").read_text())
    assert outcome["exit_status"] == 2
    assert outcome["message"] in line
    return line


@pytest.mark.parametrize("how", HARMS)
def test_configs_of_stages(tmp_path: Path, how: str) -> None:
    folder = prepare(tmp_path, "base", {}, [])
    harm(folder.config, how)
    assert str(folder.config) in stage_refused(folder)


def other(**facts: Any) -> Callable[[StageRecord], dict[str, Any]]:
    return lambda record: record.model_copy(update=facts).model_dump()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other(version=99), "version 99"),
        (other(kind="nothing"), "unknown kind of stage `nothing`"),
        (other(kind="summary", version=stage_kind("summary").version), "not a config of `summary`"),
        (other(config={"kind": "toy_base", "lr": "x"}), "not a config of `toy_base`"),
    ],
)
def test_configs_of_other_stages(tmp_path: Path, change: Callable[[StageRecord], dict[str, Any]], says: str) -> None:
    folder = prepare(tmp_path, "base", {}, [])
    write_json(folder.config, change(StageRecord.model_validate(json.loads(folder.config.read_text()))))
    assert says in stage_refused(folder)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_problem_files(tmp_path: Path, ending: str) -> None:
    INPUTS[f"problems.{ending}"].make(tmp_path)
    file = tmp_path / f"p.{ending}"
    harm(file, "cut" if ending in ("json", "parquet") else "zeros")
    source = f"{{source: file, path: {file}}}"
    folder = prepare(tmp_path / "stage", "zero", {"policy": tmp_path}, [f"shared.problems={source}"])
    assert str(file) in said(stage(folder.path), lines=2 if ending == "jsonl" else 1)  # a row is named, then the file


@pytest.mark.parametrize("how", ["empty", "cut", "zeros", "of another kind"])
def test_datasets(tmp_path: Path, how: str) -> None:
    INPUTS["dataset"].make(tmp_path)
    file = tmp_path / "train.parquet"
    harm(file, how)
    folder = prepare(tmp_path / "stage", "cold_start", {"model": tmp_path, "data": tmp_path}, [])
    assert str(file) in stage_refused(folder, file)


def test_answers_of_an_earlier_attempt(tmp_path: Path) -> None:
    from stages.problems.toy import save_toy_tokenizer
    from tests.conftest import tiny_llama

    save_toy_tokenizer(tmp_path / "model")
    tiny_llama().float().save_pretrained(tmp_path / "model")
    folder = prepare(tmp_path / "stage", "cold_start_data", {"sampler": tmp_path / "model"}, [])
    INPUTS["rollouts"].make(tmp_path)
    folder.rollouts.mkdir()
    chunk = folder.rollouts / "chunk-00000.parquet"
    shutil.copy(tmp_path / chunk.name, chunk)
    harm(chunk, "cut")
    assert str(chunk) in stage_refused(folder, chunk)


def test_journals(tmp_path: Path) -> None:
    folder = prepare(tmp_path, "cold_start_data", {"sampler": tmp_path}, [])
    INPUTS["journal"].make(tmp_path)
    content = folder.journal.read_bytes()
    folder.journal.write_bytes(content.replace(b'"step": 2', b'"step": -', 1))
    assert f"{folder.journal}: line 2" in stage_refused(folder, folder.journal)
