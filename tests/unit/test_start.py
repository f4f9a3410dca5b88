"""What a stage's process imports before it does anything: seconds that every stage of every run takes."""

import subprocess
import sys

from tests.conftest import ROOT

TRAINER = """
import sys
import stages.grpo.train, stages.rollout.torch_engine
print(sorted({"mlflow", "prefect", "lm_eval", "datasets"} & sys.modules.keys()))
import mlflow
print(mlflow.__version__)
"""


def test_a_trainer_imports_neither_mlflow_nor_prefect_nor_lm_eval_and_mlflow_can_be_imported_later() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINER], cwd=ROOT, capture_output=True, text=True, check=True)
    imported, version = done.stdout.splitlines()[-2:]
    assert imported == "[]"
    assert version[0].isdigit()
