"""A run whose stages are all finished already: recorded without a server, and without a library that takes long to load.

Only the good case is dealt with here. Whatever has to be computed, said or stopped is a run like any other.
"""

from collections.abc import Callable

from flows.doctor.scope import unfinished
from flows.pipeline.gates import heed
from flows.runs.page import page_at_end
from flows.runs.record import RunRecord
from flows.runs.selection import Selection
from flows.runs.stage_record import Finished, stage_record
from stages.contract.errors import UserError
from stages.kinds.gate import GateConfig
from stages.recipe.resolve import ResolvedRecipe
from stages.store.folders import Runs
from stages.store.locks import try_hold
from stages.store.manifest import GATE, verify_manifest
from stages.tracking.default_uri import default_uri


def all_finished(recipe: ResolvedRecipe, selection: Selection) -> dict[str, Finished] | None:
    """Every selected stage with its verified manifest; None when one is not finished, is damaged or in use, or a gate stops."""
    if selection.fresh or unfinished(recipe, selection)[0]:  # cheap: manifests are read, not verified
        return None
    finished: dict[str, Finished] = {}
    for name in selection.order:
        config = recipe.stages[name]
        record = stage_record(config, finished, recipe.code_folders)
        folder = Runs(recipe.runs).stage(record.kind, record.fingerprint)
        try:
            with try_hold(folder) as held:
                manifest = verify_manifest(folder, record.fingerprint) if held else None
        except UserError:  # the run names it where it comes to it
            return None
        if manifest is None or (isinstance(config, GateConfig) and config.stops(manifest.notes[GATE]["verdict"])):
            return None
        finished[name] = Finished(folder, manifest)
    return finished


def record_reused(
    record: RunRecord, recipe: ResolvedRecipe, finished: dict[str, Finished], note: Callable[[str], None]
) -> None:
    """Write a run that is done into its record, with its page. MLflow and Prefect get it later (flows/pipeline/unsent.py)."""
    for name, stage in finished.items():
        manifest = stage.manifest
        facts = {"folder": str(stage.folder.path), "fingerprint": manifest.fingerprint, "remarks": manifest.remarks}
        record.stages[name].update(facts, status="reused", seconds=manifest.wall_seconds)
        note(f"{name}: finished before, reused")
        heed(name, recipe.stages[name], manifest, record.name, note)
    page_at_end(record, "done", None, note)
    experiment = recipe.tracking.experiment or recipe.name
    uri = recipe.tracking.uri or default_uri(recipe.runs)
    record.update(
        status="done",
        models=record.results(),
        mlflow={**record.content["mlflow"], "tracking_uri": uri, "experiment": experiment},
        unsent=True,
    )
