"""Learning curves in one figure: of several runs, a block for each training stage they share; of one run, its stages."""

from collections.abc import Sequence
from pathlib import Path

from stages.contract.errors import UserError
from stages.report.curves import Panel, shared_panels
from stages.report.facts import Run
from stages.store.files import write_bytes

MOST_BLOCKS = 12
"""Stages shown in one picture."""


def compared(runs: Sequence[Run]) -> list[tuple[str, list[Panel]]]:
    """Stage -> panels, of the training stages that at least two of the runs have, in the first run's order."""
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages if stage.trained)
    blocks = []
    for name in names:
        journals = {run.name: stage.lines for run in runs for stage in run.stages if stage.name == name and stage.trained}
        if len(journals) > 1:
            # The colour is the run's place among all, also where some have no such stage.
            lines = {run.name: journals.get(run.name, []) for run in runs}
            if panels := shared_panels(lines):
                blocks.append((name, panels))
    return blocks[:MOST_BLOCKS]


def write_figure(runs: Sequence[Run], path: Path) -> bool:
    """Write the figure of several runs as PNG, whole; returns whether there was anything to draw.

    Raises UserError when it cannot be written.
    """
    return _write(compared(runs), [run.name for run in runs], path)


def write_own_figure(run: Run, path: Path) -> bool:
    """Write the figure of one run, a line for each training stage; otherwise as `write_figure`."""
    journals = {stage.name: stage.lines for stage in run.stages if stage.trained}
    panels = shared_panels(journals)
    return _write([(run.content["name"], panels)] if panels else [], list(journals), path)


def _write(blocks: list[tuple[str, list[Panel]]], names: list[str], path: Path) -> bool:
    from stages.report.drawing import png

    if not blocks:
        return False
    try:
        write_bytes(path, png(blocks, names))
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(path), mend="name another with --figure") from error
    return True
