"""Stages that failed are tried again, later and later."""

import time
from pathlib import Path

import psutil
import pytest

from stages.tracking.journal import read
from tests.servers.stoppable import Run


@pytest.mark.slow
def test_pauses_before_new_attempts_grow(tmp_path: Path) -> None:
    """Killed three times with two retries: the pauses are about 4 s and 8 s, then the stage has failed."""
    run = Run(tmp_path, "--until", "zero", "--retries", "2", "--retry-delay", "4")
    killed, begun = list[float](), list[float]()
    try:
        for attempt in (1, 2, 3):
            run.wait_for(f"attempt {attempt}", lambda n=attempt: any(run.runs.glob(f"stages/rl-*/attempts/{n}")))
            begun.append(time.time())
            run.wait_for("more steps", run.step(5 * attempt))
            (stage,) = (p for p in psutil.Process(run.process.pid).children(recursive=True) if "stages" in p.cmdline())
            stage.kill()  # as the system does when memory runs out
            killed.append(time.time())
        assert run.end() == 3, run.said()
    finally:
        run.process.kill()
    (zero,) = run.runs.glob("stages/rl-*")
    assert sorted(p.name for p in (zero / "attempts").iterdir()) == ["1", "2", "3"]
    pauses = [begun[1] - killed[0], begun[2] - killed[1]]
    # By chance a pause is from 0.63 to 1.5 times as long; noticing that the process is gone takes its time too.
    assert 2.4 < pauses[0] < 8, pauses
    assert 4.9 < pauses[1] < 14, pauses
    assert "was killed (signal 9)" in run.record()["error"]
    assert [line.step for line in read(zero / "journal.jsonl")][:10] == list(range(1, 11))
