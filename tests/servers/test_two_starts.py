"""Two runs that begin at once in one fresh runs folder: both make Prefect's and MLflow's databases there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import environment
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def test_two_runs_at_once_in_a_fresh_runs_folder_both_end_well(tmp_path: Path, model_folder: Path) -> None:
    recipe = tmp_path / "one.yaml"
    stages = {"base": {"kind": "model", "path": str(model_folder)}}
    recipe.write_text(json.dumps({"name": "one", "runs": str(tmp_path / "runs"), "stages": stages}))
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    records = [json.loads(file.read_text()) for file in (tmp_path / "runs" / "pipelines").glob("*/pipeline.json")]
    assert sorted(record["stages"]["base"]["status"] for record in records) == ["done", "reused"]
    assert len(list((tmp_path / "runs" / "stages").iterdir())) == 1
    assert not any("Traceback" in text for text in texts)
