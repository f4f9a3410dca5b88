"""The examples in the docstrings of the rewards are true."""

import doctest
from importlib import import_module

import pytest

from tests.conftest import ROOT
from tests.requirements import require

MODULES = sorted(path.stem for path in (ROOT / "stages/rewards").glob("*.py"))
ENGINE_ROOM = {
    "__init__",
    "pool",
    "worker",
    "canary",
    "chat_rendering",
    "coverage",
    "user_fault",
    "math_pool",
    "score",
    "functions",
    "preference",
    "verifiers",
    "answer_forms",
    "formula_names",
}
SANDBOX = {"sandbox", "sandbox_boot", "sandbox_calls", "sandbox_watch"}
"""No rewards of their own, or with nothing to show in a line: their tests are elsewhere."""


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name == "gym":
        require("reasoning-gym")
    found = doctest.testmod(import_module(f"stages.rewards.{name}"))
    assert found.failed == 0
    assert found.attempted or name in ENGINE_ROOM | SANDBOX
