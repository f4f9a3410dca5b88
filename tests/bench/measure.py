"""Measuring: ratios round by round, the table, how fast this machine multiplies."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.sides import Spec, Turn, rounds
from tests.bench.worker import Turns

MATRIX = 2048
"""Rows and columns of the matrices whose product is the peak."""


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
    ) -> dict[str, Any]:
        """Let our side and its peers take turns.

        beside: further sides that take turns and are not compared; found: further numbers made of everybody's turns.
        """
        specs = {"ours": ours, **peers, **(beside or {})}
        ready, turns = rounds(specs, self.pairs, self.out / "logs" / name)
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
