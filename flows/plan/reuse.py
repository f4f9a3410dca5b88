"""Which stages of a recipe are there already, which are to run, and which wait for which. Nothing is written or started."""

from dataclasses import dataclass, field
from typing import Any

from filelock import FileLock, Timeout

from flows.plan.changed_code import changed
from flows.plan.changed_files import reasons
from flows.runs.stage_record import Finished, stage_record
from stages.contract.config import stage_inputs
from stages.recipe.resolve import ResolvedRecipe
from stages.store.folders import Runs, StageFolder
from stages.store.manifest import verify_manifest


@dataclass
class Standing:
    """What `r1 run` would do with a stage."""

    kind: str
    state: str
    """`reused`, `to run`, or `running` (another pipeline works in its folder, and this one would wait for it)."""
    waits_for: list[str] = field(default_factory=list)
    """Stages of this recipe that have to be finished first."""
    folder: str | None = None
    """Where it lies or would lie; None while its inputs, and so its fingerprint, are not known."""
    fingerprint: str | None = None
    warnings: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Why it is computed again: files of the user's that have changed."""


def standings(recipe: ResolvedRecipe) -> tuple[dict[str, Standing], dict[str, Finished]]:
    """Of every stage, in running order, by the same fingerprints as `r1 run`; and the finished ones.

    Raises UserError for what `r1 run` would refuse: a damaged manifest, a file that cannot be read.
    """
    runs = Runs(recipe.runs)
    found: dict[str, Standing] = {}
    finished: dict[str, Finished] = {}
    for name, config in recipe.stages.items():
        sources = list(dict.fromkeys(source for source, _ in stage_inputs(config).values()))
        standing = found[name] = Standing(config.kind, "to run", [source for source in sources if source not in finished])
        if standing.waits_for:
            continue
        record = stage_record(config, finished, recipe.code_folders)
        folder = runs.stage(record.kind, record.fingerprint)
        standing.folder, standing.fingerprint = str(folder.path), record.fingerprint
        manifest = verify_manifest(folder, record.fingerprint)
        if manifest is not None:
            finished[name] = Finished(folder, manifest)
            standing.state = "reused"
            standing.warnings = _warnings(record.kind, manifest.git_commit)
            continue
        standing.reasons = reasons(runs, config, record)
        if _held(folder):
            standing.state = "running"
    return found, finished


def _warnings(kind: str, commit: str | None) -> list[str]:
    files, reason = changed(kind, commit)
    if reason:
        return [reason]
    if not files:
        return []
    some = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    what = f"the code of `{kind}` has changed since (commit {str(commit)[:10]}) without a new version: {some}"
    return [f"{what}; if that changes results, raise its version, or compute it again with --fresh"]


def _held(folder: StageFolder) -> bool:
    """Whether another pipeline holds the folder's lock."""
    if not folder.lock.exists():
        return False
    lock = FileLock(folder.lock)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def as_document(name: str, standing: Standing) -> dict[str, Any]:
    """For `--json`."""
    return {"stage": name, **vars(standing)}
