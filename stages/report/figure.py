"""The learning curves of several runs in one figure: a block for each training stage that they share by name."""

from collections.abc import Sequence
from pathlib import Path

from stages.report.curves import Panel, shared_panels
from stages.report.facts import Run
from stages.store.errors import UserError
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
    """Write the figure as PNG, whole; returns whether there was anything to draw.

    Raises UserError when it cannot be written.
    """
    from stages.report.drawing import png

    blocks = compared(runs)
    if not blocks:
        return False
    try:
        write_bytes(path, png(blocks, [run.name for run in runs]))
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(path), mend="name another with --figure") from error
    return True
