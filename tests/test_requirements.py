"""Skips of the tests are summarised by reason, and fail in continuous integration where a command would prevent them."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.requirements import REQUIREMENTS, Requirement, needs, preventable, require

pytest_plugins = ("pytester",)

HOOKS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})  # a worker of xdist begins with the path of an interpreter that starts, not with ours
from tests.requirements import pytest_sessionfinish, pytest_terminal_summary
"""
TESTS = """
import tests.requirements as r
from tests.requirements import Requirement, needs, require

absent = lambda: False
r.REQUIREMENTS.update(
    tool=Requirement("the program tool", "make system", absent),
    data=Requirement("data", None, absent),
    here=Requirement("what is here", "make system", lambda: True),
)

@needs("tool")
def test_marked(): assert False

def test_inside(): require("tool")

@needs("data")
def test_data(): assert False

@needs("here")
def test_runs(): pass
"""


@pytest.fixture(autouse=True)
def requirements(monkeypatch: pytest.MonkeyPatch) -> dict[str, Requirement]:
    """A copy of the requirements that a test may change."""
    copied = dict(REQUIREMENTS)
    monkeypatch.setattr("tests.requirements.REQUIREMENTS", copied)
    monkeypatch.delenv("R1_CHECK_INFRA", raising=False)
    return copied


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    pytester.makeconftest(HOOKS)
    pytester.makepyfile(TESTS)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest", *arguments)


def test_skips_are_counted_by_reason_and_in_ci_those_of_set_up_fail_the_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    result = run(pytester)
    assert result.ret == 1
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(["*= skipped =*", "    2 needs the program tool (`make system`)", "    1 needs data"])
    result.stdout.fnmatch_lines(["FAILED in CI: needs the program tool (`make system`)"])
    result.stdout.no_fnmatch_line("FAILED in CI: needs data*")


def test_skips_under_xdist_are_counted_and_pass_outside_ci(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    result = run(pytester, "-n", "1")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*= skipped =*", "    2 needs the program tool (`make system`)", "    1 needs data"])
    result.stdout.no_fnmatch_line("*FAILED in CI*")


@pytest.mark.parametrize(
    ("ci", "command", "fails"),
    [("true", "make setup", True), ("true", "make system", True), ("true", "make peers", False), ("", "make setup", False)],
)
def test_skip_is_preventable_in_ci_if_a_command_of_set_up_installs_what_it_needs(
    requirements: dict[str, Requirement], monkeypatch: pytest.MonkeyPatch, ci: str, command: str, fails: bool
) -> None:
    monkeypatch.setenv("CI", ci)
    requirements["tool"] = Requirement("tool", command, lambda: False)
    reason = f"needs tool (`{command}`)"
    assert preventable({reason: {"test"}}) == ([reason] if fails else [])


def test_requirement_that_is_missing_fails_under_make_check_infra(
    requirements: dict[str, Requirement], monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements["tool"] = Requirement("tool", None, lambda: False)
    with pytest.raises(pytest.skip.Exception, match="needs tool"):
        require("tool")
    monkeypatch.setenv("R1_CHECK_INFRA", "1")
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception), match="needs tool") as caught:
        require("tool")
    assert caught.type is pytest.fail.Exception


def test_mark_names_the_first_missing_requirement(requirements: dict[str, Requirement]) -> None:
    requirements["one"] = Requirement("one", None, lambda: True)
    requirements["two"] = Requirement("two", "make two", lambda: False)
    assert needs("one").mark.args == (False,)
    mark = needs("one", "two").mark
    assert mark.args == (True,)
    assert mark.kwargs["reason"] == "needs two (`make two`)"


def test_every_skip_goes_through_the_requirements() -> None:
    own = [ROOT / "tests" / "requirements.py", Path(__file__)]
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path not in own
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"skipif|importorskip|pytest\.skip|mark\.skip", line)
    ]
    assert found == [], "use `needs` or `require` of tests/requirements.py"
