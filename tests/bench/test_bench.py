"""The bench runs, and says what it should; how fast anything was is not looked at."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.requirements import require

pytestmark = pytest.mark.slow

NAMES = ["step", "step-ppo", "rollout-64", "update"]


def test_quick_bench(tmp_path):
    require("trl")
    out, runs = tmp_path / "out", tmp_path / "runs"
    command = [sys.executable, "-m", "tests.bench", "--quick", "--only", *NAMES, "--out", str(out), "--runs", str(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((out / "bench.json").read_text())
    assert [result["name"] for result in document["comparisons"]] == NAMES
    for result in document["comparisons"]:
        ours = result["sides"].pop("ours")
        assert result["sides"].keys() == result["against"].keys()
        for side in (ours, *result["sides"].values()):
            assert side["peak_mib"] > 0
            assert side["seconds"]["least"] > 0
        for found in result["against"].values():
            assert found["ratio"]["least"] <= found["ratio"]["median"] <= found["ratio"]["most"]
    step, _, _, update = document["comparisons"]
    assert "TRL" in step["against"]
    assert update["found"]["largest relative gradient difference"] < 1e-4
    assert update["found"]["share of the matrix-product peak"] > 0
    assert {file.name for file in out.glob("*.png")} == {"ratios.png"}
    assert (runs / "mlflow.db").exists()
