"""When the stages of a run are forked from a process that has their libraries loaded (launchers/forked.py)."""

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from flows.doctor.gpus import local_gpus
from flows.doctor.scope import unfinished
from flows.launch.forked import Forks
from flows.launch.local import environment
from flows.runs.selection import Selection
from stages.recipe.resolve import ResolvedRecipe

FORKED_STAGES = 3
"""Stages to compute from which on a fork server is worth what it takes to start."""
EARLY: ContextVar[Forks | None] = ContextVar("forks", default=None)
"""The server that was started before the run's flow; None: the flow starts its own."""


def stage_forks(recipe: ResolvedRecipe, selection: Selection, log: Path) -> Forks | None:
    """What forks the stages of a run that has several to compute; CUDA and the libraries of macOS do not survive a fork."""
    if sys.platform != "linux" or local_gpus() or len(unfinished(recipe, selection)[0]) < FORKED_STAGES:
        return None
    return Forks(log)


@contextlib.contextmanager
def early_forks(recipe: ResolvedRecipe, selection: Selection, log: Path) -> Iterator[None]:
    """Load the stages' libraries while something else is waited for; the flow that follows finds the server.

    A stage with other threads than the first makes the server useless to it, not wrong: it has an interpreter of its own.
    """
    forks = stage_forks(recipe, selection, log)
    if forks is None:
        yield
        return
    first = next(iter(unfinished(recipe, selection)[0].values()))
    forks.load(environment(first.compute, 1))
    token = EARLY.set(forks)
    try:
        yield
    finally:
        EARLY.reset(token)
        forks.stop()
