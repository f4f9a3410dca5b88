"""What the stages of one run share while it goes on."""

from typing import Any

from flows.launch.forked import Forks
from flows.pipeline.gpus import Devices
from flows.pipeline.progress import Progress
from flows.pipeline.scheduler import Floor
from flows.runs.record import RunRecord
from flows.runs.selection import Selection, needs
from flows.runs.stage_record import Finished
from stages.contract.errors import GateClosed, Interrupted, StageFailed, UserError
from stages.recipe.resolve import ResolvedRecipe
from stages.store.folders import Runs

TELLING_ERRORS = (UserError, StageFailed, Interrupted, GateClosed)
"""Errors that end a run with one line; any other is a mistake of ours and keeps its traceback."""


class Work:
    """Not a dataclass: Prefect would walk through its fields."""

    def __init__(
        self,
        recipe: ResolvedRecipe,
        record: RunRecord,
        progress: Progress,
        tracking: Any,
        selection: Selection,
        parallel: int = 1,
        forks: Forks | None = None,
    ) -> None:
        """`parallel`: how many stages may run at a time; `forks`: what may fork them."""
        self.recipe, self.record, self.progress, self.tracking = recipe, record, progress, tracking
        self.selection, self.parallel, self.forks = selection, parallel, forks
        self.runs, self.needs = Runs(recipe.runs), needs(recipe)
        self.floor, self.devices = Floor(), Devices(parallel)
        self.finished: dict[str, Finished] = {}
        self.errors: dict[str, Exception] = {}
        """Stage -> why it ended, if it did not end well."""

    def retries(self, name: str) -> bool:
        """Whether a stage that has not ended well may be tried again. A user's mistake stays one however often it is
        tried, and so does a gate's verdict.
        """
        return not (self.floor.stopped() or isinstance(self.errors.get(name), UserError | GateClosed))
