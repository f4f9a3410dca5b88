"""Reward functions before anything is sampled: modules that cannot be imported, functions that raise, numbers of any kind."""

import fractions
import json
import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.contract.errors import UserError
from stages.contract.secrets import without_keys
from stages.problems.episode import Problem
from stages.rewards.answers.plain_number import plain_number
from stages.rewards.canary import Canary, try_functions
from stages.rewards.functions import function_parts, number_of
from stages.rewards.settings import Rewards
from stages.rewards.verifier_pool.pool import Limits, Pool, Reply
from tests.rewards.test_composed import scored

LIMITS = Limits(2.0, 10.0)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module that workers can import as `own_rewards`."""
    monkeypatch.setenv("R1_CODE_FOLDERS", json.dumps([str(tmp_path)]))
    return tmp_path / "own_rewards.py"


def canary(**fields: object) -> Canary:
    rewards = Rewards.model_validate({"functions": {"own": {"function": "own_rewards:reward"}}, "verify_wall_s": 5, **fields})
    (found,) = try_functions(rewards, Problem("p:1", "3+4?", "7", "p", metadata='{"level": 2}'))
    return found


@pytest.mark.parametrize(
    ("source", "line", "says"),
    [
        ("def reward(answer):\n    return (1\n", 2, "SyntaxError"),
        ("import math\nweight = lenght\n\ndef reward(answer): return 1\n", 2, "NameError: name 'lenght' is not defined"),
        ("import no_such_package\n", 1, "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import json\njson.loads('{')\n", 2, "JSONDecodeError"),
        ("import sys\n\nsys.exit(1)\n", 3, "SystemExit"),
        ("def warm():\n    raise OSError('no file')\n\ndef reward(answer): return 1\n", 2, "OSError: no file"),
    ],
)
def test_canary_names_file_line_and_error_of_a_module_that_cannot_be_imported(
    module: Path, source: str, line: int, says: str
) -> None:
    module.write_text(source)
    found = canary()
    assert found.place == f"{module}: line {line}"
    assert says in found.fault
    with pytest.raises(UserError) as caught:
        Pool("own_rewards:reward", LIMITS, 1).ask([[{}]])
    assert (caught.value.where, caught.value.what) == (found.place, found.fault)


def test_canary_names_a_module_or_function_that_is_not_there(module: Path) -> None:
    found = canary()
    assert (found.place, "No module named 'own_rewards'" in found.fault) == ("", True)
    module.write_text("reward = 3\n")
    assert "`own_rewards:reward` cannot be called" in canary().fault
    module.write_text("")
    assert "no attribute 'reward'" in canary().fault


def test_canary_survives_a_module_that_ends_its_process(module: Path) -> None:
    module.write_text("import os\nos._exit(3)\n")
    assert "ends or hangs" in canary().fault


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("return answer['solution']", "KeyError: 'solution'; {file}, line 2"),
        ("return 'good'", "'good' is not a number"),
        ("return float('nan')", "nan is not a number"),
        ("return [1.0]", "[1.0] is not a number"),
        ("return 10**400", "is not a number"),
        ("return -1e300", "-1e+300 is too large for a reward (more than 1e+12)"),
        ("import numpy; return numpy.ones(2)", "`ndarray` of shape (2,) is not a number"),
        ("return {1, 2}", "`set` is not a number"),
        ("while True: pass", "ended"),
    ],
)
def test_canary_names_what_a_function_gives_in_place_of_a_number(module: Path, body: str, fault: str) -> None:
    module.write_text(f"def reward(answer):\n    {body}\n")
    assert fault.format(file=module) in canary(verify_timeout_s=1).fault


def test_canary_of_a_function_with_other_parameters_is_named(module: Path) -> None:
    module.write_text("def reward(prompts, completions):\n    return 1\n")
    assert "missing 1 required positional argument: 'completions'" in canary().fault


def test_canary_calls_with_the_fields_of_a_right_answer_and_of_one_that_was_cut(module: Path) -> None:
    module.write_text(
        "def reward(answer):\n"
        "    if answer['truncated']:\n"
        "        return len(answer['answer'])\n"
        "    assert answer['answer'] == answer['reference'] == '7', answer\n"
        "    assert (answer['question'], answer['metadata'], answer['tokens']) == ('3+4?', {'level': 2}, 16), answer\n"
        "    return 1\n"
    )
    found = canary()
    assert found.fault == ""
    assert "object of type 'NoneType' has no len()" in found.cut_fault
    assert canary(answer_in="boxed").fault == ""


def test_canary_of_a_sound_function_finds_nothing(module: Path) -> None:
    module.write_text("print('hello')\ndef reward(answer):\n    print('x')\n    return None\n")
    assert canary() == Canary("own", "own_rewards:reward")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("numpy.float32(0.5)", 0.5),
        ("numpy.float64(0.5)", 0.5),
        ("numpy.float16(0.5)", 0.5),
        ("numpy.int64(3)", 3.0),
        ("numpy.bool_(True)", 1.0),
        ("numpy.array(2.5)", 2.5),
        ("True", 1.0),
        ("decimal.Decimal('0.25')", 0.25),
        ("fractions.Fraction(1, 4)", 0.25),
        ("2", 2.0),
    ],
)
def test_function_parts_take_numbers_of_any_kind(module: Path, expression: str, value: float) -> None:
    name = f"own_{abs(hash(expression))}"  # one pool of the process for each function
    module.with_name(f"{name}.py").write_text(
        f"import decimal, fractions\nimport numpy\n\ndef reward(answer):\n    return {expression}\n"
    )
    rewards = Rewards.model_validate({"verifier": "exact", "functions": {"own": {"function": f"{name}:reward"}}})
    (episode,) = scored(rewards, "<think>a</think> <answer>5</answer>")
    assert function_parts(rewards, [episode]) == [{"own": value}]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.bool_(False), False),
        (np.array(3), 3),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(True), True),
        (Decimal("1.5"), 1.5),
        (fractions.Fraction(1, 4), 0.25),
    ],
)
def test_plain_number_of_scalars(value: object, plain: float) -> None:
    assert plain_number(value) == plain
    assert type(plain_number(value)) in (bool, int, float)


@pytest.mark.parametrize("value", [np.ones(1), torch.ones(2), 1j, np.complex64(1), np.str_("1"), "1", b"1", object(), {1}])
def test_plain_number_refuses_all_else(value: object) -> None:
    with pytest.raises(TypeError, match="is not a number"):
        plain_number(value)


@pytest.mark.parametrize("value", ["0.5", [1], {}, math.nan, math.inf, 10**400, -(10**400)])
def test_number_of_a_reply_that_is_none_names_it(value: object) -> None:
    number, fault = number_of(Reply(value))
    assert number is None
    assert fault.endswith("is not a number")
    assert len(fault) < 100


def test_pool_workers_have_no_key_variables(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = {
        "HF_TOKEN": "hf_abcdefgh",
        "OPENAI_API_KEY": "sk-abcdefgh",
        "AWS_SECRET_ACCESS_KEY": "abcdefgh",
        "PGPASSWORD": "abcdefgh",
        "SOME_DATABASE": "postgresql://me:abcdefgh@host/db",
    }
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OWN_SETTING", "kept")
    module.write_text("import os\n\ndef reward(answer):\n    return sorted(os.environ)\n")
    pool = Pool("own_rewards:reward", LIMITS, 1)
    try:
        (reply,) = pool.ask([[{}]])
    finally:
        pool.end()
    assert "OWN_SETTING" in reply.value
    assert "PATH" in reply.value
    assert hidden.keys().isdisjoint(reply.value)


def test_without_keys_leaves_out_declared_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.contract.secrets._declared", {"PLAIN_NAME"})
    assert without_keys({"PLAIN_NAME": "hush", "PLAIN": "x"}) == {"PLAIN": "x"}
