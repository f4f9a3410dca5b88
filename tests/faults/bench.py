"""`make faults`: injects faults at random moments and prints fault × times × outcome.

`python -m tests.faults.bench [--times 10] [--seed 0] [--only NAME…]`; with `--everywhere STAGE…` these stages are crashed at
every one of their durable operations instead. A run counts as good when the stage ended in the same outputs, rollouts, metrics
and manifest as an uninterrupted one, nothing was left running, and everything ended within its bound. The same seed chooses the
same faults, places and stages (where a signal hits is up to the machine).
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from flows.processes import MARK_VARIABLE
from stages.rewards.answers.math_pool import MathPool
from stages.store.files import files_below
from stages.store.folders import StageFolder
from stages.tracking.journal import read
from tests.conftest import ROOT
from tests.faults import crash
from tests.servers.stoppable import Run, Stoppable, check_mlflow, check_prefect

STAGES = [name for name in crash.INPUTS if name != "grown"]
TRAINED = ["base", "zero", "ppo", "cold_start"]
"""Stages with checkpoints."""
BOUND_S = 20.0
"""A request to stop is obeyed within so long."""
FROZEN_S = 5.0
"""How long a rank may give no sign of life, in these tests."""


class Bench:
    """What the faults share: the uninterrupted stages, a place to work, random numbers."""

    def __init__(self, root: Path, done: crash.Done, rng: random.Random) -> None:
        self.root, self.done, self.rng = root, done, rng
        self.count = 0

    def folder(self, name: str) -> StageFolder:
        """A fresh folder of a stage."""
        self.count += 1
        return crash.prepare(self.root / f"{self.count:05d}-{name}", name, crash.paths(self.done, crash.INPUTS[name]))

    def begun(self, name: str) -> StageFolder:
        """One whose first attempt was killed at a random operation in its second half."""
        folder = self.folder(name)
        events = crash.attempt(folder)[1]
        shutil.rmtree(folder.path)
        folder = self.folder(name)
        crash.attempt(folder, at=self.rng.randrange(events // 2, events))
        return folder

    def finish(self, folder: StageFolder, name: str, *, same: bool = True) -> None:
        """Go on to the end without faults, compare, and remove the folder."""
        status, _ = crash.attempt(folder)
        log = folder.path.with_name(f"{folder.path.name}.log")
        assert status == 0, f"exit {status} after the fault\n{log.read_text()[-2000:]}"
        if same:
            assert crash.result(folder) == self.done[name][1], "another result"
        shutil.rmtree(folder.path)

    # --- a stage as the pipeline launches it ---

    def launched(self, folder: StageFolder, processes: int) -> subprocess.Popen[str]:
        """The pipeline's process, with the stage's below it."""
        command = [sys.executable, "-m", "tests.faults.parent", str(folder.path), str(processes), str(FROZEN_S)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def ranks(self, folder: StageFolder) -> list[psutil.Process]:
        """The processes of a stage's ranks."""
        found = []
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
                mine = process.environ().get(MARK_VARIABLE, "").startswith(str(folder.path))
            except (psutil.Error, OSError):
                continue
            if mine and "stages" in command and "torch.distributed.run" not in command:
                found.append(process)
        return sorted(found, key=lambda p: p.pid)

    def after(self, folder: StageFolder, lines: int, process: subprocess.Popen[str]) -> None:
        """Wait until the stage's process lives and has taken so many steps."""
        until = time.monotonic() + 180
        while len(read(folder.journal)) < lines or not list(folder.attempts.glob("*/alive-rank0")):
            assert process.poll() is None, "it ended before the fault"
            assert time.monotonic() < until, "it did not begin"
            time.sleep(0.02)

    def ended(self, folder: StageFolder, process: subprocess.Popen[str], within_s: float) -> tuple[int, str]:
        """Exit status and last word; everything of the stage must be gone."""
        began = time.monotonic()
        status = process.wait(timeout=within_s)
        while self.left(folder) and time.monotonic() - began < within_s:
            time.sleep(0.1)
        assert not self.left(folder), "something was left running"
        return status, process.stdout.read() if process.stdout else ""

    def left(self, folder: StageFolder) -> list[psutil.Process]:
        """What runs of the stage still."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get(MARK_VARIABLE, "").startswith(str(folder.path)):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


def kill_at_an_operation(bench: Bench) -> None:
    """SIGKILL at a durable operation, up to three times in a row."""
    name = bench.rng.choice(STAGES)
    folder = bench.begun(name)
    for _ in range(bench.rng.randrange(3)):
        crash.attempt(folder, at=bench.rng.randrange(1, 60))
    bench.finish(folder, name)


def power_failure(bench: Bench) -> None:
    """The same, and what was not synced is gone."""
    name = bench.rng.choice(STAGES)
    folder = bench.folder(name)
    for _ in range(1 + bench.rng.randrange(3)):
        crash.attempt(folder, at=bench.rng.randrange(1, 100), power=True)
    bench.finish(folder, name)


def kill_at_a_moment(bench: Bench) -> None:
    """SIGKILL at any moment."""
    name = bench.rng.choice(STAGES)
    folder = bench.folder(name)
    crash.attempt(folder, after_s=bench.rng.uniform(0.2, 3.0))
    bench.finish(folder, name)


def _damaged(bench: Bench, damage: Callable[[bytes], bytes]) -> None:
    name = bench.rng.choice(TRAINED)
    folder = bench.begun(name)
    newest = max(folder.checkpoints.glob("step-*"), default=None)
    if newest is not None:
        victim = bench.rng.choice(files_below(newest))
        victim.write_bytes(damage(victim.read_bytes()))
    bench.finish(folder, name)


def torn_checkpoint(bench: Bench) -> None:
    """A file of the newest checkpoint is cut short."""
    _damaged(bench, lambda content: content[: bench.rng.randrange(len(content))])


def flipped_byte_in_a_checkpoint(bench: Bench) -> None:
    """A bit of a file of the newest checkpoint is turned."""

    def flip(content: bytes) -> bytes:
        place = bench.rng.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << bench.rng.randrange(8)]) + content[place + 1 :]

    _damaged(bench, flip)


def torn_journal(bench: Bench) -> None:
    """The journal's last line is cut."""
    name = bench.rng.choice(TRAINED)
    folder = bench.begun(name)
    if folder.journal.exists() and (size := folder.journal.stat().st_size):
        os.truncate(folder.journal, size - bench.rng.randrange(1, min(size, 40)))
    bench.finish(folder, name)


def disk_full(bench: Bench) -> None:
    """The stage runs on a small file system that fills up; with room again it goes on."""
    name = bench.rng.choice(TRAINED)
    mount = bench.root / "small"
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mount)], check=True)
    try:
        inner = Bench(mount, bench.done, bench.rng)
        folder = inner.folder(name)
        # What is free is a random share of what the stage will have written in the end.
        needed = sum(f.stat().st_size for f in bench.done[name][0].path.rglob("*") if f.is_file())
        free = int(needed * bench.rng.uniform(0.1, 0.9))
        stuffing = mount / "stuffing"
        with stuffing.open("wb") as file:
            file.write(b"\0" * max(0, shutil.disk_usage(mount).free - free))
        status, _ = crash.attempt(folder)
        assert status == 3, f"a full disk ended with {status}"
        log = folder.path.with_name(f"{folder.path.name}.log").read_text(errors="replace")
        assert "no room" in log or "No space left" in log or "could not be written" in log or not log
        stuffing.unlink()
        inner.finish(folder, name)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def asked_to_stop(bench: Bench) -> None:
    """SIGTERM or SIGINT to the pipeline: exit 75 within 20 s."""
    name = bench.rng.choice(["zero", "ppo", "cold_start"])
    folder = bench.folder(name)
    process = bench.launched(folder, 1)
    bench.after(folder, bench.rng.randrange(0, 3), process)
    process.send_signal(bench.rng.choice([signal.SIGTERM, signal.SIGINT]))
    status, _ = bench.ended(folder, process, BOUND_S)
    assert status in (75, 0), f"exit {status}"
    if status == 75:
        bench.finish(folder, name)


def parent_killed(bench: Bench) -> None:
    """SIGKILL to the pipeline: the stage notices and ends."""
    name = bench.rng.choice(["zero", "cold_start"])
    folder = bench.folder(name)
    process = bench.launched(folder, 1)
    bench.after(folder, bench.rng.randrange(0, 3), process)
    process.kill()
    bench.ended(folder, process, BOUND_S)
    bench.finish(folder, name)


def only_process_killed(bench: Bench) -> None:
    """SIGKILL to the stage's process, as the system does when memory runs out."""
    name = bench.rng.choice(["zero", "cold_start"])
    folder = bench.folder(name)
    process = bench.launched(folder, 1)
    bench.after(folder, bench.rng.randrange(1, 3), process)
    bench.ranks(folder)[0].kill()
    status, said = bench.ended(folder, process, BOUND_S)
    assert status == 3, f"exit {status}"
    assert "killed (signal 9)" in said
    bench.finish(folder, name)


def _one_of_two(bench: Bench, number: signal.Signals, within_s: float) -> str:
    name = bench.rng.choice(["zero", "cold_start"])
    folder = bench.folder(name)
    process = bench.launched(folder, 2)
    bench.after(folder, bench.rng.randrange(1, 3), process)
    bench.rng.choice(bench.ranks(folder)).send_signal(number)
    status, said = bench.ended(folder, process, within_s)
    assert status == 3, f"exit {status}"
    # It goes on with two as well, and then with one: equal within rounding, so its numbers are not compared to the bit.
    process = bench.launched(folder, 2)
    assert bench.ended(folder, process, 240.0)[0] == 0
    steps = [line.step for line in read(folder.journal)]
    assert steps == list(range(1, len(steps) + 1)), "a step is missing, or twice"
    shutil.rmtree(folder.path)
    return said


def one_of_two_ranks_killed(bench: Bench) -> None:
    """SIGKILL to one of two ranks."""
    _one_of_two(bench, signal.SIGKILL, 60.0)


def one_of_two_ranks_stopped(bench: Bench) -> None:
    """SIGSTOP to one of two ranks: the watchdog ends both."""
    said = _one_of_two(bench, signal.SIGSTOP, FROZEN_S + 30.0)
    assert "no sign of life" in said, said


def verifier_never_returns(bench: Bench) -> None:
    """Answers that keep math-verify busy for ever stand among others: they have no verdict, the others keep theirs."""
    limit_s = 2.0
    pairs = [(str(n), str(n + bench.rng.choice([0, 1]))) for n in range(40)]
    expected = ["right" if reference == answer else "wrong" for reference, answer in pairs]
    places = bench.rng.sample(range(len(pairs)), 3)
    for place in places:
        base = bench.rng.randrange(7, 99)
        pairs[place], expected[place] = ("1", f"{base}^{{{base}^{{{base}^{base}}}}}"), "none"
    pool = MathPool(limit_s)
    try:
        pool.judge([("1", "1"), ("2", "3")])  # started before the clock is
        began = time.monotonic()
        assert pool.judge(pairs) == expected, "another verdict"
        # A worker that was ended is started again.
        assert time.monotonic() - began < len(places) * (limit_s + 20.0), "past its bound"
    finally:
        pool.end()
    assert not [p for p in psutil.Process().children(recursive=True) if "stages.rewards.verifier_pool.worker" in p.cmdline()]


@contextlib.contextmanager
def _run_beside(bench: Bench, what: str, *arguments: str, **variables: str) -> Iterator[tuple[Stoppable, Run]]:
    """A run, until its R1-Zero stage is done, with a server of its own; both are gone afterwards."""
    folder = bench.root / f"{what}-{bench.rng.randrange(10**9)}"
    folder.mkdir()
    server = Stoppable(what, folder)
    server.start()
    filled = [text.format(address=server.address) for text in arguments]
    chosen = {name: text.format(address=server.address, home=folder / "home") for name, text in variables.items()}
    run = Run(folder, "--until", "zero", *filled, **chosen)
    try:
        run.wait_for("step", run.step(bench.rng.randrange(1, 20)))
        yield server, run
    finally:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
        server.end()
        shutil.rmtree(folder, ignore_errors=True)


def mlflow_away_for_a_minute(bench: Bench) -> None:
    """MLflow is killed, or hangs, in the middle of a run, and is back after a minute."""
    with _run_beside(bench, "mlflow", "--set", "tracking.uri={address}") as (server, run):
        hangs = bench.rng.random() < 0.5
        server.send(signal.SIGSTOP if hangs else signal.SIGKILL)
        time.sleep(60)
        server.send(signal.SIGCONT) if hangs else server.start()
        assert run.end() == 0, run.said()[-2000:]
        check_mlflow(server.address, run.record())


def prefect_restarted(bench: Bench) -> None:
    """Prefect's server is killed in the middle of a run and started again."""
    chosen = {"PREFECT_API_URL": "{address}/api", "PREFECT_HOME": "{home}"}
    with _run_beside(bench, "prefect", **chosen) as (server, run):
        server.send(signal.SIGKILL)
        time.sleep(bench.rng.uniform(0, 20))
        server.start()
        assert run.end() == 0, run.said()[-2000:]
        assert run.record()["status"] == "done"
        check_prefect(server, run.record())


FAULTS = [
    kill_at_an_operation,
    power_failure,
    kill_at_a_moment,
    torn_checkpoint,
    flipped_byte_in_a_checkpoint,
    torn_journal,
    disk_full,
    asked_to_stop,
    parent_killed,
    only_process_killed,
    one_of_two_ranks_killed,
    one_of_two_ranks_stopped,
    verifier_never_returns,
    mlflow_away_for_a_minute,
    prefect_restarted,
]


def run(bench: Bench, chosen: list[Callable[[Bench], None]], times: int) -> Iterator[tuple[str, int, list[str]]]:
    """Each fault so many times: its name, how often it went well, and what went wrong."""
    for fault in chosen:
        wrong = []
        for number in range(times):
            bench.rng.seed(f"{fault.__name__}-{number}-{bench.rng.random()}")
            try:
                fault(bench)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                wrong.append(f"{fault.__name__} {number}: {error}")
        yield fault.__name__.replace("_", " "), times - len(wrong), wrong


def main() -> None:
    """Print the table; exit 1 when anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--everywhere", nargs="*", choices=STAGES)
    options = parser.parse_args()
    chosen = [f for f in FAULTS if not options.only or f.__name__ in options.only]
    assert chosen, f"known are {', '.join(f.__name__ for f in FAULTS)}"
    crash.warm()
    failed = False
    with tempfile.TemporaryDirectory(prefix="r1-faults-") as folder:
        done = crash.stages(Path(folder) / "whole")
        for name in options.everywhere or []:
            found = crash.crashed_everywhere(Path(folder) / f"everywhere-{name}", done, name, random.Random(options.seed))
            print(
                f"{name}: {found['operations']} operations, {found['crashes']} crashes, the same result every time", flush=True
            )
        if options.everywhere:
            return
        bench = Bench(Path(folder), done, random.Random(options.seed))
        print(f"seed {options.seed}; {len(done)} stages\n{'fault':<34}{'times':>6}{'good':>6}{'seconds':>9}", flush=True)
        began = time.monotonic()
        for name, good, wrong in run(bench, chosen, options.times):
            print(f"{name:<34}{options.times:>6}{good:>6}{time.monotonic() - began:>9.0f}", flush=True)
            for sentence in wrong:
                print(f"  {sentence}", flush=True)
            failed, began = failed or bool(wrong), time.monotonic()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
