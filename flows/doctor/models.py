"""Models of a recipe, by their files: folders, positions for `max_tokens`, vocabulary, chat templates, preference models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.doctor.data import first_of
from flows.doctor.finding import Finding, mistake
from flows.doctor.scope import Scope
from flows.plan.shapes import model_document, model_source
from stages.contract.errors import UserError
from stages.kinds.dataset import DatasetConfig, first_document
from stages.kinds.model import ModelConfig, check_folder
from stages.problems.first_rows import first_rows
from stages.rewards.verifier_pool.pool import Limits, Pool
from stages.store.files import read_json

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
LEARNED = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "biogpt", "ctrl", "xglm", "imagegpt", "galactica"})
"""Model types with a table of positions: behind its end there is nothing. Rotary ones can be computed, and were not trained."""
GREETING = [{"role": "user", "content": "What is 1 + 1?"}]
RENDER = Limits(cpu_s=2.0, wall_s=10.0, memory_bytes=1 << 30)
"""What rendering a chat template may take: it is a program of its author's."""


def examine_models(scope: Scope) -> Iterator[Finding]:
    """A finding for each model folder, and for each stage whose answers do not fit its model."""
    for name, config in scope.stages.items():
        if isinstance(config, ModelConfig) and config.path is not None:
            yield from _folder(scope, name, config)
        yield from _positions(scope, name, config)
        yield from _preference(scope, name, config)
        if isinstance(config, DatasetConfig) and config.tokenizer is not None:
            yield from _conversations(scope, name, config)


def model_folder(scope: Scope, stage: str) -> Path | None:
    """Where the model of a stage lies: its output, or the user's folder that it will be made from; None: not known yet."""
    while stage:
        if stage in scope.finished:
            return scope.finished[stage].folder.output("model")
        config = scope.recipe.stages[stage]
        if isinstance(config, ModelConfig):
            return None if config.path is None else Path(config.path)
        stage = model_source(config)
    return None


def _folder(scope: Scope, name: str, config: ModelConfig) -> Iterator[Finding]:
    check, where, folder = f"{name}: model", scope.where(name, "path"), Path(config.path or "")
    try:
        check_folder(folder)
        document = _config(folder)
    except UserError as error:
        yield mistake(check, error, where)
        return
    if config.task == "preference":
        yield _labels(check, document, where)
        return
    yield from _vocabulary(check, folder, document, where)
    template = _chat_template(folder)
    if template:
        fault = _template_fault(template, GREETING, folder)
        if fault:
            yield Finding(check, "warn", f"its chat template cannot be rendered ({fault})", "", where, "recipe")
    yield Finding(check, "ok", f"{document.get('model_type', 'a model')} in {folder}", about="recipe")


def _labels(check: str, document: dict[str, Any], where: str) -> Finding:
    labels = document.get("num_labels") or len(document.get("id2label") or {0: "", 1: ""})
    if labels == 1:
        return Finding(check, "ok", "one label", about="recipe")
    what = f"the model has {labels} labels, a preference model has one"
    return Finding(check, "fail", what, "name a reward model", where, "recipe")


def _vocabulary(check: str, folder: Path, document: dict[str, Any], where: str) -> Iterator[Finding]:
    """Ids of the tokenizer that the model has no row for. Some models ship with an added token too many, never used."""
    size, file = document.get("vocab_size"), folder / "tokenizer.json"
    if not isinstance(size, int) or not file.is_file():
        return
    try:
        tokenizer = read_json(file)
        vocabulary = tokenizer["model"].get("vocab") or {}
        base = max(vocabulary.values()) if isinstance(vocabulary, dict) and vocabulary else len(vocabulary) - 1
        added = max((int(token["id"]) for token in tokenizer.get("added_tokens") or ()), default=-1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding(check, "fail", f"{file}: not a tokenizer ({error})", "copy it from the model again", where, "recipe")
        return
    if max(base, added) >= size:
        what = f"its tokenizer has ids up to {max(base, added)}, the model {size} rows"
        mend = "take the tokenizer that belongs to the model, or resize its embeddings"
        yield Finding(check, "fail" if base >= size else "warn", what, mend, where, "recipe")


def _positions(scope: Scope, name: str, config: Any) -> Iterator[Finding]:
    """Prompt and longest answer against the positions of the model."""
    sampling = getattr(config, "sampling", None)
    source = model_source(config)
    if sampling is None or not source:
        return
    document = _document(scope, source)
    limit = next((document[key] for key in POSITIONS if isinstance(document.get(key), int)), None)
    if limit is None:
        return
    problem, template = first_of(scope, config), getattr(config, "template", None)
    prompt = template.render(problem.question) if problem is not None and template is not None else ""
    most = sampling.max_tokens + len(prompt.encode())  # a token has a byte at least
    if most <= limit:
        return
    tokens = _token_count(model_folder(scope, source), prompt)
    needed = sampling.max_tokens + tokens
    if needed <= limit:
        return
    what = f"a prompt of {tokens} tokens and `max_tokens` {sampling.max_tokens:,} are more than the model's {limit:,} positions"
    where, mend = scope.where(name, "sampling.max_tokens"), f"set it to {max(1, limit - tokens):,} or less"
    state = document.get("model_type") in LEARNED
    yield Finding(f"{name}: positions", "fail" if state else "warn", what, mend, where, "recipe")


def _document(scope: Scope, stage: str) -> dict[str, Any]:
    """The config of a stage's model; empty while nothing is known of it."""
    while stage in scope.recipe.stages:
        config = scope.recipe.stages[stage]
        if stage in scope.finished or isinstance(config, ModelConfig):
            try:
                return model_document(stage, config, scope.finished, {})[0]
            except UserError:
                return {}
        stage = model_source(config)
    return {}


def _token_count(folder: Path | None, text: str) -> int:
    """Tokens of a prompt; without the tokenizer's file 0, so that only what is certain is said."""
    file = None if folder is None else folder / "tokenizer.json"
    if file is None or not file.is_file() or not text:
        return 0
    from tokenizers import Tokenizer

    try:
        return len(Tokenizer.from_file(str(file)).encode(text).ids)
    except Exception:  # noqa: BLE001 - the library raises a bare Exception; the folder's own check names the file
        return 0


def _preference(scope: Scope, name: str, config: Any) -> Iterator[Finding]:
    model = getattr(getattr(config, "rewards", None), "preference_model", None)
    if model is None or model.path is None:
        return
    check, where = f"{name}: preference model", scope.where(name, "rewards.preference_model.path")
    try:
        check_folder(Path(model.path))
        yield _labels(check, _config(Path(model.path)), where)
    except UserError as error:
        yield mistake(check, error, where)


def _conversations(scope: Scope, name: str, config: DatasetConfig) -> Iterator[Finding]:
    """The first conversation, rendered with the chat template of the model that the stage names."""
    folder = model_folder(scope, config.tokenizer or "")
    try:
        row = first_document(config, first_rows(Path(config.path)))
    except UserError:  # told by `examine_data`
        return
    messages = row.values.get(config.messages)
    if folder is None or messages is None:
        return
    check, where = f"{name}: chat template", scope.where(name, "tokenizer")
    template = _chat_template(folder)
    if not template:
        mend = "name a stage of kind `model` whose model has one"
        yield Finding(check, "fail", f"the model in {folder} has no chat template", mend, where, "recipe")
        return
    if fault := _template_fault(template, messages, folder):
        what = f"line {row.number} of {config.path}: the chat template refuses it ({fault})"
        yield Finding(check, "warn", what, "rows that it refuses are left out", where, "recipe")
    else:
        yield Finding(check, "ok", f"renders line {row.number} of {Path(config.path).name}", about="recipe")


def _template_fault(template: str, messages: Any, folder: Path) -> str:
    """Why a chat template cannot be rendered; empty when it can. In a process that is ended at its limits."""
    pool = Pool("stages.problems.chat_render:render_chat", RENDER, processes=1)
    try:
        (reply,) = pool.ask([[template, messages, _tokens(folder)]])
    finally:
        pool.end()
    return reply.fault.removeprefix("TemplateFault: ")


def _config(folder: Path) -> dict[str, Any]:
    try:
        document = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"not readable ({error})", where=str(folder / "config.json"), mend="copy it again") from error
    if not isinstance(document, dict):
        raise UserError("not a model's config", where=str(folder / "config.json"), mend="copy it again")
    return document


def _chat_template(folder: Path) -> str:
    file = folder / "chat_template.jinja"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = read_json(folder / "tokenizer_config.json").get("chat_template") or ""
    except (OSError, ValueError, AttributeError):
        return ""
    if isinstance(template, list):  # several by name
        template = next((str(item.get("template")) for item in template if item.get("name") == "default"), "")
    return str(template)


def _tokens(folder: Path) -> dict[str, str]:
    """Special tokens that a template may write: `bos_token` and the like."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    tokens = {key: value for key, value in config.items() if key.endswith("_token")} if isinstance(config, dict) else {}
    return {key: str(value.get("content", "") if isinstance(value, dict) else value or "") for key, value in tokens.items()}
