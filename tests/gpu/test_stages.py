"""Stages on a GPU, as processes: killed and gone on with they end with the same bits; and a recipe from end to end."""

import json
from pathlib import Path

import pytest

from stages.store.folders import StageFolder
from stages.tracking.journal import read
from tests.commands import r1
from tests.rl import test_resume as resume
from tests.stage_process import finish, killed

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = resume.prepare(tmp_path_factory.mktemp("base") / "stage", "base", {}, [])
    return finish(folder) / "model"


@pytest.mark.parametrize("case", ["grpo", "ppo", "ahead", "base"])
def test_killed_equals_uninterrupted(tmp_path: Path, base: Path, case: str) -> None:
    name = "base" if case == "base" else "zero"
    inputs = {"policy": base} if name == "zero" else {}
    whole, cut = (resume.prepare(tmp_path / which, name, inputs, resume.OVERRIDES[case]) for which in ("whole", "cut"))
    finish(whole)
    killed(cut, 5)  # after a checkpoint, between two
    finish(cut)
    assert resume.results(cut) == resume.results(whole)
    assert max(line.metrics.get("train/grad_norm", 0) for line in read(whole / "journal.jsonl")) > 0
    assert json.loads((whole / "manifest.json").read_text())["peak_gpu_memory"] > 1 << 20


def test_a_recipe_from_end_to_end(tmp_path: Path) -> None:
    done = r1("run", "tests/pipeline/tiny.yaml", "--set", f"runs={tmp_path}", "--json", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    manifests = [json.loads(StageFolder(path).manifest.read_text()) for path in (tmp_path / "stages").iterdir()]
    trained = [manifest for manifest in manifests if manifest["kind"] in ("toy_base", "rl", "sft")]
    assert len(trained) == 4
    assert all(manifest["peak_gpu_memory"] > 1 << 20 for manifest in trained)


def test_a_stage_computes_on_the_cpu_where_it_is_told_to(tmp_path: Path) -> None:
    folder = resume.prepare(tmp_path / "stage", "base", {}, ["stages.base.steps=5", "shared.compute.device=cpu"])
    assert json.loads((finish(folder) / "manifest.json").read_text())["peak_gpu_memory"] is None
