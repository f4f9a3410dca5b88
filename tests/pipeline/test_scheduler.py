"""Stages at a time: order, errors, requests to end, and what each gets of the machine."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.pipeline import gpus
from flows.pipeline.gpus import VARIABLE, Devices
from flows.pipeline.scheduler import Floor, go_through, share
from stages.contract.config import Compute
from stages.contract.errors import Interrupted, StageFailed

NEEDS: dict[str, set[str]] = {"base": set(), "zero": {"base"}, "eval-base": {"base"}, "eval-zero": {"base", "zero"}}
ORDER = list(NEEDS)


class Work:
    """Stands for stages: remembers when each began and ended, and how many ran at once."""

    def __init__(self, seconds: float = 0.1, errors: dict[str, Exception] | None = None) -> None:
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.most, self._now, self._lock = 0, 0, threading.Lock()
        self._seconds, self._errors = seconds, errors or {}

    def __call__(self, name: str) -> Exception | None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        self.began[name] = time.monotonic()
        time.sleep(self._seconds)
        self.ended[name] = time.monotonic()
        with self._lock:
            self._now -= 1
        return self._errors.get(name)


@pytest.mark.parametrize(("parallel", "most"), [(1, 1), (2, 2), (3, 2)])
def test_nothing_begins_before_what_it_needs(parallel: int, most: int) -> None:
    work = Work()
    assert go_through(ORDER, NEEDS, parallel, work, Floor()) is None
    assert (set(work.ended), work.most) == (set(ORDER), most)
    for name, needed in NEEDS.items():
        assert all(work.began[name] >= work.ended[other] for other in needed)
    if parallel > 1:
        assert work.began["eval-base"] < work.ended["zero"]


def test_what_is_left_out_of_the_order_is_not_waited_for() -> None:
    work = Work(0.0)
    assert go_through(["eval-zero"], NEEDS, 2, work, Floor()) is None
    assert set(work.ended) == {"eval-zero"}


@pytest.mark.parametrize("parallel", [1, 2])
def test_after_an_error_nothing_begins_and_what_runs_ends(parallel: int) -> None:
    error = StageFailed("zero failed")
    needs: dict[str, set[str]] = {"zero": set(), "slow": set(), "late": set()}
    begun, ended = [], []

    def work(name: str) -> Exception | None:
        begun.append(name)
        time.sleep(0.3 if name == "slow" else 0.05)
        ended.append(name)
        return error if name == "zero" else None

    assert go_through(list(needs), needs, parallel, work, Floor()) is error
    assert (begun, ended) == ((["zero"], ["zero"]) if parallel == 1 else (["zero", "slow"], ["zero", "slow"]))


def test_a_mistake_of_ours_is_raised_with_the_others_stopped() -> None:
    needs: dict[str, set[str]] = {"broken": set(), "other": set()}
    floor, told = Floor(), threading.Event()

    def work(name: str) -> Exception | None:
        if name == "broken":
            raise LookupError("ours")
        with pytest.raises(Interrupted):
            floor.pause(20)
        told.set()
        return None

    with pytest.raises(LookupError, match="ours"):
        go_through(list(needs), needs, 2, work, floor)
    assert told.wait(5)


def test_a_signal_stops_all_and_waits_for_those_who_work() -> None:
    """What only waits (for a lock, slots, its next attempt) is not waited for."""
    needs: dict[str, set[str]] = {"one": set(), "two": set(), "sleeper": set()}
    floor, saved = Floor(), []

    def checkpoint(name: str) -> None:
        time.sleep(0.4)
        saved.append(name)

    def work(name: str) -> Exception | None:
        if name == "sleeper":
            time.sleep(30)
            return None
        with floor:
            try:
                floor.pause(30)
            except Interrupted as error:
                checkpoint(name)
                return error
        return None

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            go_through(list(needs), needs, 3, work, floor)
    finally:
        signal.signal(signal.SIGALRM, earlier)
    assert sorted(saved) == ["one", "two"]
    assert time.monotonic() - began < 5
    with pytest.raises(Interrupted), floor:
        pass


def test_cores_are_shared_by_the_graph_alone() -> None:
    assert {name: share(name, ORDER, NEEDS, 3) for name in ORDER} == {"base": 1, "zero": 2, "eval-base": 3, "eval-zero": 2}
    assert {share(name, ORDER, NEEDS, 1) for name in ORDER} == {1}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None, int], None]:
    def give(text: str | None, installed: int) -> None:
        for number in range(installed):
            (tmp_path / f"0000:0{number}:00.0").mkdir()
        monkeypatch.setattr(gpus, "DRIVER", tmp_path)
        if text is None:
            monkeypatch.delenv(VARIABLE, raising=False)
        else:
            monkeypatch.setenv(VARIABLE, text)

    return give


def test_stages_side_by_side_have_devices_of_their_own(given: Callable[[str | None, int], None]) -> None:
    given(None, 3)
    pool, asked = Devices(2), []

    def pause(_seconds: float) -> None:
        asked.append(1)
        raise Interrupted("waited")

    with pool.take(Compute(), pause) as one, pool.take(Compute(processes=2), pause) as two:
        assert (one, two) == ({VARIABLE: "0"}, {VARIABLE: "1,2"})
        with pytest.raises(Interrupted), pool.take(Compute(), pause):
            pass
        with pool.take(Compute(device="cpu"), pause) as none:
            assert none == {}
    with pool.take(Compute(processes=8), pause) as everything:
        assert sorted(everything[VARIABLE].split(",")) == ["0", "1", "2"]
    assert asked == [1]


@pytest.mark.parametrize(
    ("text", "installed", "parallel", "wanted"),
    [("5,7", 8, 2, {VARIABLE: "5"}), ("", 8, 2, {}), ("-1", 8, 2, {}), (None, 0, 2, {}), (None, 8, 1, {})],
)
def test_which_devices_there_are(
    given: Callable[[str | None, int], None], text: str | None, installed: int, parallel: int, wanted: dict[str, str]
) -> None:
    given(text, installed)
    with Devices(parallel).take(Compute(), time.sleep) as variables:
        assert variables == wanted
