"""A recipe: sparse YAML -> one typed, resolved configuration and the order of its stages.

`extends:` merges other files below this one, `--set a.b=value` above it. Fields under `shared:` go to every stage whose kind
has such a field and that does not set it itself. Names are the recipe's; kinds are the code's. A section `study:` writes the
recipe's stages itself (stages/studies/expand.py).
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from stages.contract.config import Config, Expanded, StageConfig, expanded_path, external_paths, stage_inputs, user_functions
from stages.contract.errors import UserError
from stages.contract.secrets import given_away
from stages.contract.suggest import nearest
from stages.evals.contamination import told_the_evaluations
from stages.kinds.registry import MODULES, stage_kind
from stages.problems.decontamination import Decontaminated
from stages.recipe.explain import explain
from stages.recipe.load import Origins, merge, override, place_of, read_merged
from stages.store.user_code import code_folders, module_files
from stages.studies.expand import STUDY, expanded
from stages.studies.settings import Study

_SQLITE = "sqlite:///"


def _expanded_uri(uri: str) -> str:
    return f"{_SQLITE}{expanded_path(uri.removeprefix(_SQLITE))}" if uri.startswith(f"{_SQLITE}~") else expanded_path(uri)


def _local_folder(path: str) -> str:
    if not path.strip() or "://" in path:
        raise ValueError("should be a folder on this machine, or on one that it has mounted")
    return path


class Tracking(Config):
    """Where metrics go."""

    uri: Annotated[str, AfterValidator(_expanded_uri)] | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, then the server of `r1 up --postgres`, then the SQLite file
    `mlflow.db` in the runs folder."""
    experiment: str | None = None
    """MLflow experiment; by default the recipe's name."""


class Recipe(Config):
    """A whole configuration file, resolved except for its stages, which are typed by their kinds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the pipeline: its runs, its MLflow experiment."""
    runs: Annotated[str, Expanded, AfterValidator(_local_folder)] = "runs"
    """The runs folder, relative to the working directory. `~` and `$NAME` are expanded here and in every path of a recipe."""
    tracking: Tracking = Tracking()
    """MLflow."""
    shared: dict[str, Any] = Field(default_factory=dict)
    """Fields for every stage whose kind has them and that does not set them itself."""
    stages: dict[str, dict[str, Any] | None]
    """Name -> kind and settings of a stage; null leaves out one of an `extends` file."""


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe whose stages are typed and in an order in which they can run."""

    name: str
    runs: Path
    tracking: Tracking
    stages: dict[str, StageConfig]
    """In running order; `evaluate` stages are expanded."""
    sources: dict[str, list[str]]
    """Name of a stage in the file -> the stages it became."""
    document: dict[str, Any]
    """The whole resolved configuration as JSON values: a run can be repeated from it and the code folders alone."""
    code_folders: tuple[str, ...] = ()
    """Absolute paths of the recipe file's folder and the working directory: where modules of the user's are searched."""


M = TypeVar("M", bound=BaseModel)


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> ResolvedRecipe:
    """Read, merge, check and order a recipe.

    `overrides` are `dotted.key=value` texts, the values in YAML. Raises UserError with the file and key of the first mistake, a
    module of the user's that is missing or is not Python among them.
    """
    origins: Origins = {}
    recipe = replace(_loaded(path, overrides or [], origins), code_folders=code_folders(expanded_path(str(path))))
    for name, config in recipe.stages.items():
        for role, text in user_functions(config).items():
            module_files(text.partition(":")[0], recipe.code_folders, place_of(("stages", name, *role.split(".")), origins))
    return recipe


def _loaded(path: Path | str, overrides: list[str], origins: Origins) -> ResolvedRecipe:
    document = read_merged(path, origins)
    for text in overrides:
        override(document, text, origins)
    if STUDY not in document:
        return resolve(document, origins)
    study = _validated(Study, document.pop(STUDY), (STUDY,), origins)
    written = expanded(study, document, merge, lambda *keys: place_of(keys, origins))
    return _as_needed(resolve(written, origins), STUDY)


def _as_needed(recipe: ResolvedRecipe, name: str) -> ResolvedRecipe:
    """The stage called `name` and what it needs, without the recipe's other stages."""
    needed, waiting = {name}, [name]
    while waiting:
        further = {target for target, _ in stage_inputs(recipe.stages[waiting.pop()]).values()} - needed
        needed |= further
        waiting += further
    sources = {source: stages for source, stages in recipe.sources.items() if needed & set(stages)}
    sections = recipe.document["stages"]
    return replace(
        recipe,
        stages={stage: config for stage, config in recipe.stages.items() if stage in needed},
        sources=sources,
        document={**recipe.document, "stages": {source: sections[source] for source in sources}},
    )


def overridden(document: dict[str, Any], overrides: list[str]) -> ResolvedRecipe:
    """The document of an earlier run with some keys set (`dotted.key=value` texts)."""
    origins: Origins = {}
    changed = copy.deepcopy(document)
    for text in overrides:
        override(changed, text, origins)
    return resolve(changed, origins)


def resolve(document: dict[str, Any], origins: Origins | None = None) -> ResolvedRecipe:
    """Type and order a merged document (the `document` of an earlier run, or a freshly merged file)."""
    origins = origins or {}
    if (found := given_away(document)) is not None:
        path, what, mend = found
        raise UserError(what, where=place_of(path, origins), mend=mend)
    recipe = _validated(Recipe, document, (), origins)
    if not recipe.stages:
        raise UserError("no stages", where=place_of(("stages",), origins), mend="name at least one")
    stages: dict[str, StageConfig] = {}
    resolved_sections: dict[str, Any] = {}
    sources: dict[str, list[str]] = {}
    shared_used: set[str] = set()
    for name, section in recipe.stages.items():
        kind = _kind_of(name, section, origins, recipe.stages.keys() - {name})
        fields = kind.config.model_fields
        shared_used |= recipe.shared.keys() & fields.keys()
        merged = {key: value for key, value in recipe.shared.items() if key in fields}
        config = _validated(kind.config, merge(merged, section or {}), ("stages", name), origins)
        for key, most in (("processes", "in one process"), ("hosts", "on one machine")):
            if getattr(config.compute, key) > 1 and not kind.distributed:
                where = place_of(("stages", name, "compute", key), origins)
                raise UserError(f"a stage of kind `{kind.name}` runs {most}", where=where, mend="set it to 1")
        resolved_sections[name] = config.model_dump(mode="json")
        expanded = kind.expand(name, config) if kind.expand else {name: config}
        stages.update(expanded)
        sources[name] = list(expanded)
    for key in recipe.shared.keys() - shared_used:
        known = {field for name in stages for field in type(stages[name]).model_fields}
        raise UserError("no stage has this field", where=place_of(("shared", key), origins), mend=nearest(key, known))
    stages = told_the_evaluations(stages)
    told = {name: config.model_dump(mode="json") for name, config in stages.items() if isinstance(config, Decontaminated)}
    resolved_sections.update(told)
    _check_references(stages, origins)
    _check_external_paths(stages, origins)
    plain = recipe.model_dump(mode="json", exclude={"shared", "stages"})
    return ResolvedRecipe(
        name=recipe.name,
        runs=Path(recipe.runs).absolute(),
        tracking=recipe.tracking,
        stages={name: stages[name] for name in _order(stages)},
        sources=sources,
        document={**plain, "stages": resolved_sections},
    )


def _check_external_paths(stages: dict[str, StageConfig], origins: Origins) -> None:
    for name, config in stages.items():
        for role, text in external_paths(config).items():
            if not _is_file_or_folder(Path(text)):
                where = place_of(("stages", name, *role.split(".")), origins)
                raise UserError(f"no such file or folder: {text}", where=where, mend="name one that exists")


def _is_file_or_folder(path: Path) -> bool:
    try:
        return path.is_file() or path.is_dir()
    except OSError:  # a name that is too long, say
        return False


def _kind_of(name: str, section: Any, origins: Origins, others: Collection[str]) -> Any:
    where = place_of(("stages", name), origins)
    if section is None:
        mend = f"give it a kind: one of {', '.join(sorted(MODULES))}"
        raise UserError("null leaves out an inherited stage, and none is inherited", where=where, mend=mend)
    if not isinstance(section, dict) or "kind" not in section:
        close = nearest(name, others)
        mend = close if "did you mean" in close else f"one of {', '.join(sorted(MODULES))}"
        raise UserError("a stage needs a kind", where=where, mend=mend)
    if not all(part.isidentifier() for part in name.split("-")) or len(name) > 64:
        raise UserError(f"`{name}` cannot name a stage", where=where, mend="use letters, digits, _ and -, at most 64")
    return stage_kind(str(section["kind"]), place_of(("stages", name, "kind"), origins))


def _validated(model: type[M], data: Any, path: tuple[str, ...], origins: Origins) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, model, path, origins) from error
    except (OSError, RecursionError) as error:  # of a name that is too long, or a file nested too deeply
        what = f"a file that is named here cannot be read ({error})"
        raise UserError(what, where=place_of(path, origins), mend="name another") from error


def _check_references(stages: dict[str, StageConfig], origins: Origins) -> None:
    for name, config in stages.items():
        for role, (target, wanted) in stage_inputs(config).items():
            where = place_of(("stages", name.split(".")[0], *role.split(".")), origins)
            if target not in stages and ("stages", target) in origins:
                what = f"the stage `{target}` is left out ({origins['stages', target]}: stages.{target})"
                raise UserError(what, where=where, mend="leave it out here too, or name another stage")
            if target not in stages:
                raise UserError(f"no stage `{target}`", where=where, mend=nearest(target, stages))
            if wanted == "checkpoint":
                if stages[target].kind != config.kind:
                    what = f"`{target}` is of kind {stages[target].kind}; a stage goes on from a checkpoint of its own kind"
                    raise UserError(what, where=where, mend=f"name a stage of kind {config.kind}")
                continue
            gives = stage_kind(stages[target].kind).output
            if gives != wanted:
                raise UserError(f"`{target}` gives a {gives}, a {wanted} is needed", where=where, mend="name another stage")


def _order(stages: dict[str, StageConfig]) -> list[str]:
    """Stages in the order of the file, each moved back only as far as its inputs ask."""
    needs = {name: {target for target, _ in stage_inputs(config).values()} for name, config in stages.items()}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise UserError(f"the stages go round in a circle: {circle}", where="stages", mend="break it") from error
    ordered: list[str] = []
    while len(ordered) < len(stages):
        ordered.append(next(name for name in stages if name not in ordered and needs[name] <= set(ordered)))
    return ordered


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a configuration file: the recipe, with every kind of stage."""
    schema = Recipe.model_json_schema()
    kinds = {}
    definitions = schema.setdefault("$defs", {})
    for name in MODULES:
        section = stage_kind(name).config.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(section.pop("$defs", {}))
        section["properties"]["kind"] = {"const": name}
        definitions[f"stage_{name}"] = section
        kinds[name] = {"$ref": f"#/$defs/stage_{name}"}
    schema["properties"]["stages"]["additionalProperties"] = {"oneOf": [*kinds.values(), {"type": "null"}]}
    study = Study.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(study.pop("$defs", {}))
    schema["properties"][STUDY] = study
    schema["properties"]["extends"] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    return schema
