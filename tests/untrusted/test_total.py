"""Every function that reads sampled text is total: any Unicode string in, a value out, in time linear in the text's length."""

import ast
import contextlib
import gc
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.untrusted.calls import of
from tests.untrusted.readers import NOT_SAMPLED, READERS
from tests.untrusted.texts import FRAGMENTS, TEXTS, large_texts

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, MANY = 24, 2000
"""Texts drawn for each reader, fast and slow."""
SMALL, SMALL_S = 20_000, 0.6
"""Characters of a patterned text in the fast test, seconds of processor time for it: a quadratic reader takes longer."""
LARGE, LARGE_S = 1_000_000, 6.0
"""The same in the slow test. A reader that is linear takes well under a second for most patterns."""
SAMPLED_NAMES = {
    "text",
    "texts",
    "thought",
    "answer",
    "answers",
    "completion",
    "completions",
    "raw",
    "program",
    "episode",
    "episodes",
    "group",
    "groups",
    "asked",
    "pairs",
    "reply",
}
SAMPLED_TYPES = ("Episode", "list[Group]", "Sequence[Group]", "Completion", "Asked")
PLACES = ("stages/rewards", "stages/curation", "stages/evals", "stages/rl", "stages/kinds", "stages/problems",
          "stages/report", "stages/store", "stages/contract", "stages/runtime", "stages/tracking",
          "stages/rollout/records.py", "flows")  # fmt: skip


class TooSlow(BaseException):
    """A reader took too long. Not an Exception, so that no code under test can take it for one of its own."""


@contextlib.contextmanager
def processor_seconds(limit: float) -> Iterator[None]:
    """Raise TooSlow when the body takes more processor time."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    gc.disable()  # what other tests have left is collected outside the limit
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        gc.enable()
        signal.signal(signal.SIGPROF, before)


@pytest.fixture(autouse=True)
def _no_syntax_warnings() -> Iterator[None]:
    with warnings.catch_warnings():  # of texts that Python's parser is shown
        warnings.simplefilter("ignore", SyntaxWarning)
        yield


def read(name: str, text: str) -> None:
    """Call a reader, and check what it gives back."""
    reader = READERS[name]
    assert reader.holds(text, reader.call(of(name), text)), ascii(text)[:300]


@pytest.mark.parametrize("name", READERS)
def test_reader_gives_a_value_for_any_text(name):
    reader = READERS[name]

    @settings(
        max_examples=EXAMPLES // reader.cost + 1,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(TEXTS)
    def every_text(text):
        read(name, text)
        read(name, reader.place(text))

    every_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_reader_gives_a_value_for_many_texts(name):
    @settings(max_examples=MANY // READERS[name].cost, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TEXTS)
    def every_text(text):
        read(name, text)

    every_text()


@pytest.mark.parametrize("name", READERS)
def test_reader_gives_a_value_for_each_hostile_fragment(name):
    together = READERS[name].cost
    texts = ["", *("".join(FRAGMENTS[start : start + together]) for start in range(0, len(FRAGMENTS), together))]
    for text in texts:
        for placed in dict.fromkeys((text, f"5{text}", READERS[name].place(text))):
            read(name, placed)


@pytest.mark.parametrize("name", READERS)
def test_reader_takes_time_linear_in_the_text(name):
    slow = too_slow(name, SMALL, SMALL_S)
    assert slow == []


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_reader_reads_a_megabyte_of_any_pattern_in_seconds(name):
    slow = too_slow(name, LARGE, LARGE_S)
    assert slow == []


def too_slow(name: str, size: int, limit: float) -> list[str]:
    """The patterned texts for which a reader takes longer than the limit."""
    read(name, "5")  # what it imports is not counted
    found = []
    reader = READERS[name]
    for pattern, text in large_texts(size).items():
        if pattern in reader.unlike:
            continue
        for placed in dict.fromkeys((text, reader.place(text))):
            try:
                with processor_seconds(limit * reader.slow):
                    read(name, placed)
            except TooSlow:
                found.append(pattern)
    return found


def sampled_parameters() -> dict[str, list[str]]:
    """Public functions and methods whose parameters are named or typed like sampled text, with these parameters."""
    found: dict[str, list[str]] = {}

    def visit(node: ast.AST, module: str, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                visit(child, module, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                names = [a.arg for a in (*child.args.args, *child.args.kwonlyargs) if is_sampled(a)]
                found.update({f"{module}:{prefix}{child.name}": names} if names else {})

    for place in PLACES:
        path = ROOT / place
        for file in [path] if path.suffix else sorted(path.rglob("*.py")):
            visit(ast.parse(file.read_text(encoding="utf-8")), ".".join(file.relative_to(ROOT).with_suffix("").parts), "")
    return found


def is_sampled(argument: ast.arg) -> bool:
    kind = ast.unparse(argument.annotation) if argument.annotation else ""
    if any(name in kind for name in SAMPLED_TYPES):
        return True
    return argument.arg in SAMPLED_NAMES and kind not in ("int", "float", "bool")


def test_every_function_that_takes_sampled_text_is_called_here_or_listed_with_a_reason():
    found = sampled_parameters()
    unknown = {name: parameters for name, parameters in found.items() if name not in READERS and name not in NOT_SAMPLED}
    assert unknown == {}, "add each to READERS in tests/untrusted/readers.py, or to NOT_SAMPLED with the reason"
    assert [name for name in NOT_SAMPLED if name not in found] == []
    assert len(found) > 60


@pytest.mark.parametrize("name", READERS)
def test_registered_name_exists(name):
    assert callable(of(name))
