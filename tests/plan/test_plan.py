"""`r1 plan`: what is reused and what waits, by `r1 run`'s own fingerprints; changed code; memory, hours and cost; refusals."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from flows.cli.app import main
from flows.plan import changed_code
from flows.plan.reuse import standings
from flows.runs.stage_record import stage_record
from stages.__main__ import run_stage
from stages.kinds.registry import MODULES
from stages.recipe.resolve import ResolvedRecipe, load_recipe
from stages.store.files import write_json
from stages.store.folders import Runs, StageFolder

RECIPE = """
name: little
runs: {runs}
stages:
  base: {{kind: toy_base, hidden: 32, layers: 2, heads: 2, intermediate: 64, steps: 20}}
  documents: {{kind: dataset, path: {documents}}}
  taught: {{kind: sft, model: base, data: documents, batch: 4, deepspeed: zero2, compute: {{processes: 2}}}}
  judged: {{kind: evaluate, models: [base, taught], held_out: {{source: toy, count: 10}}, template: {{name: question}}}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    documents = tmp_path / "documents.jsonl"
    rows = [{"prompt": f"1+{n}=?", "completion": f"<answer>{n + 1}</answer>"} for n in range(12)]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(runs=tmp_path / "runs", documents=documents))
    return file


def finish(recipe: ResolvedRecipe, name: str) -> StageFolder:
    """Run a stage without inputs here."""
    record = stage_record(recipe.stages[name], {})
    folder = Runs(recipe.runs).prepare().stage(record.kind, record.fingerprint)
    folder.path.mkdir()
    write_json(folder.config, record.model_dump())
    run_stage(folder)
    return folder


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_what_waits_and_what_is_reused(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    found, finished = standings(recipe)
    assert not recipe.runs.exists()  # nothing is written
    assert finished == {}
    assert {name: s.waits_for for name, s in found.items()} == {
        "base": [],
        "documents": [],
        "taught": ["base", "documents"],
        "judged.base": ["base"],
        "judged.taught": ["taught"],
        "judged": ["judged.base", "judged.taught"],
    }
    assert all(s.state == "to run" for s in found.values())
    folder = finish(recipe, "documents")
    found, finished = standings(recipe)
    assert found["documents"].state == "reused"
    assert finished["documents"].folder == folder
    assert found["documents"].folder == str(folder.path)
    assert found["taught"].waits_for == ["base"]
    (recipe_file.parent / "documents.jsonl").write_text('{"prompt": "2+2=?", "completion": "4"}\n')
    assert standings(recipe)[0]["documents"].state == "to run"


def test_a_folder_that_another_pipeline_holds(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    record = stage_record(recipe.stages["documents"], {})
    folder = Runs(recipe.runs).prepare().stage(record.kind, record.fingerprint)
    folder.path.mkdir()
    with FileLock(folder.lock):
        assert standings(recipe)[0]["documents"].state == "running"
    assert standings(recipe)[0]["documents"].state == "to run"


def test_memory_hours_and_cost(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = told(capsys, str(recipe_file), "--gpu", "h100", "--price", "5")
    taught = next(stage for stage in document["stages"] if stage["stage"] == "taught")
    assert taught["processes"] == 2
    assert taught["cost"] == pytest.approx(taught["hours"] * 2 * 5)
    weights = taught["parameters"]
    assert weights == 2 * 32 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64) + 5 * 32
    assert taught["memory"]["zero0"]["optimizer"] == 8 * weights  # float32 is its own master
    assert taught["memory"]["zero2"]["gradients"] == 4 * weights / 2
    assert set(taught["memory"]) == {"zero0", "zero1", "zero2", "zero2+offload", "zero3", "zero3+offload"}
    assert document["total"]["hours"] == pytest.approx(sum(stage["hours"] for stage in document["stages"]))
    assert any("--length" in text for text in document["assumptions"])


def test_a_finished_stage_costs_nothing(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(load_recipe(recipe_file), "documents")
    document = told(capsys, str(recipe_file), "--gpu", "cpu")
    entry = next(stage for stage in document["stages"] if stage["stage"] == "documents")
    assert (entry["state"], entry["hours"]) == ("reused", 0)
    assert document["device"]["price"] == 0


def test_scale_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    document = told(capsys, "configs/qwen2.5-7b-8gpu.yaml", "--gpu", "h100", "--gpus", "8,64,512")
    rows = document["scale"]
    assert [row["gpus"] for row in rows] == [8, 64, 512]
    assert rows[0]["hours"] > rows[1]["hours"] > rows[2]["hours"]
    assert rows[0]["cost"] < rows[1]["cost"] < rows[2]["cost"]  # nothing scales perfectly
    assert rows[2]["seconds"]["waiting"] / sum(rows[2]["seconds"].values()) > rows[0]["seconds"]["waiting"] / sum(
        rows[0]["seconds"].values()
    )


def test_the_plan_is_text_too(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_file), "--gpu", "h100", "--gpus", "1,8"]) == 0
    text = capsys.readouterr().out
    for part in ("to run after base, documents", "zero3+offload", "on paper", "assumed:", "configs/plan/devices.yaml"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no recipe is named"),
        (["RECIPE", "--gpu", "h1000"], "no device `h1000`"),
        (["RECIPE", "--gpus", "0"], "--gpus"),
        (["RECIPE", "--price", "-1"], "--price"),
        (["RECIPE", "--model-config", "bose=x.json"], "no stage `bose`"),
        (["RECIPE", "--set", "stages.base={kind: model, hub: nobody/nothing}"], "nothing is known here of the model"),
        (["--calibrate", "nowhere"], "not a runs folder"),
    ],
)
def test_mistakes_are_one_line(recipe_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["plan", *(str(recipe_file) if text == "RECIPE" else text for text in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a kind `rl` of two modules and a room for records."""
    root = tmp_path / "clone"
    (root / "stages" / "store").mkdir(parents=True)
    for name in ("stages", "stages/store"):
        (root / name / "__init__.py").write_text("")
    (root / "stages" / "one.py").write_text("def run():\n    from stages import two\n    from stages.store import kept\n")
    (root / "stages" / "two.py").write_text('"""Two."""\nVALUE = 1  # one\n')
    (root / "stages" / "three.py").write_text("VALUE = 3\n")
    (root / "stages" / "store" / "kept.py").write_text("VALUE = 4\n")
    monkeypatch.setattr(changed_code, "ROOT", root)
    monkeypatch.setitem(MODULES, "rl", "stages.one")
    changed_code._files.cache_clear()
    git(root, "init", "-q")
    commit(root)
    yield root
    changed_code._files.cache_clear()


def git(root: Path, *arguments: str) -> str:
    command = [
        "git",
        "-C",
        str(root),
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "-c",
        "core.hooksPath=/dev/null",
        *arguments,
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(root: Path) -> str:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "state")
    return git(root, "rev-parse", "HEAD")


def test_changed_code_is_told_and_comments_are_not(clone: Path) -> None:
    first = git(clone, "rev-parse", "HEAD")
    assert changed_code.changed("rl", first) == ([], "")
    (clone / "stages" / "two.py").write_text('"""Another text."""\nVALUE = 1\n')
    (clone / "stages" / "three.py").write_text("VALUE = 33\n")  # not of this kind
    (clone / "stages" / "store" / "kept.py").write_text("VALUE = 44\n")  # decides no result
    assert changed_code.changed("rl", first) == ([], "")
    (clone / "stages" / "two.py").write_text("VALUE = 2\n")  # not even committed
    assert changed_code.changed("rl", first) == (["stages/two.py"], "")
    assert changed_code.changed("rl", commit(clone)) == ([], "")
    assert changed_code.changed("rl", first) == (["stages/two.py"], "")


def test_what_git_cannot_tell_is_said(clone: Path) -> None:
    assert "names no git commit" in changed_code.changed("rl", None)[1]
    assert "not in this clone" in changed_code.changed("rl", "0" * 40)[1]


def test_a_kinds_code_is_what_it_imports() -> None:
    names = {str(path.relative_to(changed_code.ROOT)) for path in changed_code._files("stages.kinds.rl")}
    assert {
        "stages/kinds/rl.py",
        "stages/rl/losses.py",
        "stages/rollout/decoding/decoder.py",
        "stages/kernels/decode.cpp",
    } <= names
    assert not any(name.startswith(("stages/store", "stages/runtime", "stages/tracking", "stages/sft")) for name in names)
