"""Mistakes that show before anything is computed: each kind once, found by the checks that `r1 run`, plan and doctor share."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.doctor.capacity import Capacity, examine_capacity, fit_line
from flows.doctor.checks import demand, examine
from flows.doctor.finding import Finding
from flows.doctor.gpus import LocalGpu
from flows.doctor.scope import Scope, unfinished
from flows.runs.selection import select
from stages.contract.errors import UserError
from stages.evals import task_index
from stages.evals.task_file import check_task_file
from stages.problems.first_rows import ROWS, first_problem
from stages.problems.sources import FileSource
from stages.recipe.resolve import load_recipe
from tests.conftest import ROOT
from tests.plan.test_plan import finish
from tests.recipe.test_shipped_recipes import make_model

TOY = {"source": "toy", "count": 20}
HELD_OUT = TOY | {"split": "held_out"}
Stages = dict[str, dict[str, Any]]


@pytest.fixture(autouse=True)
def known_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's names, of which there are 14,000."""
    monkeypatch.setattr("flows.doctor.tasks.builtin_tasks", lambda _: frozenset({"gsm8k", "hellaswag"}))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a recipe with a small base and these stages."""
    monkeypatch.chdir(tmp_path)

    def made(**stages: dict[str, Any]) -> Path:
        base = {"kind": "toy_base", "hidden": 32, "layers": 2, "heads": 2, "intermediate": 64, "steps": 20}
        document = {"name": "own", "runs": str(tmp_path / "runs"), "stages": {"base": base, **stages}}
        file = tmp_path / "own.yaml"
        file.write_text(json.dumps(document))
        return file

    return made


def findings(file: Path, **options: Any) -> list[Finding]:
    recipe = load_recipe(file)
    stages, finished = unfinished(recipe, select(recipe))
    return list(examine(Scope(recipe, stages, finished, str(file), **options)))


def faults(file: Path, **options: Any) -> list[str]:
    return [f"{f.state}: {f.error()}" for f in findings(file, **options) if f.state != "ok"]


def zero(**settings: Any) -> dict[str, Any]:
    return {"kind": "rl", "policy": "base", "problems": TOY, "held_out": HELD_OUT, "deepspeed": "zero0", **settings}


def test_a_sound_recipe_has_no_faults(write: Callable[..., Path]) -> None:
    file = write(zero=zero(), judged={"kind": "evaluate", "models": ["zero"], "held_out": HELD_OUT, "tasks": ["gsm8k"]})
    assert faults(file) == []
    assert not (file.parent / "runs").exists()
    (data,) = (f for f in findings(file) if f.check == "zero: data")
    assert "problems: 20, held_out: 20" in data.found


# --- data ---


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.json"])
def test_wrong_column_is_named_with_the_nearest(write: Callable[..., Path], tmp_path: Path, name: str) -> None:
    rows = [{"qestion": f"{n}+1", "answer": n + 1} for n in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text("qestion,answer\n1+1,2\n" if name == "p.csv" else lines)
    file = write(zero=zero(problems={"source": "file", "path": name}))
    (fault,) = faults(file)
    assert fault.startswith(f"fail: {file}: stages.zero.problems: {name}: no problem is left of it")
    assert "no column `question`" in fault
    assert fault.endswith("did you mean `qestion`? the columns are: answer, qestion")


def test_wrong_column_of_a_large_file_is_found_in_its_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.problems.first_rows.SMALL_BYTES", 100)
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "", "answer": "1"}\n' * 5 + '{"question": "1+1", "answer": "2"}\n')
    problem = first_problem(FileSource(path=str(path)), "problems")
    assert problem is not None and (problem.id, problem.question) == ("p:6", "1+1")
    path.write_text('{"frage": "1+1"}\n' * (ROWS + 500) + "not JSON\n")
    with pytest.raises(UserError, match=f"none of its first {ROWS} rows is a problem"):
        first_problem(FileSource(path=str(path)), "problems")
    path.write_text('{"question": "", "answer": "1"}\n' * ROWS)
    assert first_problem(FileSource(path=str(path)), "problems") is None, "later rows may be better"


def test_filters_offsets_and_examples_are_looked_at(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "few.jsonl").write_text('{"question": "1+1", "thinking": "", "answer": "2"}\n')
    source = {"source": "file", "path": "p.jsonl"}
    mixture = {"source": "mixture", "parts": [{"weight": 1, "problems": source | {"answer": "target"}}]}
    curate = {"kind": "curate", "sampler": "base", "problems": source, "few_shot": {"path": "few.jsonl"}}
    file = write(
        behind=zero(problems=source | {"offset": 5}),
        same=zero(problems=source, held_out=source),
        mixed=zero(problems=mixture),
        curated=curate,
    )
    said = faults(file)
    assert any("stages.behind.problems" in fault and "`offset` is 5, there are 1" in fault for fault in said)
    assert any("stages.same.problems: every problem is held out" in fault for fault in said)
    assert any("stages.mixed.problems" in fault and "no column `target`" in fault for fault in said)
    assert any("few.jsonl: line 1" in fault and "no text in column `thinking`" in fault for fault in said)
    assert len(said) == 4


def test_columns_of_documents_are_looked_at(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"promt": "1+1=", "completion": "2"}\n')
    (fault,) = faults(write(documents={"kind": "dataset", "path": "d.jsonl"}))
    assert "1 × no column `prompt`" in fault
    assert "did you mean `promt`?" in fault
    (tmp_path / "d.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    (fault,) = faults(write(documents={"kind": "dataset", "path": "d.jsonl"}))
    assert "conversations need a chat template" in fault


# --- code, tasks, DeepSpeed ---


def test_reward_functions_are_called_before_the_run(write: Callable[..., Path], tmp_path: Path) -> None:
    source = (
        "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n\ndef one(answer):\n    return answer['x']\n"
    )
    (tmp_path / "my_rewards.py").write_text(source)
    file = write(zero=zero(rewards={"functions": {"own": {"function": "my_rewards:one"}}}))
    (fault,) = faults(file)
    assert fault.startswith(f"fail: {file}: stages.zero.rewards.functions.own: `my_rewards:one`")
    assert f"KeyError: 'x'; {tmp_path / 'my_rewards.py'}, line 5" in fault
    (tmp_path / "imported").unlink()
    assert faults(file, execute=False) == []
    assert not (tmp_path / "imported").exists()
    (tmp_path / "my_rewards.py").write_text("def one(answer):\n    return len(answer['answer'])\n")
    (fault,) = faults(file)
    assert fault.startswith("warn: ")
    assert "an answer that was cut no number (TypeError: object of type 'NoneType' has no len()" in fault


def test_tasks_are_looked_up_and_task_files_read(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "own_task.yaml").write_text("tsk: own\n")
    judged = {"kind": "evaluate", "models": ["base", "zero"], "held_out": HELD_OUT}
    file = write(zero=zero(), judged=judged | {"tasks": ["gms8k"], "task_files": ["own_task.yaml"]})
    first, second = faults(file)  # once, though two models are evaluated
    assert first == f"fail: {file}: stages.judged.tasks: lm-eval has no task `gms8k`; did you mean `gsm8k`?"
    assert "own_task.yaml: names no `task` and no `group`; did you mean `task`?" in second


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: [", "not valid YAML"),
        ("- 1\n", "not a mapping"),
        ("task: own\ninclude: own.yaml\n", "circular `include`"),
        (
            "task: own\nprocess_docs: !function own_functions.proces\n",
            "has no function `proces`; did you mean `process`?",
        ),
        ("task: own\nprocess_docs: !function broken.process\n", "broken.py: line 1: SyntaxError"),
    ],
)
def test_task_file_faults_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "own_functions.py").write_text("def process(docs): return docs\n")
    (tmp_path / "broken.py").write_text("def process(docs) return docs\n")
    with pytest.raises(UserError) as caught:
        check_task_file(tmp_path / "own.yaml")
    assert says in str(caught.value)


def test_task_file_with_include_and_function_is_sound(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("task: own\n")
    (tmp_path / "own_functions.py").write_text("from os import path as process\n")
    (tmp_path / "own.yaml").write_text("include: base.yaml\nmetric_list: [{metric: !function own_functions.process}]\n")
    check_task_file(tmp_path / "own.yaml")


def test_task_index_is_written_once_per_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, collected, notes = tmp_path / "share" / "tasks.json", list[int](), list[str]()
    monkeypatch.setattr(task_index, "index_file", lambda: file)
    monkeypatch.setattr(task_index, "_collected", lambda: collected.append(1) or frozenset({"b", "a"}))
    assert task_index.builtin_tasks(notes.append) == {"a", "b"}
    assert json.loads(file.read_text()) == ["a", "b"]
    assert task_index.builtin_tasks(notes.append) == {"a", "b"}
    assert (len(collected), len(notes)) == (1, 1)
    file.write_text("damaged")
    assert task_index.builtin_tasks(notes.append) == {"a", "b"}
    assert len(collected) == 2


def test_deepspeed_files_are_merged_with_the_stage(write: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"fp16": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    file = write(zero=zero(deepspeed="ds.json", compute={"device": "cpu"}))
    (fault,) = faults(file)
    assert fault.startswith(f"fail: {file}: stages.zero.deepspeed: ds.json: fp16: fp16 does not work on a CPU")
    (tmp_path / "ds.json").write_text(json.dumps({"scheduler": {"type": "WarmupLR"}, "train_batch_size": "auto"}))
    (fault,) = faults(file)
    assert fault.startswith("warn: ds.json: `scheduler` has no effect")
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 4}))
    (fault,) = faults(file)
    assert "`train_batch_size` is 4, but a step of the stage has 512 texts" in fault


# --- models ---


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("kind", "state"), [("gpt2", "fail"), ("llama", "warn")])
def test_answers_longer_than_the_models_positions(write: Callable[..., Path], tmp_path: Path, kind: str, state: str) -> None:
    make_model(tmp_path / "m")
    change(tmp_path / "m", "config.json", model_type=kind, max_position_embeddings=48)
    file = write(own={"kind": "model", "path": "m"}, zero=zero(policy="own", sampling={"max_tokens": 64}))
    (fault,) = faults(file)
    assert fault.startswith(f"{state}: {file}: stages.zero.sampling.max_tokens: ")
    assert "`max_tokens` 64 are more than the model's 48 positions" in fault
    assert faults(write(own={"kind": "model", "path": "m"}, zero=zero(policy="own", sampling={"max_tokens": 8}))) == []


def test_gpt2_model_whose_answers_fit_its_positions_has_no_fault(write: Callable[..., Path], tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    config = {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": None,
        "n_positions": 48,
        "vocab_size": 8,
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert faults(write(own={"kind": "model", "path": "m"}, zero=zero(policy="own", sampling={"max_tokens": 8}))) == []
    (fault,) = faults(write(own={"kind": "model", "path": "m"}, zero=zero(policy="own", sampling={"max_tokens": 64})))
    assert "`max_tokens` 64 are more than the model's 48 positions" in fault


def test_model_of_a_type_whose_size_is_not_known_is_a_warning(write: Callable[..., Path], tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    config = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 8}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (fault,) = faults(write(own={"kind": "model", "path": "m"}, zero=zero(policy="own", sampling={"max_tokens": 8})))
    assert fault.startswith("warn")
    assert "stages.own: its size is not known here (the model's config lacks 'num_attention_heads')" in fault


def test_model_folders_are_looked_at(write: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("rows", "template", "labels", "weights"):
        make_model(tmp_path / name)
    change(tmp_path / "rows", "config.json", vocab_size=7)
    (tmp_path / "template" / "chat_template.jinja").write_text("{{ messages[0].content.nothing.more }}")
    (tmp_path / "weights" / "model.safetensors").unlink()
    file = write(
        **{name: {"kind": "model", "path": name} for name in ("rows", "template", "weights")},
        labels={"kind": "model", "path": "labels", "task": "preference"},
    )
    said = faults(file)
    assert any("stages.rows.path: its tokenizer has ids up to 7, the model 7 rows" in fault for fault in said)
    assert any(f.startswith("warn") and "stages.template.path: its chat template cannot be rendered" in f for f in said)
    assert any("stages.labels.path: the model has 2 labels, a preference model has one" in fault for fault in said)
    assert any("stages.weights.path: weights: no weights in safetensors" in fault for fault in said)
    assert len(said) == 4


def test_an_added_token_beyond_the_models_rows_is_a_warning(write: Callable[..., Path], tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    change(tmp_path / "m", "tokenizer.json", added_tokens=[{"id": 8, "content": "<image>"}])
    (fault,) = faults(write(own={"kind": "model", "path": "m"}))
    assert fault.startswith("warn")
    assert "ids up to 8, the model 8 rows" in fault


def test_the_first_conversation_is_rendered(write: Callable[..., Path], tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    stages: Stages = {
        "own": {"kind": "model", "path": "m"},
        "documents": {"kind": "dataset", "path": "d.jsonl", "tokenizer": "own"},
    }
    (fault,) = faults(write(**stages))
    assert "the model in m has no chat template" in fault
    template = tmp_path / "m" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}")
    assert faults(write(**stages)) == []
    template.write_text("{% if messages|length > 1 %}{{ raise_exception('single questions only') }}{% endif %}")
    (fault,) = faults(write(**stages))
    assert fault.startswith("warn")
    assert "line 1 of d.jsonl: the chat template refuses it (single questions only" in fault


def test_a_hostile_chat_template_is_ended_at_its_limit(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.rewards.verifier_pool.pool import Limits

    monkeypatch.setattr("flows.doctor.models.RENDER", Limits(0.3, 5.0))
    make_model(tmp_path / "m")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(loop)
    (fault,) = faults(write(own={"kind": "model", "path": "m"}))
    assert "cannot be rendered (ended)" in fault


# --- this machine ---


def test_hub_models_when_offline(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    file = write(other={"kind": "model", "hub": "some/model-that-is-nowhere"})
    (fault,) = faults(file)
    assert fault.startswith("warn")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (fault,) = faults(file)
    assert fault.startswith("fail")
    assert "is not in the cache, and HF_HUB_OFFLINE is set" in fault


def capacity(file: Path, memory: float, gpus: tuple[LocalGpu, ...] = ()) -> list[Finding]:
    recipe = load_recipe(file)
    scope = Scope(recipe, recipe.stages, {}, str(file))
    return list(examine_capacity(scope, Path("/nowhere"), Capacity(memory, gpus)))


def test_only_weights_that_cannot_fit_are_refused(write: Callable[..., Path]) -> None:
    file = write(zero=zero(steps=2))
    weights = 4 * (2 * 32 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64) + 5 * 32)  # embeddings, layers, norms in float32
    states = {f.check: f.state for f in capacity(file, weights - 1)}
    assert states == {"base: memory": "fail", "disk": "ok"}
    found = capacity(file, weights)
    assert {f.check: f.state for f in found} == {"base: memory": "warn", "zero: memory": "warn", "disk": "ok"}
    assert "an update takes about" in fit_line(found)
    assert "refuses" not in fit_line(found)
    assert fit_line(capacity(file, weights - 1)).endswith("; `r1 run` refuses it")
    assert fit_line(capacity(file, 1e12)) == ""


def test_what_takes_years_is_said_and_not_refused(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    file = write(zero=zero(steps=10**9))
    found = capacity(file, 1e12)
    (time,) = (f for f in found if f.check == "time")
    assert time.state == "warn"
    assert "years on this machine" in fit_line(found)
    assert "`zero` alone" in fit_line(found)
    recipe = load_recipe(file)
    demand(recipe, select(recipe), argparse.Namespace(config=str(file)))
    assert "warning: time: about" in capsys.readouterr().err


def test_weights_are_held_against_a_gpu_of_this_machine(write: Callable[..., Path]) -> None:
    file = write(zero=zero(steps=2))
    small = (LocalGpu("NVIDIA H100 80GB HBM3", 1000.0),)
    (base, *_) = capacity(file, 1e12, small)
    assert (base.check, base.state) == ("base: memory", "fail")
    assert "its GPU (NVIDIA H100 80GB HBM3) has" in base.found
    assert {f.state for f in capacity(file, 1e12, (LocalGpu("NVIDIA H100 80GB HBM3", 8e10),))} == {"ok"}


# --- the commands' use ---


def test_demand_raises_the_first_failure_and_prints_warnings(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "m")
    change(tmp_path / "m", "config.json", max_position_embeddings=48)
    stages: Stages = {"own": {"kind": "model", "path": "m"}, "zero": zero(policy="own", sampling={"max_tokens": 64})}
    recipe = load_recipe(write(**stages))
    demand(recipe, select(recipe), argparse.Namespace(config="own.yaml", no_code=False))
    assert capsys.readouterr().err.startswith("warning: own.yaml: stages.zero.sampling.max_tokens: ")
    stages["judged"] = {"kind": "evaluate", "models": ["base"], "held_out": HELD_OUT, "tasks": ["x"]}
    recipe = load_recipe(write(**stages))
    with pytest.raises(UserError, match="lm-eval has no task `x`"):
        demand(recipe, select(recipe), argparse.Namespace(config="own.yaml"))
    demand(recipe, select(recipe, until_stage="zero"), argparse.Namespace(config="own.yaml"))


def test_demand_forgives_what_this_machine_lacks_when_another_one_runs_it(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    endpoint = {"url": "http://127.0.0.1:1/v1", "model": "m", "key_variable": "ABSENT_KEY"}
    curate = {"kind": "curate", "sampler": "base", "problems": TOY, "rewrite": {"endpoint": endpoint}}
    recipe = load_recipe(write(curated=curate))
    with pytest.raises(UserError, match="ABSENT_KEY is not set"):
        demand(recipe, select(recipe), argparse.Namespace())
    demand(recipe, select(recipe), argparse.Namespace(), elsewhere=True)


def test_finished_stages_are_not_looked_at_again(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    file = write(documents={"kind": "dataset", "path": "d.jsonl"})
    recipe = load_recipe(file)
    assert list(unfinished(recipe, select(recipe))[0]) == ["base", "documents"]
    finish(recipe, "documents")
    todo, finished = unfinished(recipe, select(recipe))
    assert (list(todo), list(finished)) == (["base"], ["documents"])
    assert list(unfinished(recipe, select(recipe, fresh=["documents"]))[0]) == ["base", "documents"]
    manifest = finished["documents"].folder.manifest
    manifest.write_text(manifest.read_text()[:100])
    assert list(unfinished(recipe, select(recipe))[0]) == ["base", "documents"], "damaged: the run says so"


def test_checks_import_nothing_heavy() -> None:
    import subprocess
    import sys

    program = (
        "import sys; from flows.doctor.checks import examine; from stages.recipe.resolve import load_recipe\n"
        "from flows.doctor.scope import Scope; recipe = load_recipe('configs/quickstart.yaml', ['runs=/nowhere/runs'])\n"
        "assert list(examine(Scope(recipe, recipe.stages, {})))\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'deepspeed', 'prefect', 'mlflow', 'scipy', 'numpy'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
