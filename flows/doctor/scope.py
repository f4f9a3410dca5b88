"""What a preflight looks at: the stages that are to be computed, and what is known of the others."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.plan.shapes import Shapes, known_shapes
from flows.runs.selection import Selection
from flows.runs.stage_record import Finished, stage_record
from stages.contract.config import StageConfig, external_paths, stage_inputs
from stages.contract.errors import UserError
from stages.problems.first_rows import first_problem, is_small, whole_set
from stages.problems.sources import MixtureSource, ProblemSet, ProblemSource, plain_sources
from stages.recipe.resolve import ResolvedRecipe
from stages.store.folders import Runs
from stages.store.manifest import Manifest
from stages.store.seals import read_document

DIGESTED_BYTES = 256 << 20
"""Data of the user's up to this size is digested to see whether a stage is finished; one with more is looked at in any case."""


@dataclass
class Scope:
    """The stages of one recipe that are looked at."""

    recipe: ResolvedRecipe
    stages: Mapping[str, StageConfig]
    """Those that are to be computed, in running order."""
    finished: Mapping[str, Finished]
    file: str = ""
    """The recipe's, as it was named; empty for a run that is resumed."""
    execute: bool = True
    """Whether the recipe's reward functions are called."""
    network: bool = False
    """Whether the hub may be asked."""
    note: Callable[[str], None] = lambda _: None
    """Gets a line before something that takes long."""
    model_configs: Mapping[str, Path] = field(default_factory=dict)
    """Stage -> config.json of its model, where the user names one."""
    _sources: dict[str, ProblemSet | UserError | None] = field(default_factory=dict)

    @functools.cached_property
    def shapes(self) -> tuple[Shapes, dict[str, UserError]]:
        """Shapes of the models that are known, and why others are not."""
        return known_shapes(self.recipe, self.finished, self.model_configs)

    def where(self, stage: str, key: str) -> str:
        """File and dotted key of a stage's setting, by the stage's name in the recipe."""
        source = next((name for name, stages in self.recipe.sources.items() if stage in stages), stage)
        place = f"stages.{source}.{key}" if key else f"stages.{source}"
        return f"{self.file}: {place}" if self.file else place

    def problems(self, source: ProblemSource, where: str) -> ProblemSet | None:
        """All problems of a small source, the first of the parts of others; None where nothing can be told from here.

        Raises UserError as the stage would. Each source is read once.
        """
        key = source.model_dump_json()
        if key not in self._sources:
            try:
                self._sources[key] = self._read(source, where)
            except UserError as error:
                self._sources[key] = error
        found = self._sources[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _read(self, source: ProblemSource, where: str) -> ProblemSet | None:
        if is_small(source):
            return whole_set(source, where)
        if not isinstance(source, MixtureSource):
            problem = first_problem(source, where)
            return None if problem is None else ProblemSet([problem])
        parts = [self.problems(part, place) for place, part in plain_sources(source, where)]
        problems = [problem for part in parts if part is not None for problem in part.problems[:1]]
        return ProblemSet(problems) if problems else None

    def is_whole(self, source: ProblemSource) -> bool:
        """Whether `problems` gives all of a source."""
        return is_small(source)


def unfinished(recipe: ResolvedRecipe, selection: Selection) -> tuple[dict[str, StageConfig], dict[str, Finished]]:
    """The selected stages that are to be computed, and the finished ones.

    Manifests are read, not verified: the run itself does that, for it takes as long as the outputs are large.
    """
    runs = Runs(recipe.runs)
    todo: dict[str, StageConfig] = {}
    finished: dict[str, Finished] = {}
    for name in selection.order:
        config = recipe.stages[name]
        manifest = None
        if name not in selection.fresh and all(source in finished for source, _ in stage_inputs(config).values()):
            manifest = _manifest(recipe, config, finished, runs)
        if manifest is None:
            todo[name] = config
        else:
            finished[name] = manifest
    return todo, finished


def _manifest(recipe: ResolvedRecipe, config: StageConfig, finished: Mapping[str, Finished], runs: Runs) -> Finished | None:
    if sum(_size(Path(path)) for path in external_paths(config).values()) > DIGESTED_BYTES:
        return None
    record = stage_record(config, finished, recipe.code_folders)
    folder = runs.stage(record.kind, record.fingerprint)
    if not folder.manifest.exists():
        return None
    try:
        document: dict[str, Any] = read_document(folder.manifest, "the manifest", "")
        manifest = Manifest.model_validate(document)
    except (UserError, ValueError):  # damaged: the run says so when it comes to it
        return None
    return Finished(folder, manifest) if manifest.fingerprint == record.fingerprint else None


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0
