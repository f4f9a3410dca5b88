"""Two processes of one thread against one: the whole step, each process with half of the problems."""

from typing import Any

from tests.bench.measure import Bench
from tests.bench.sides import Spec, Turn


def processes(bench: Bench) -> dict[str, Any]:
    """Our step on one rank and on two, through torchrun."""
    options = {
        "model": str(bench.model),
        "problems": str(bench.problems),
        "questions": bench.size(4, 2),
        "samples": bench.size(8, 4),
        "tokens": bench.size(64, 8),
        "forced": True,
        "steps": 1,
    }

    def found(turns: dict[str, list[Turn]]) -> dict[str, Any]:
        rates = {name: [t["samples"] / t["seconds"] for t in turns[name]] for name in ("ours", "one process")}
        speedups = sorted(two / one for two, one in zip(rates["ours"], rates["one process"], strict=True))
        return {
            "samples per second, two processes": max(rates["ours"]),
            "samples per second, one process": max(rates["one process"]),
            "speed-up of the second process": speedups[len(speedups) // 2],
        }

    two = Spec("step", "ours", options, threads=1, processes=2)
    one = Spec("step", "ours", options, threads=1)
    what = "a step on two processes of one thread each / on one"
    return bench.compare("processes", what, two, {"one process": one}, found=found)
