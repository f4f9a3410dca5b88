"""What the pipeline reads: how each input is made, which of its files can be damaged how, and how it is read for real.

`load` gives (meaning, identity). An input that the pipeline wrote itself has no identity: damaged, it is refused or means what
it meant. One of the user's may mean something else then, but its identity (fingerprint, digest) must be another one.
"""

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from stages.contract.config import external_paths, semantic, stage_inputs
from stages.contract.errors import UserError
from stages.kinds.registry import stage_kind
from stages.recipe.resolve import ResolvedRecipe, load_recipe, resolve
from stages.store.files import digest_files, digest_json, digest_path, read_json, write_json
from stages.store.folders import Runs, StageFolder
from stages.store.manifest import InputRecord, Manifest, StageRecord, fingerprint, verify_manifest, write_manifest
from tests.conftest import ROOT
from tests.faults import damage
from tests.faults.data_inputs import ENDINGS, load_dataset, load_rollouts, make_dataset, make_rollouts, problems
from tests.faults.input import Input, Read

# --- recipes -------------------------------------------------------------------------------------------------------------

OWN = """\
# Everything that a recipe can name: files of the user's, DeepSpeed settings, worked examples.
extends: quickstart.yaml
name: own
runs: runs
tracking:
  experiment: mine
shared:
  seed: 3
  problems:
    source: file
    path: problems.jsonl
    answer_after: "####"
    limit: 5
  held_out: {source: toy, count: 5, split: held_out}
  template:
    name: r1_zero
    examples:
      - {question: "What is 1 + 1?", thinking: It is 2., answer: "2"}
  sampling: {temperature: 1.0, max_tokens: 64, stop: ["</answer>"]}
stages:
  base:
    kind: model
    path: model
    note: mine
  zero:
    steps: 5
    deepspeed: zero.json
    checkpoints: {every: 2}
  cold_start_data: {count: 5, chunk: 2}
  evaluation:
    compute: {threads: 1}
"""
FREE = {"compute", "packing", "checkpoints", "chunk", "deepspeed", "preset", "mismatch_alarm", "verify_timeout_s"}
"""Fields that change how a stage runs and not what it computes, named here once more."""


def _make_recipe(folder: Path) -> None:
    shutil.copytree(ROOT / "configs", folder, dirs_exist_ok=True)
    (folder / "own.yaml").write_text(OWN)
    (folder / "problems.jsonl").write_text('{"question": "1 + 1", "answer": "#### 2"}\n')
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "contiguous_gradients": True}}))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")


def _load_recipe(folder: Path, overrides: tuple[str, ...] = ()) -> Read:
    recipe = load_recipe(folder / "own.yaml", list(overrides))
    # What `r1 resume` goes on from.
    assert resolve(json.loads(json.dumps(recipe.document, ensure_ascii=False).encode())).stages == recipe.stages
    return (
        [described(recipe, name) for name in recipe.stages],
        [fingerprint_of(recipe, name) for name in recipe.stages],
    )


def described(recipe: ResolvedRecipe, name: str) -> Any:
    """All that decides a stage's result, found without the code under test."""
    config = recipe.stages[name]

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in FREE}
        return [strip(item) for item in value] if isinstance(value, list) else value

    inputs = {role: described(recipe, target) for role, (target, _) in stage_inputs(config).items()}
    files = {role: [digest_path(Path(text)), digest_path(Path(text))] for role, text in external_paths(config).items()}
    document = strip(config.model_dump(mode="json"))
    for role in (*inputs, *files):
        value = document
        *above, last = role.split(".")
        for key in above:
            value = value[int(key) if isinstance(value, list) else key]
        value[int(last) if isinstance(value, list) else last] = None
    return json.loads(json.dumps([document, inputs, files]))


def fingerprint_of(recipe: ResolvedRecipe, name: str) -> str:
    """The fingerprint a stage would have if its inputs' fingerprints were their digests."""
    config = recipe.stages[name]
    kind = stage_kind(config.kind)
    digests = {role: fingerprint_of(recipe, target) for role, (target, _) in stage_inputs(config).items()}
    digests |= {role: digest_path(Path(text)) for role, text in external_paths(config).items()}
    return fingerprint(kind.name, kind.version, semantic(config), digests)


# --- stage folders -------------------------------------------------------------------------------------------------------

FACTS: dict[str, Any] = {
    "metrics": {"loss": 1.25, "steps": 4.0},
    "notes": {"chosen": 3, "refused": {"not JSON": 2}},
    "remarks": ["2 rows left out"],
    "tokens": 3,
    "wall_seconds": 1.5,
    "device_seconds": 3.0,
}


@functools.cache
def stage_record(name: str = "zero") -> StageRecord:
    """What `r1 run` would write for a stage of the quickstart."""
    config = load_recipe(ROOT / "configs" / "quickstart.yaml").stages[name]
    kind = stage_kind(config.kind)
    digests = dict.fromkeys(stage_inputs(config), "d" * 64)
    inputs = {role: InputRecord(digest=d, path=f"/nowhere/{role}", stage="toy_base-0") for role, d in digests.items()}
    return StageRecord(
        kind=kind.name,
        version=kind.version,
        fingerprint=fingerprint(kind.name, kind.version, semantic(config), digests),
        config=config.model_dump(mode="json"),
        inputs=inputs,
    )


def _make_config(folder: Path) -> None:
    write_json(folder / "config.json", stage_record().model_dump())


class _Reached(Exception):
    """A stage was about to run."""


def _load_config(folder: Path) -> Read:
    import stages.__main__ as program

    def run(context: Any) -> Any:
        raise _Reached(context.config.model_dump(mode="json"), {role: str(path) for role, path in context.inputs.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "stage_kind", lambda *given: dataclasses.replace(stage_kind(*given), run=run))
        patch.setattr(program.StopRequest, "listen", lambda _: None)
        try:
            program.run_stage(StageFolder(folder))
        except _Reached as reached:
            return reached.args, None
    raise AssertionError


def make_finished(folder: Path, name: str = "base", fingerprint: str | None = None) -> StageFolder:
    """A finished stage."""
    stage = StageFolder(folder)
    record = stage_record(name)
    if fingerprint:
        record = record.model_copy(update={"fingerprint": fingerprint})
    output = stage_kind(record.kind).output
    stage.output(output).joinpath("sub").mkdir(parents=True)
    stage.output(output).joinpath("weights").write_bytes(bytes(range(256)))
    stage.output(output).joinpath("sub", "config.json").write_text('{"a": 1}')
    write_json(stage.config, record.model_dump())
    write_manifest(stage, record, output, **FACTS)
    return stage


def _make_manifest(folder: Path) -> None:
    make_finished(folder)


def _load_manifest(folder: Path) -> Read:
    return _verified(StageFolder(folder), stage_record("base")).model_dump(), None


def _verified(folder: StageFolder, record: StageRecord) -> Manifest:
    manifest = verify_manifest(folder, record.fingerprint)
    if manifest is None:  # the stage counts as not finished, and is computed again
        raise UserError("no manifest", where=str(folder.path))
    return manifest


# --- pipeline records ----------------------------------------------------------------------------------------------------


def _make_runs(folder: Path) -> None:
    from flows.runs.record import RunRecord

    runs = Runs(Path("runs")).prepare()
    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml")
    for number in (1, 2):
        record = RunRecord.create(recipe, "quickstart.yaml")
        for name in ("base", "zero"):
            made = stage_record(name)
            stage = runs.stage(made.kind, made.fingerprint)
            if number == 1:
                make_finished(stage.path, name)
            record.stage(name, status="done", folder=str(stage.path), fingerprint=made.fingerprint)
        owner = {"pid": 1, "host": "elsewhere", "born": 1.0}
        facts = {"started": f"2026-01-0{number}T00:00:00", "status": "failed", "working_folder": "/tmp", "owner": owner}
        record.update(**facts, error="stage `zero` failed")
        record.folder.path.rename(record.folder.path.with_name(f"own-{number}"))


def _load_runs(folder: Path) -> Read:
    """What `r1 status`, `r1 compare` and `r1 resume` read."""
    from flows.runs.record import RunRecord
    from flows.runs.results import results_table, run_document, stages_table, where_to_look
    from stages.tracking.compare import compare

    runs = Runs(Path("runs"))
    record = RunRecord.open(runs.pipeline("own-2"))
    document = run_document(record)
    stages_table(record)
    results_table(document["models"])
    where_to_look(record)
    resolve(record.content["document"])
    if (lost := record.lost()) is not None:
        raise lost
    compare([RunRecord.open(runs.pipeline(name)).folder for name in ("own-1", "own-2")])
    stages = [_verified(record.place(name), stage_record(name)).model_dump() for name in ("base", "zero")]
    # A whole record of another run is another run.
    return [document, record.content, runs.pipeline("latest").path.name, stages], record.content["started"]


# --- journals ------------------------------------------------------------------------------------------------------------


def _make_journal(folder: Path) -> None:
    from stages.tracking.journal import Journal

    journal = Journal(folder / "journal.jsonl", keep_through=0)
    for step in range(1, 6):
        journal.append(step, 5, {"train/loss": 1 / step, "reward/total": float("nan") if step == 3 else 1.0, "eval/x": 1.0})


def _load_journal(folder: Path) -> Read:
    from stages.tracking.journal import Journal, read

    lines = read(folder / "journal.jsonl")
    if lines:
        shutil.copy(folder / "journal.jsonl", folder / "copy.jsonl")
        Journal(folder / "copy.jsonl", keep_through=lines[-1].step)
        steps = [line.step for line in read(folder / "copy.jsonl")]
        assert steps == sorted(set(steps))
    for line in lines:
        assert isinstance(line.step, int)
        assert isinstance(line.time, int)
        assert all(isinstance(value, float) and isinstance(key, str) for key, value in line.metrics.items())
    return "journal", None  # a number in it is not proven by anything


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def _checkpointer(folder: Path) -> Any:
    from stages.engine import distributed
    from stages.engine.checkpoint.checkpointer import Checkpointer
    from stages.engine.settings import Checkpoints

    distributed.join("cpu")
    return Checkpointer(folder / "checkpoints", Checkpoints(keep=3), 0)


def _make_checkpoints(folder: Path) -> None:
    import torch

    _make_config(folder)
    checkpointer = _checkpointer(folder)
    for step in (2, 4):
        part = {"a|weight": torch.arange(8.0) * step, "optimizer_steps": torch.tensor(step)}
        state = {"tokens": step * 10, "selection": {"best_step": step}, "fingerprint": stage_record().fingerprint}
        checkpointer.begin(step, state, {"policy": part})
        checkpointer.finish()
    made = {path.name: {p.name: digest_path(p) for p in path.iterdir()} for path in (folder / "checkpoints").iterdir()}
    for name, digests in made.items():
        digests["COMPLETE"] = digest_json(read_json(folder / "checkpoints" / name / "COMPLETE"))
    write_json(folder / "made.json", made)


def _load_checkpoints(folder: Path) -> Read:
    from stages.engine.checkpoint.checkpointer import states

    expected = _newest_undamaged(folder)
    for state in states(folder / "checkpoints"):
        assert state["selection"]["best_step"] == state["step"]
    stored = _checkpointer(folder).restore(1)
    step = None if stored is None else stored.state["step"]
    assert step == expected
    if stored is not None:
        part = stored.part("policy")
        assert part("a|weight").tolist() == [i * step for i in range(8)]
        assert int(part("optimizer_steps")) == step
        assert stored.state["tokens"] == 10 * step
    # What was passed over is set aside, so that it is not found again.
    left = {p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith("step-")}
    assert left == {f"step-{number:06d}" for number in (2, 4) if number <= (step or 0)}
    return step, f"step {step}"  # an older one is right


def _newest_undamaged(folder: Path) -> int | None:
    made = json.loads((folder / "made.json").read_text())
    whole = []
    for name, digests in made.items():
        path = folder / "checkpoints" / name
        found = {p.name: digest_path(p) for p in path.glob("*") if p.name in digests or p.suffix == ".safetensors"}
        complete = path / "COMPLETE"
        try:  # how it is spelt does not matter
            found["COMPLETE"] = digest_json(json.loads(complete.read_text()))
        except (OSError, ValueError, RecursionError):
            continue
        if found == digests:
            whole.append(int(name.removeprefix("step-")))
    return max(whole, default=None)


# --- settings and models -------------------------------------------------------------------------------------------------


def _make_deepspeed(folder: Path) -> None:
    shutil.copy(ROOT / "configs" / "deepspeed" / "zero3.json", folder / "own.json")


def _load_deepspeed(folder: Path) -> Read:
    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml", [f"stages.zero.deepspeed={folder / 'own.json'}"])
    text = Path(recipe.stages["zero"].deepspeed).read_text(encoding="utf-8-sig")  # type: ignore[attr-defined]
    settings = json.loads(text)
    assert settings.get("zero_optimization", {}).get("stage", 0) in (0, 1, 2, 3)
    return "readable", None  # by its definition it changes no result


def _make_model(folder: Path) -> None:
    from tests.conftest import tiny_llama

    words = {text: i for i, text in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz0123"])}
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")
    wrapped.save_pretrained(folder)
    tiny_llama().float().save_pretrained(folder)


def _load_model(folder: Path) -> Read:
    from stages.kinds import model
    from stages.store.stage import StageContext, StopRequest

    identity = digest_path(folder)
    with tempfile.TemporaryDirectory() as temporary:
        config = model.ModelConfig(kind="model", path=str(folder))
        stage = StageFolder(Path(temporary))
        model.run(StageContext(config=config, folder=stage, inputs={}, input_digests={}, stop=StopRequest()))
        return digest_files(stage.output("model")), identity


INPUTS: dict[str, Input] = {
    "recipe": Input(
        _make_recipe,
        _load_recipe,
        {**dict.fromkeys(["own.yaml", "quickstart.yaml", "recipes/r1*.yaml"], damage.YAML), "problems.jsonl": damage.JSON},
    ),
    "config": Input(_make_config, _load_config, {"config.json": damage.JSON}, whole=False),
    "manifest": Input(
        _make_manifest,
        _load_manifest,
        {"manifest.json": damage.JSON, "config.json": damage.JSON, "model/*": damage.BYTES, "model/sub/*": damage.JSON},
    ),
    "runs": Input(_make_runs, _load_runs, {"runs/pipelines/own-*/*.json": damage.JSON, "runs/stages/*/*.json": damage.JSON}),
    "journal": Input(_make_journal, _load_journal, {"journal.jsonl": damage.JSON}, whole=False),
    "checkpoint": Input(
        _make_checkpoints,
        _load_checkpoints,
        {
            "checkpoints/*/COMPLETE": damage.JSON,
            "checkpoints/*/state.json": damage.JSON,
            "checkpoints/*/*.safetensors": damage.BYTES,
        },
    ),
    **{f"problems.{ending}": problems(ending) for ending in ENDINGS},
    "dataset": Input(make_dataset, load_dataset, {"train.parquet": damage.BYTES}),
    "rollouts": Input(make_rollouts, load_rollouts, {"chunk-00000.parquet": damage.BYTES}, whole=False),
    "deepspeed": Input(_make_deepspeed, _load_deepspeed, {"own.json": damage.JSON}),
    "model": Input(
        _make_model,
        _load_model,
        {"*config.json": damage.JSON, "tokenizer.json": damage.JSON, "*.safetensors": damage.BYTES},
        cost=0.3,
    ),
}
