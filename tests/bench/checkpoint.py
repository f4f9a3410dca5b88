"""What one checkpoint in ten steps costs: updates with it and without."""

import tempfile
from typing import Any

from tests.bench.measure import Bench
from tests.bench.sides import Spec, once
from tests.bench.update import _recorded
from tests.bench.worker import Turns

UPDATES = 10


def checkpoint(bench: Bench) -> dict[str, Any]:
    """Updates alone, without the rollouts of a step, during most of which the disk would have time: the hard case."""
    sizes = {"questions": 2, "samples": bench.size(8, 4), "tokens": bench.size(64, 8)}
    answers = bench.out / "answers-checkpoint.json"
    options = {"model": str(bench.model), "problems": str(bench.problems), "answers": str(answers), **sizes}
    once(Spec("material", "answers", options), bench.out / "logs" / "checkpoint" / "answers.log")
    what = f"{UPDATES} updates with one checkpoint, written in the background / without"
    folder = {"folder": str(bench.out)}
    ours, peers = Spec("checkpoint", "with", {**options, **folder}), {"no checkpoint": Spec("checkpoint", "without", options)}
    return bench.compare("checkpoint", what, ours, peers)


def _updates(options: dict[str, Any], turns: Turns, folder: str | None) -> None:
    """A checkpoint is begun after the first update, as a stage begins one, and finished before the next can be."""
    from pathlib import Path

    from stages.engine.checkpoint.checkpointer import Checkpointer
    from stages.engine.settings import Checkpoints
    from tests.bench.ours import load, policy_of, recorded_groups, train

    groups = recorded_groups(_recorded(options))
    policy, settings = policy_of(load(options["model"])[0])
    kept = Checkpointer(Path(folder), Checkpoints(), 0) if folder else None

    def work() -> None:
        for number in range(UPDATES):
            train(policy, groups, settings, options["tokens"], number)
            if kept:
                kept.finish()
                if number == 0:
                    kept.begin(1, {}, {"policy": policy.state()})

    turns.each(work)


def _with(options: dict[str, Any], turns: Turns) -> None:
    with tempfile.TemporaryDirectory(dir=options["folder"]) as folder:
        _updates(options, turns, f"{folder}/checkpoints")


def _without(options: dict[str, Any], turns: Turns) -> None:
    _updates(options, turns, None)


SIDES = {"with": _with, "without": _without}
