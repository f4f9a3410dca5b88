"""Measuring: sides as processes that take turns, ratios round by round, how fast this machine multiplies."""

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.worker import Turns

ROOT = Path(__file__).resolve().parents[2]
MATRIX = 2048
"""Rows and columns of the matrices whose product is the peak."""

Turn = dict[str, Any]


class SideFailed(Exception):
    """A side's process ended, or said what it should not have."""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Spec:
    """How to start a side."""

    subject: str
    """Module of tests/bench."""
    side: str
    """Name in that module's SIDES."""
    options: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    """Threads of each process; all cores by default."""
    processes: int = 1
    """More than one: under torchrun."""
    python: str = sys.executable
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables besides."""

    def command(self) -> list[str]:
        """The command line."""
        worker = ["-m", "tests.bench.worker", self.subject, self.side, json.dumps(self.options)]
        if self.processes == 1:
            return [self.python, *worker]
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        return [self.python, "-m", "torch.distributed.run", f"--nproc_per_node={self.processes}", *rendezvous, *worker]

    def environment(self) -> dict[str, str]:
        """As stages are launched, and offline."""
        threads = str(self.threads or cores())
        return {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **self.variables,
        }


class Side:
    """A side's process, as its parent sees it."""

    def __init__(self, spec: Spec, log: Path) -> None:
        """Start it and wait until it is ready.

        Raises SideFailed when it ends before.
        """
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                spec.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=spec.environment(),
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )
        try:
            self.ready = self._answer()
        except BaseException:
            self.end()
            raise

    def go(self) -> Turn:
        """Let it work once. Raises SideFailed when it ends instead."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer()

    def end(self) -> None:
        """End it and all that it has started."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # this is how a worker learns that there is no further turn
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answer(self) -> Turn:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: Turn = json.loads(line)
                return found
        raise self._failure()

    def _failure(self) -> SideFailed:
        status = self._process.wait()
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return SideFailed(f"ended with status {status}: {lines[-1] if lines else ''} ({self._log})")


def once(spec: Spec, log: Path) -> Turn:
    """Start a side, let it work once, end it."""
    with contextlib.closing(_Ended(Side(spec, log))) as held:
        return held.side.go()


@dataclass
class _Ended:
    side: Side

    def close(self) -> None:
        self.side.end()


@dataclass(frozen=True)
class Spread:
    """Median, least and most of what was measured several times."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def rounds(specs: Mapping[str, Spec], count: int, logs: Path) -> tuple[dict[str, Turn], dict[str, list[Turn]]]:
    """Start all sides, let each work once uncounted, then `count` times in turn: A B A B …

    Returns what each side said when it was ready, and its turns. Raises SideFailed.
    """
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name, spec in specs.items():  # one after the other: they would slow each other down
            sides[name] = stack.enter_context(contextlib.closing(_Ended(Side(spec, logs / f"{_file(name)}.log")))).side
        for side in sides.values():
            side.go()
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        for _ in range(count):
            for name, side in sides.items():
                turns[name].append(side.go())
        return {name: side.ready for name, side in sides.items()}, turns


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


@dataclass
class Bench:
    """What every subject is given."""

    out: Path
    model: Path
    """The language model's folder."""
    toy: Path
    problems: Path
    """JSON list of {question, answer} for the language model."""
    toy_problems: Path
    pairs: int
    quick: bool
    extras: dict[str, Any] = field(default_factory=dict)
    """What only some subjects need, by the option's name."""

    def size(self, full: Any, quick: Any) -> Any:
        """One of two sizes."""
        return quick if self.quick else full

    def compare(
        self,
        name: str,
        what: str,
        ours: Spec,
        peers: Mapping[str, Spec],
        *,
        beside: Mapping[str, Spec] | None = None,
        found: Callable[[dict[str, list[Turn]]], dict[str, Any]] = lambda _: {},
        most: int | None = None,
    ) -> dict[str, Any]:
        """Let our side and its peers take turns.

        beside: further sides that take turns and are not compared; found: further numbers made of everybody's turns; most:
        counted rounds at most, where one takes long.
        """
        specs = {"ours": ours, **peers, **(beside or {})}
        ready, turns = rounds(specs, min(self.pairs, most or self.pairs), self.out / "logs" / name)
        result: dict[str, Any] = {"name": name, "what": what, "sides": {}, "against": {}, "found": {}}
        for side in ("ours", *peers):
            result["sides"][side] = summary(ready[side], turns[side])
        for peer in peers:
            result["against"][peer] = against(turns["ours"], turns[peer])
        result["found"] = found(turns)
        return result


def summary(ready: Turn, turns: Sequence[Turn]) -> dict[str, Any]:
    """What a side was like."""
    seconds = [turn["seconds"] for turn in turns]
    rates = [turn["tokens"] / turn["seconds"] for turn in turns if "tokens" in turn]
    peak = max(turn["peak_mib"] for turn in turns)
    told: dict[str, Any] = {
        "settings": ready["settings"],
        "seconds": asdict(Spread.of(seconds)),
        "every_seconds": seconds,
        "peak_mib": peak,
        "resident_mib": ready["resident_mib"],
    }
    return told | ({"tokens_per_second": asdict(Spread.of(rates))} if rates else {})


def against(ours: Sequence[Turn], theirs: Sequence[Turn]) -> dict[str, Any]:
    """Our seconds by a peer's, round by round, and our peak memory by its.

    Where sides may have sampled unequally many tokens, the ratio is that of seconds per token.
    """

    def cost(turn: Turn) -> float:
        return float(turn["seconds"]) / float(turn.get("tokens", 1))

    both = all("tokens" in turn for turn in (*ours, *theirs))
    pairs = list(zip(ours, theirs, strict=True))
    ratios = [cost(a) / cost(b) if both else a["seconds"] / b["seconds"] for a, b in pairs]
    peaks = [max(turn["peak_mib"] for turn in side) for side in (ours, theirs)]
    return {"ratio": asdict(Spread.of(ratios)), "ratios": ratios, "memory_ratio": peaks[0] / peaks[1]}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the line log value = a + b log size that fits best."""
    x, y = [math.log(s) for s in sizes], [math.log(max(v, 1e-9)) for v in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines to print: one for every comparison with a peer, then one for every further number."""
    head = ("ours s", "peer s", "ours MiB", "peer MiB")
    yield f"{'comparison':<15} {'ours / peer':<26} {'time':<21} " + "{:>8} {:>8} {:>9} {:>9} memory".format(*head)
    for result in results:
        if "failed" in result:
            yield f"{result['name']:<15} failed: {result['failed']}"
        for peer, ratio in result.get("against", {}).items():
            ours, theirs = result["sides"]["ours"], result["sides"][peer]
            yield (
                f"{result['name']:<15} {peer:<26} {Spread(**ratio['ratio'])!s:<21} "
                f"{ours['seconds']['median']:8.2f} {theirs['seconds']['median']:8.2f} "
                f"{ours['peak_mib']:9.0f} {theirs['peak_mib']:9.0f} {ratio['memory_ratio']:6.2f}"
            )
    yield ""
    for result in results:
        for name, value in result.get("found", {}).items():
            yield (
                f"{result['name']:<15} {name}: {value:.4g}"
                if isinstance(value, float)
                else f"{result['name']:<15} {name}: {value}"
            )


def _peak(_options: dict[str, Any], turns: Turns) -> None:
    import torch

    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    out = torch.empty(MATRIX, MATRIX)
    turns.settings = {"matrix": MATRIX, "threads": torch.get_num_threads()}

    def work() -> Turn:
        found = []
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            found.append(2 * MATRIX**3 / (time.perf_counter() - started))
        return {"flops": max(found)}

    turns.each(work)


SIDES = {"peak": _peak}
