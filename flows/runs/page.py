"""A run's page, report.html in its folder: what it needs of the recipe, and its making at the end of a run."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.runs.record import RunRecord
from stages.contract.errors import UserError


def page_at_end(
    record: RunRecord,
    status: str,
    error: str | None,
    note: Callable[[str], None],
    requests: tuple[type[BaseException], ...] = (KeyboardInterrupt,),
) -> Path | None:
    """Make the page of a run that ends so; that it could not be made is said in one line and changes nothing else.

    `requests`: what a signal to end raises. It ends this alone: what the stages came to is settled.
    """
    from stages.report.page import write_page

    with contextlib.suppress(*requests):
        try:
            return write_page(record.folder, {**record.content, "status": status, "error": error}, needs(record))[0]
        except Exception as fault:  # noqa: BLE001 - a run is not lost to a page
            said = str(fault).splitlines()[0][:300] if str(fault) else ""
            note(f"no report.html was written ({type(fault).__name__}: {said}); `r1 report {record.name}` tries again")
    return None


def needs(record: RunRecord) -> dict[str, list[str]]:
    """Stage -> the stages whose outputs it takes; nothing when this version no longer understands the recipe."""
    from stages.contract.config import stage_inputs
    from stages.recipe.resolve import resolve

    try:
        recipe = resolve(record.content["document"])
    except UserError:  # a file that it names is gone, say; the folders of stages that have begun tell the page the same
        return {}
    found: dict[str, Any] = {name: stage_inputs(config).values() for name, config in recipe.stages.items()}
    return {name: list(dict.fromkeys(source for source, _ in inputs)) for name, inputs in found.items()}
