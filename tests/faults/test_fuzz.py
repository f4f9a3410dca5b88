"""Whatever is done to a file, the pipeline refuses it in one line, or gives it another identity, or reads what it meant.

Never a traceback, never a hang, and what it refuses it leaves as it was. The cases are the same in every run (derandomized).
"""

import contextlib
import hashlib
import json
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.contract.errors import UserError
from tests.faults import damage
from tests.faults.inputs import INPUTS, Input, Read

SECONDS = 10.0
"""Processor time that one case may take."""
GIB = 2
"""Memory that one case may take besides."""
FAST, SLOW = 6, 100
"""Cases per kind of input."""
LONGEST = 3100
"""Characters of a line that people are to read."""

Content = dict[str, bytes | None]
"""Relative name -> content; None is a folder."""


class Case(NamedTuple):
    """An input with one thing wrong."""

    what: str
    content: Content

    def __repr__(self) -> str:
        return self.what


class Hang(BaseException):
    """A case took too long. Not an Exception, so that no code under test can take it for one of its own."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `Hang` when the body takes more processor time, and MemoryError when it takes more memory than `GIB`."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + GIB * 2**30, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def inside(content: Content) -> Iterator[Path]:
    """A fresh folder with that content, which is the working folder meanwhile."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, data in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).mkdir() if data is None else (folder / name).write_bytes(data)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def content_of(folder: Path) -> Content:
    paths = sorted(folder.rglob("*"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[Content, Read]]:
    """Name of an input -> its undamaged content and how it reads; made when it is first needed."""
    return {}


def undamaged(name: str, made: dict[str, tuple[Content, Read]]) -> tuple[Content, Read]:
    if name not in made:
        with inside({}) as folder:
            INPUTS[name].make(folder)
            content = content_of(folder)
        with inside(content) as folder:
            made[name] = content, INPUTS[name].load(folder)
    return made[name]


@st.composite
def harmed(draw: st.DrawFn, content: Content, given: Input) -> Case:
    """The content with one thing wrong."""
    files = {
        name: kinds for pattern, kinds in given.files.items() for name in sorted(content) if Path(name).match(pattern)
        if content[name] is not None
    }  # fmt: skip
    assert files, "nothing to damage"
    name = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(["damaged"] * 9 + ["gone", "a folder", "exchanged", "joined"] * given.whole))
    data = content[name]
    assert data is not None
    other = draw(st.sampled_from(sorted(n for n, c in content.items() if c is not None)))
    if how == "damaged":
        what, after = draw(damage.damaged(data, files[name]))
        return Case(f"{name}: {what}", content | {name: after})
    if how == "gone":
        return Case(f"{name}: gone", {key: value for key, value in content.items() if key != name})
    if how == "a folder":
        return Case(f"{name}: now a folder", content | {name: None})
    if how == "exchanged":
        return Case(f"{name}: now what {other} was", content | {name: content[other]})
    beside = Path(name).with_name(f"more-{Path(name).name}").as_posix()
    return Case(f"{beside}: beside it", content | {beside: data})


def check(load: Callable[[Path], Read], content: Content, before: Read) -> str:
    """Read the content and judge what comes of it: `refused`, `same` or `other`."""
    with inside(content) as folder:
        try:
            with at_most(SECONDS):
                after = load(folder)
        except UserError as error:
            line = str(error)
            assert line.isprintable(), line[:300]
            assert 10 < len(line) < LONGEST, line[:300]
            assert error.where, line
            return "refused"
        finally:
            untouched(content, folder)
    if after[0] == before[0] or str(after[0]) == str(before[0]):  # NaN is no other meaning
        return "same"
    assert after[1] is not None, f"believed: {after[0]}"
    assert after[1] != before[1], "another meaning under the same identity"
    return "other"


def untouched(content: Content, folder: Path) -> None:
    """What was there is there, under its name or set aside."""
    left = [hashlib.sha256(data).digest() for data in content_of(folder).values() if data is not None]
    for name, data in content.items():
        assert data is None or hashlib.sha256(data).digest() in left, f"{name} was changed"


def fuzz(name: str, whole: dict[str, tuple[Content, Read]], cases: int) -> None:
    content, before = undamaged(name, whole)
    counts = {"refused": 0, "same": 0, "other": 0}

    @settings(max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(harmed(content, INPUTS[name]))
    def cases_of(case: Case) -> None:
        counts[check(INPUTS[name].load, case.content, before)] += 1

    cases_of()
    print(f"{name}: {sum(counts.values())} cases, {counts}")
    assert sum(counts.values()) >= cases * 0.9
    assert counts["refused"] + counts["other"] > 0


@pytest.mark.parametrize("name", [name for name in INPUTS if INPUTS[name].cost == 1])
def test_damage(name: str, whole: dict[str, tuple[Content, Read]]) -> None:
    fuzz(name, whole, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_much_damage(name: str, whole: dict[str, tuple[Content, Read]]) -> None:
    fuzz(name, whole, int(SLOW * INPUTS[name].cost))


# Values that have tripped a parser before are tried one by one, whatever the random cases hit.

SETTINGS = (
    "stages.base.seed", "name", "stages.zero.lr", "runs", "stages.zero.problems", "stages.zero.deepspeed", "stages.base",
    "stages.zero.policy", "tracking.uri", "stages.evaluation.models", "stages", "shared", "stages.zero.kind",
    "shared.problems.path",
)  # fmt: skip
DOCUMENTS = ("config", "manifest", "runs", "journal", "checkpoint", "problems.jsonl", "problems.json", "deepspeed")
"""Inputs in JSON."""


def one_by_one(cases: list[Any], *, every: bool) -> list[Any]:
    """All of them in the slow run, a few in the fast one."""
    chosen = cases if every else cases[::23]
    print(len(chosen), "cases")
    return chosen


def try_settings(whole: dict[str, tuple[Content, Read]], *, every: bool) -> None:
    content, before = undamaged("recipe", whole)
    load = INPUTS["recipe"].load
    for key, value in one_by_one([(key, value) for value in damage.YAML_VALUES for key in SETTINGS], every=every):
        check(lambda folder, text=f"{key}={value}": load(folder, (text,)), content, before)  # type: ignore[misc, call-arg]


def try_values(name: str, whole: dict[str, tuple[Content, Read]], *, every: bool) -> None:
    content, before = undamaged(name, whole)
    file = next(f for pattern in INPUTS[name].files for f in sorted(content) if Path(f).match(pattern))
    data = content[file]
    assert data is not None
    line, *rest = data.split(b"\n") if data[:1] == b"{" and b"\n{" in data else [data]
    document = json.loads(line)
    places = damage.places(document)
    cases = [(path, text) for text in ("", *damage.JSON_VALUES.values()) for path in places[:: 1 + len(places) // 12]]
    for path, text in one_by_one(cases, every=every):
        if path or text:
            changed = b"\n".join([damage.with_value(document, path, text), *rest])
            check(INPUTS[name].load, content | {file: changed}, before)


def test_settings_one_by_one(whole: dict[str, tuple[Content, Read]]) -> None:
    try_settings(whole, every=False)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_values_one_by_one(name: str, whole: dict[str, tuple[Content, Read]]) -> None:
    try_values(name, whole, every=False)


@pytest.mark.slow
def test_all_settings_one_by_one(whole: dict[str, tuple[Content, Read]]) -> None:
    try_settings(whole, every=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_all_values_one_by_one(name: str, whole: dict[str, tuple[Content, Read]]) -> None:
    try_values(name, whole, every=True)
