"""What a stage's process imports before it does anything: seconds that every stage of every run takes."""

import subprocess
import sys

from tests.conftest import ROOT

TRAINER = """
import sys
import stages.rl.train, stages.rollout.torch_engine
print(sorted({"mlflow", "prefect", "lm_eval", "datasets"} & sys.modules.keys()))
import mlflow
print(mlflow.__version__)
"""


ENGINE = """
import sys
from stages.engine.deepspeed_engine import Engine
from stages.engine.scorer import TokenScorer
from stages.rl.settings import GRPO
from tests.conftest import tiny_llama
settings = GRPO(lr=1e-3)
Engine(TokenScorer(tiny_llama().float()), settings, "zero2", "cpu")
print(sorted({"torch._inductor.compile_fx", "networkx", "redis"} & sys.modules.keys()))
"""


def test_an_engine_does_without_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", ENGINE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_trainer_imports_neither_mlflow_nor_prefect_nor_lm_eval_and_mlflow_can_be_imported_later() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINER], cwd=ROOT, capture_output=True, text=True, check=True)
    imported, version = done.stdout.splitlines()[-2:]
    assert imported == "[]"
    assert version[0].isdigit()
