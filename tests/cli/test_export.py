"""`r1 sample` and `r1 export`: what is handed over answers as the stage's model does, and is asked as it was trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.runs.record import RunRecord
from flows.runs.sampling_settings import asking
from stages.contract.errors import UserError
from stages.problems.templates import Template
from stages.store.files import read_json
from stages.store.folders import PipelineFolder, StageFolder
from stages.store.manifest import StageRecord
from tests.commands import r1
from tests.conftest import ROOT
from tests.runs.built_runs import build_run, build_stage, call, finish, folder_name

BASE, ZERO, DATA, COLD = (folder_name(kind, n) for n, kind in enumerate(("model", "rl", "curate", "sft")))
ASKED = {"template": {"name": "question"}, "sampling": {"max_tokens": 12, "temperature": 0.7}, "rollout": {}}
SECTIONS: dict[str, dict[str, Any]] = {
    "base": {"kind": "model", "path": "somewhere"},
    "zero": {"kind": "rl", "policy": "base", **ASKED},
    "data": {"kind": "curate", "sampler": "zero", **ASKED, "template": {"name": "question", "open_thinking": True}},
    "cold": {"kind": "sft", "model": "base", "data": "data"},
}


@pytest.fixture
def runs(tmp_path: Path, model_folder: Path) -> Path:
    """A finished run around a tiny model."""
    build_stage(tmp_path, BASE, model=model_folder)
    build_stage(tmp_path, ZERO, model=model_folder, inputs={"policy": BASE})
    build_stage(tmp_path, DATA)
    build_stage(tmp_path, COLD, model=model_folder, inputs={"model": BASE, "data": DATA})
    build_run(tmp_path, "a-1", {"base": BASE, "zero": ZERO, "data": DATA, "cold": COLD}, sections=SECTIONS)
    return tmp_path


def test_a_model_is_asked_as_it_was_trained(runs: Path) -> None:
    record = RunRecord.open(PipelineFolder(runs / "pipelines" / "a-1"))
    assert [(s, asking(record, s).source) for s in SECTIONS] == [
        ("base", "zero"),
        ("zero", "zero"),
        ("data", "data"),
        ("cold", "data"),
    ]
    assert asking(record, "cold").template == Template(name="question", open_thinking=True)
    record.content["document"]["stages"] = {"base": SECTIONS["base"]}
    assert asking(record, "base").source is None


def test_sampling_is_repeatable_and_raw_leaves_the_template_out(runs: Path) -> None:
    def answers(*options: object) -> list[dict[str, Any]]:
        _, document = call("sample", "latest", "cold", "abc", "--runs", runs, "--json", *options)
        asked: dict[str, Any] = document["prompts"][0]
        found: list[dict[str, Any]] = asked["answers"]
        return [{**answer, "rendered": asked["rendered"]} for answer in found]

    first = answers("--samples", 3)
    assert first == answers("--samples", 3)
    assert first[:1] == answers("--samples", 1)
    assert [a["ids"] for a in first] != [a["ids"] for a in answers("--samples", 3, "--seed", 1)]
    assert {len(a["ids"]) <= 12 for a in first} == {True}
    assert first[0]["rendered"] == "abc<think>"
    assert first[0]["text"].startswith("<think>")
    raw = answers("--raw", "--temperature", 0, "--max-tokens", 4)
    assert raw[0]["rendered"] == "abc"
    assert len({tuple(a["ids"]) for a in raw}) == 1
    assert raw[0]["tokens"] <= 4


def test_refusals(runs: Path, tmp_path: Path) -> None:
    build_report(runs)
    with pytest.raises(UserError, match="hands over"):
        call("sample", "latest", "data", "abc", "--runs", runs)
    with pytest.raises(UserError, match="--temperature"):
        call("sample", "latest", "zero", "abc", "--runs", runs, "--temperature", -1)
    with pytest.raises(UserError, match="--stdin"):
        call("sample", "latest", "zero", "--runs", runs, "--json")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for target in (tmp_path / "full", tmp_path / "full" / "file", "/"):
        with pytest.raises(UserError, match="empty folder"):
            call("export", "latest", "zero", target, "--runs", runs)
    weights = runs / "stages" / ZERO / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="not what the manifest says"):
        call("export", "latest", "zero", tmp_path / "out", "--runs", runs)
    assert not (tmp_path / "out").exists()


def build_report(runs: Path) -> None:
    """Make the stage `data` one that hands over a dataset."""
    folder = StageFolder(runs / "stages" / DATA)
    folder.output("dataset").mkdir()
    (folder.output("dataset") / "rows").write_bytes(b"rows")
    finish(folder, StageRecord.model_validate(read_json(folder.config)), "dataset")


def greedy(folder: Path, question: str, count: int) -> tuple[list[int], list[int]]:
    """Prompt and answer of transformers, with nothing but the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    message = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    prompt = inputs["input_ids"][0].tolist()
    return prompt, out[0].tolist()[len(prompt) :]


def same_as_sampled(runs: Path, run: str, stage: str, target: Path, question: str) -> None:
    """An exported model answers greedily as `r1 sample --temperature 0`."""
    options = ("--runs", runs, "--json", "--temperature", 0, "--samples", 1)
    asked = call("sample", run, stage, question, *options)[1]["prompts"][0]
    assert greedy(target, question, len(asked["answers"][0]["ids"])) == (asked["prompt_ids"], asked["answers"][0]["ids"])
    assert len(asked["answers"][0]["ids"]) > 3


def test_an_exported_model_answers_as_the_stage_does(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "exports" / "cold model"
    _, document = call("export", "latest", "cold", target, "--runs", runs, "--json")
    assert document["template"] == {"origin": "trained", "stage": "data", "exact": True}
    same_as_sampled(runs, "latest", "cold", target, "abc")
    generation = json.loads((target / "generation_config.json").read_text())
    assert (generation["temperature"], generation["do_sample"], generation["eos_token_id"]) == (0.7, True, 1)
    card = (target / "README.md").read_text()
    for said in ("stage `cold`", "Licence\n\nUnknown", f"vllm serve '{target}' --dtype float32", "Not evaluated"):
        assert said in card
    assert document["model_digest"] in card
    assert not list(target.parent.glob(".tmp-*"))
    (target / "config.json").write_text("{}")  # a copy: what is done to it does not reach the stage
    call("export", "latest", "cold", tmp_path / "again", "--runs", runs, "--json")


def test_a_tokenizer_that_begins_texts_itself_begins_them_once(runs: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = runs / "stages" / COLD / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer.save_pretrained(folder)
    stage = StageFolder(runs / "stages" / COLD)
    finish(stage, StageRecord.model_validate(read_json(stage.config)))
    _, document = call("export", "latest", "cold", runs / "out", "--runs", runs, "--json")
    assert document["template"]["exact"]
    assert greedy(runs / "out", "abc", 1)[0][:2] == [1, 2]


def adapt(folder: Path) -> None:
    """Put an adapter beside the weights of a model folder."""
    import torch

    from stages.engine.adapter_folder import write_adapter
    from stages.engine.adapters import adapted, adapters
    from stages.engine.settings import Lora
    from stages.rollout.torch_engine import load_model

    model = adapted(load_model(folder), Lora(rank=2), 0)
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_()
    write_adapter(model, folder)


def test_an_adapted_model_is_exported_as_both_or_merged(runs: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from stages.rollout.torch_engine import load_model

    with pytest.raises(UserError, match="--merge: the model of stage `cold` has no adapter"):
        call("export", "latest", "cold", tmp_path / "none", "--runs", runs, "--merge")
    adapt(runs / "stages" / COLD / "model")
    stage = StageFolder(runs / "stages" / COLD)
    finish(stage, StageRecord.model_validate(read_json(stage.config)))
    both, merged = tmp_path / "both", tmp_path / "merged"
    _, document = call("export", "latest", "cold", both, "--runs", runs, "--json")
    assert document["adapter"]
    assert f"--enable-lora --max-lora-rank 8 --lora-modules trained={both}/adapter" in document["serve"]
    card = (both / "README.md").read_text()
    assert "**load both**" in card
    assert 'model = PeftModel.from_pretrained(model, f"{folder}/adapter")' in card
    _, document = call("export", "latest", "cold", merged, "--runs", runs, "--json", "--merge")
    assert not document["adapter"]
    same_as_sampled(runs, "latest", "cold", merged, "abc")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        expected = load_model(runs / "stages" / COLD / "model")(ids).logits
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(both), both / "adapter")
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(merged)(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (AutoModelForCausalLM.from_pretrained(both)(ids).logits - expected).abs().max() > 0.01


@pytest.mark.slow
def test_a_tiny_pipeline_is_read_sampled_handed_over_and_cleaned(tmp_path: Path) -> None:
    runs, config = tmp_path / "runs", ROOT / "tests" / "pipeline" / "tiny.yaml"
    lasting = ("--set", f"runs={runs}", "--set", "stages.zero.select=last")
    done = r1("run", config, *lasting, timeout=1200)
    assert done.returncode == 0, done.stderr
    for stage, answers in (("zero", 16), ("cold_start_data", 40), ("evaluation.reasoning", 24)):
        rows = call("rollouts", "latest", stage, "--runs", runs, "--json", "--last", 1, "--limit", 0)[1]["rows"]
        assert len(rows) == answers
    for stage in ("base", "zero", "cold_start", "reasoning"):
        target = tmp_path / "exports" / stage
        _, document = call("export", "latest", stage, target, "--runs", runs, "--json")
        assert document["template"]["exact"]
        same_as_sampled(runs, "latest", stage, target, "3+4=?")
        assert "± " in (target / "README.md").read_text()
    last, other, checkpoint = (
        call("sample", "latest", "zero", "3+4=?", "--runs", runs, "--json", *step)[1]
        for step in ((), ("--step", 2), ("--step", 4))
    )
    assert checkpoint["model"].startswith("checkpoint step-000004")
    assert checkpoint["prompts"] == last["prompts"] != other["prompts"]
    r1("gc", "--runs", runs, "--yes", "--checkpoints", "--json")
    assert not list(runs.glob("stages/*/checkpoints/step-*"))
    again = r1("run", config, *lasting, "--json", timeout=600)
    assert {stage["status"] for stage in json.loads(again.stdout)["stages"]} == {"reused"}
