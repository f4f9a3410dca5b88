"""A recipe: sparse YAML -> one typed, resolved configuration and the order of its stages.

`extends:` merges other files below this one, `--set a.b=value` above it. Fields under `shared:` go to every stage whose kind
has such a field and that does not set it itself. Names are the recipe's; kinds are the code's. A section `study:` writes the
recipe's stages itself (stages/studies/expand.py).
"""

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from stages.evals.contamination import told_the_evaluations
from stages.kinds import MODULES, stage_kind
from stages.problems.decontamination import Decontaminated
from stages.store.config import Config, StageConfig, external_paths, stage_inputs, user_functions
from stages.store.errors import UserError
from stages.store.secrets import given_away
from stages.store.suggest import nearest
from stages.store.user_code import code_folders, module_files
from stages.studies.expand import STUDY, expanded
from stages.studies.settings import Study


class Tracking(Config):
    """Where metrics go."""

    uri: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, then the server of `r1 up --postgres`, then the SQLite file
    `mlflow.db` in the runs folder."""
    experiment: str | None = None
    """MLflow experiment; by default the recipe's name."""


class Recipe(Config):
    """A whole configuration file, resolved except for its stages, which are typed by their kinds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the pipeline: its runs, its MLflow experiment."""
    runs: str = "runs"
    """The runs folder, relative to the working directory."""
    tracking: Tracking = Tracking()
    """MLflow."""
    shared: dict[str, Any] = Field(default_factory=dict)
    """Fields for every stage whose kind has them and that does not set them itself."""
    stages: dict[str, dict[str, Any]]
    """Name -> kind and settings of a stage."""


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


MOST_VALUES, DEEPEST = 20_000, 40
"""Values in a configuration file, and levels of them, of which more are a mistake (or an attack)."""

Origins = dict[tuple[str, ...], str]
M = TypeVar("M", bound=BaseModel)


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> ResolvedRecipe:
    """Read, merge, check and order a recipe.

    `overrides` are `dotted.key=value` texts, the values in YAML. Raises UserError with the file and key of the first mistake, a
    module of the user's that is missing or is not Python among them.
    """
    origins: Origins = {}
    recipe = replace(_loaded(path, overrides or [], origins), code_folders=code_folders(path))
    for name, config in recipe.stages.items():
        for role, text in user_functions(config).items():
            module_files(text.partition(":")[0], recipe.code_folders, _where(("stages", name, *role.split(".")), origins))
    return recipe


def _loaded(path: Path | str, overrides: list[str], origins: Origins) -> ResolvedRecipe:
    document = _read_merged(Path(path), origins, ())
    for text in overrides:
        _override(document, text, origins)
    if STUDY not in document:
        return resolve(document, origins)
    study = _validated(Study, document.pop(STUDY), (STUDY,), origins)
    written = expanded(study, document, _merge, lambda *keys: _where(keys, origins))
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
        _override(changed, text, origins)
    return resolve(changed, origins)


def resolve(document: dict[str, Any], origins: Origins | None = None) -> ResolvedRecipe:
    """Type and order a merged document (the `document` of an earlier run, or a freshly merged file)."""
    origins = origins or {}
    if (found := given_away(document)) is not None:
        path, what, mend = found
        raise UserError(what, where=_where(path, origins), mend=mend)
    recipe = _validated(Recipe, document, (), origins)
    if not recipe.stages:
        raise UserError("no stages", where=_where(("stages",), origins), mend="name at least one")
    stages: dict[str, StageConfig] = {}
    resolved_sections: dict[str, Any] = {}
    sources: dict[str, list[str]] = {}
    shared_used: set[str] = set()
    for name, section in recipe.stages.items():
        kind = _kind_of(name, section, origins)
        fields = kind.config.model_fields
        shared_used |= recipe.shared.keys() & fields.keys()
        merged = {key: value for key, value in recipe.shared.items() if key in fields}
        config = _validated(kind.config, _merge(merged, section), ("stages", name), origins)
        for key, most in (("processes", "in one process"), ("hosts", "on one machine")):
            if getattr(config.compute, key) > 1 and not kind.distributed:
                where = _where(("stages", name, "compute", key), origins)
                raise UserError(f"a stage of kind `{kind.name}` runs {most}", where=where, mend="set it to 1")
        resolved_sections[name] = config.model_dump(mode="json")
        expanded = kind.expand(name, config) if kind.expand else {name: config}
        stages.update(expanded)
        sources[name] = list(expanded)
    for key in recipe.shared.keys() - shared_used:
        known = {field for name in stages for field in type(stages[name]).model_fields}
        raise UserError("no stage has this field", where=_where(("shared", key), origins), mend=nearest(key, known))
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
                where = _where(("stages", name, *role.split(".")), origins)
                raise UserError(f"no such file or folder: {text}", where=where, mend="name one that exists")


def _is_file_or_folder(path: Path) -> bool:
    try:
        return path.is_file() or path.is_dir()
    except OSError:  # a name that is too long, say
        return False


def _read_merged(path: Path, origins: Origins, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        if path.resolve() in seen:
            raise UserError("`extends` goes round in a circle", where=str(path), mend="remove one of the `extends`")
        if path.exists() and not (path.is_file() or path.is_fifo()):
            raise UserError("not a file", where=str(path), mend="name a YAML file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError("no such file", where=str(path), mend="see configs/ for the shipped ones") from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that go round in a circle
        raise UserError(f"cannot be read ({error})", where=str(path), mend="name a YAML file in UTF-8") from error
    document = _yaml(text, str(path), "mend the syntax there")
    if not isinstance(document, dict):
        raise UserError("not a mapping of keys to values", where=str(path), mend="start from configs/quickstart.yaml")
    parents = document.pop("extends", [])
    merged: dict[str, Any] = {}
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError("`extends` is neither a file nor a list of files", where=f"{path}: extends", mend="name YAML files")
    for parent in parents:
        merged = _merge(merged, _read_merged(path.parent / parent, origins, (*seen, path.resolve())))
    for key_path in _paths(document):
        origins[key_path] = str(path)
    origins[()] = str(path)
    return _merge(merged, document)


def _override(document: dict[str, Any], text: str, origins: Origins) -> None:
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise UserError(f"`{text}` is not KEY=VALUE", where="--set", mend="for example --set stages.zero.lr=1e-6")
    value = _yaml(value_text, f"--set {key}", "quote it")
    path = tuple(key.split("."))
    target = document
    for part in path[:-1]:
        if not isinstance(target.setdefault(part, {}), dict):
            raise UserError(f"`{part}` has no keys below it", where=f"--set {key}", mend="check the dotted key")
        target = target[part]
    target[path[-1]] = _merge(target[path[-1]], value) if _both_dicts(target.get(path[-1]), value) else value
    for below in _paths({path[-1]: value}):
        origins[(*path[:-1], *below)] = "--set"


def _yaml(text: str, where: str, mend: str) -> Any:
    """The values of a YAML text.

    Raises UserError when it is not YAML, or when its values are none that a recipe can have.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}: line {mark.line + 1}" if mark else where
        raise UserError("not valid YAML", where=place, mend=mend) from error
    except RecursionError as error:
        raise UserError("nested too deeply", where=where, mend=mend) from error
    except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
        # What PyYAML's constructors say of `0x_`, `2024-13-45`, `!!bool x` and the like.
        raise UserError(f"a value cannot be read ({error})", where=where, mend=mend) from error
    _check_values(document, where)
    return document


def _check_values(document: Any, where: str) -> None:
    """Raises UserError for what YAML can say and nothing here can use: endless values, huge numbers, half characters."""
    count = 0
    level: list[Any] = [[document]]
    for _ in range(DEEPEST):
        # An alias is walked as often as it is named: that is how often it would be read.
        level = list(itertools.islice((item for value in level for item in _below(value)), MOST_VALUES + 1))
        count += len(level)
        if not level or count > MOST_VALUES:
            break
        for value in level:
            if isinstance(value, int) and abs(value) >= 2**63:
                raise UserError("a number has more than 64 bits", where=where, mend="make it smaller")
            if isinstance(value, str) and not _is_text(value):
                raise UserError(f"`{value[:40]}` has half a character in it", where=where, mend="write it as UTF-8")
    if level:
        what = f"more than {MOST_VALUES:,} values, or nested more than {DEEPEST} deep"
        raise UserError(what, where=where, mend="name no alias inside itself, and few of many values")


def _below(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _both_dicts(a: Any, b: Any) -> bool:
    return isinstance(a, dict) and isinstance(b, dict)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; `above` wins. A section that names another `kind` or `source` replaces the one below as a whole."""
    for switch in ("kind", "source"):
        if switch in above and switch in below and above[switch] != below[switch]:
            return dict(above)
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(merged[key], value) if _both_dicts(merged.get(key), value) else value
    return merged


def _paths(document: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(document, dict):
        for key, value in document.items():
            yield (*prefix, str(key))
            yield from _paths(value, (*prefix, str(key)))


def _where(path: tuple[str, ...], origins: Origins) -> str:
    """File and dotted key; the file is the one that set the key, or the nearest section above it."""
    own = any(known[: len(path[:3])] == path[:3] for known in origins)
    if path[:1] == ("stages",) and len(path) > 2 and not own and ("shared", path[2]) in origins:
        path = ("shared", *path[2:])  # the stage has it from there
    dotted = ".".join(path)
    for end in range(len(path), -1, -1):
        if path[:end] in origins:
            return f"{origins[path[:end]]}: {dotted}" if dotted else origins[path[:end]]
    return dotted or "recipe"


def _kind_of(name: str, section: Any, origins: Origins) -> Any:
    where = _where(("stages", name), origins)
    if not isinstance(section, dict) or "kind" not in section:
        raise UserError("a stage needs a kind", where=where, mend=f"one of {', '.join(sorted(MODULES))}")
    if not all(part.isidentifier() for part in name.split("-")) or len(name) > 64:
        raise UserError(f"`{name}` cannot name a stage", where=where, mend="use letters, digits, _ and -, at most 64")
    return stage_kind(str(section["kind"]), _where(("stages", name, "kind"), origins))


def _validated(model: type[M], data: Any, path: tuple[str, ...], origins: Origins) -> M:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, model, path, origins) from error
    except (OSError, RecursionError) as error:  # of a name that is too long, or a file nested too deeply
        what = f"a file that is named here cannot be read ({error})"
        raise UserError(what, where=_where(path, origins), mend="name another") from error


def explain(error: ValidationError, model: type[BaseModel], path: tuple[str, ...], origins: Origins) -> UserError:
    """The first mistake of a validation as one line: file and key, what, mend."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # Tags of unions appear in pydantic's location but not in the file.
    location = tuple(str(part) for part in first["loc"])
    keys = tuple(part for part in location if not _is_tag(part, model))
    where = _where((*path, *keys), origins)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return UserError(f"unknown key `{location[-1]}`", where=where, mend=nearest(location[-1], known))
    message = str(first["msg"]).removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    mend = _doc_at(model, location)
    if first["type"] == "literal_error" and isinstance(given, str):
        near = nearest(given, re.findall(r"'([^']+)'", first["ctx"]["expected"]))
        mend = near if near.startswith("did") else mend
    return UserError(f"{message[:1].lower()}{message[1:]}{shown}", where=where, mend=mend)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _is_tag(part: str, model: type[BaseModel]) -> bool:
    """Whether `part` is the tag of a discriminated union somewhere below `model` (a value of `source`, say)."""
    for field in model.model_fields.values():
        for below in _models_in(field.annotation):
            switch = below.model_fields.get("source")
            if switch is not None and part in get_args(switch.annotation):
                return True
            if below is not model and _is_tag(part, below):
                return True
    return False


def _candidates(model: type[BaseModel], location: tuple[str, ...]) -> list[type[BaseModel]]:
    models = [model]
    for part in location:
        tagged = [m for m in models if "source" in m.model_fields and part in get_args(m.model_fields["source"].annotation)]
        if tagged:
            models = tagged
            continue
        inside = [m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part].annotation)]
        models = inside or models
    return models


def _fields_at(model: type[BaseModel], location: tuple[str, ...]) -> set[str]:
    return {name for m in _candidates(model, location) for name in m.model_fields}


def _doc_at(model: type[BaseModel], location: tuple[str, ...]) -> str:
    if not location:
        return ""
    for candidate in _candidates(model, location[:-1]):
        field = candidate.model_fields.get(location[-1])
        if field is not None and field.description:
            return f"`{location[-1]}` is: {field.description.splitlines()[0].rstrip('.')}"
    return ""


def _check_references(stages: dict[str, StageConfig], origins: Origins) -> None:
    for name, config in stages.items():
        for role, (target, wanted) in stage_inputs(config).items():
            where = _where(("stages", name.split(".")[0], *role.split(".")), origins)
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
    schema["properties"]["stages"]["additionalProperties"] = {"oneOf": list(kinds.values())}
    study = Study.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(study.pop("$defs", {}))
    schema["properties"][STUDY] = study
    schema["properties"]["extends"] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    return schema
