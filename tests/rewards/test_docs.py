"""The examples in the docstrings of the rewards are true."""

import doctest
from importlib import import_module

import pytest

from tests.conftest import ROOT
from tests.requirements import require

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "stages" / "rewards").rglob("*.py")
    if path.name != "__init__.py"
)
WITHOUT = {
    "answers.forms",
    "answers.formula_names",
    "answers.math_pool",
    "answers.verifiers",
    "canary",
    "chat_rendering",
    "code.boot",
    "code.sandbox",
    "code.seccomp",
    "code.supervisor",
    "coverage",
    "functions",
    "preference",
    "score",
    "verifier_pool.pool",
    "verifier_pool.user_fault",
    "verifier_pool.worker",
}
"""No rewards of their own, or with nothing to show in a line: their tests are elsewhere."""


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name == "stages.rewards.gym":
        require("reasoning-gym")
    found = doctest.testmod(import_module(name))
    assert found.failed == 0
    assert found.attempted or name.removeprefix("stages.rewards.") in WITHOUT
