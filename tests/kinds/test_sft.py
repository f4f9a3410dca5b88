"""The stage `sft`: its settings, what it says of documents it leaves out, what it hands over."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.contract.config import semantic, stage_inputs
from stages.contract.errors import UserError
from stages.kinds.sft import KIND, SFTConfig
from stages.problems.toy import SYMBOLS, VOCABULARY, save_toy_tokenizer
from stages.recipe.resolve import load_recipe
from stages.rollout.torch_engine import load_model
from stages.store.folders import StageFolder
from stages.store.stage import Result, StageContext, StopRequest
from stages.tracking.journal import read
from tests.conftest import ROOT


def settings(**fields: object) -> SFTConfig:
    return SFTConfig.model_validate({"kind": "sft", "model": "base", "data": "made", **fields})


def test_datasets_are_a_stage_a_list_or_weights():
    assert stage_inputs(settings())["data"] == ("made", "dataset")
    listed = settings(data=["a", "b"])
    assert {role: name for role, (name, _) in stage_inputs(listed).items()} == {"model": "base", "data.0": "a", "data.1": "b"}
    assert listed.weights is None
    weighted = settings(data={"a": 600, "b": 200.0})
    assert (weighted.datasets, weighted.weights) == (("a", "b"), (600, 200))
    assert SFTConfig.model_validate(weighted.model_dump(mode="json")) == weighted
    # Weights decide the result, names do not.
    assert semantic(weighted)["weights"] != semantic(settings(data={"a": 3, "b": 2}))["weights"]
    assert semantic(weighted) == semantic(settings(data={"x": 600, "y": 200}))
    assert semantic(listed) == semantic(settings(data=["x", "y"]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"data": ["a", "a"]}, "one twice"),
        ({"data": []}, "no stage"),
        ({"data": {"a": 0, "b": 1}}, "above 0"),
        ({"data": ["a", "b"], "weights": [1]}, "a weight above 0"),
        ({"data": {"a": 1}, "weights": [1]}, "not in both"),
        ({"validation": {"share": 1}}, "less than 1"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"lora": {"targets": "q_proj"}}, "all-linear"),
    ],
)
def test_mistakes_are_told(fields, says):
    with pytest.raises(ValidationError, match=says):
        settings(**fields)


def test_an_unknown_dataset_is_told_with_its_key():
    with pytest.raises(UserError, match=r"cold_start\.data\.1: no stage `cold_start_dat`; did you mean `cold_start_data`"):
        load_recipe(ROOT / "configs/quickstart.yaml", ["stages.cold_start.data={cold_start_data: 1, cold_start_dat: 2}"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = SYMBOLS.index("<eos>")
    window = {"max_position_embeddings": 40}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, eos_token_id=end, pad_token_id=0, bos_token_id=None, **size, **window)
    ).save_pretrained(folder)
    save_toy_tokenizer(folder)
    return folder


def dataset(folder: Path, rows: list[tuple[str, str]]) -> Path:
    folder.mkdir()
    rng = random.Random(0)
    table = [{"prompt": p, "completion": c, "problem_id": str(rng.random())} for p, c in rows]
    pq.write_table(pa.Table.from_pylist(table), folder / "train.parquet")
    return folder


def run(folder: Path, model: Path, data: Path, **fields: object) -> Result:
    config = settings(batch=4, **fields)
    return KIND.run(StageContext(config, StageFolder(folder), {"model": model, "data": data}, {}, StopRequest()))


def test_documents_that_the_window_does_not_hold_are_left_out_and_counted(model, tmp_path):
    # The model's window is 40: of 41 tokens, the end among them, 40 are computed.
    rows = [(f"{n}+{n}=?", "1" * 35) for n in range(6)] + [("6+6=?", "1" * 36), ("5+6=?", "1" * 3)]
    result = run(tmp_path / "stage", model, dataset(tmp_path / "data", rows))
    assert result.remarks == ["data: 1 of 8 documents left out, which are longer than 41 tokens"]
    assert result.metrics["documents"] == 7
    assert result.tokens == 2 * (6 * 41 + 9)
    assert [line.step for line in read(tmp_path / "stage/journal.jsonl")] == [1, 2, 3, 4]  # 14 documents, 4 a step

    result = run(tmp_path / "short", model, tmp_path / "data", longest=9, epochs=1)
    assert (result.metrics["documents"], result.tokens) == (1, 9)
    with pytest.raises(UserError, match="every document is longer than 8 tokens"):
        run(tmp_path / "none", model, tmp_path / "data", longest=8)


def test_adapters_are_handed_over_beside_the_weights_or_merged_in_float32(model, tmp_path):
    data = dataset(tmp_path / "data", [(f"{n}+{n + 1}=?", f"{n}{n}{n}") for n in range(6)])
    lora = {"rank": 2, "alpha": 4, "targets": ["v_proj", "down_proj"]}
    fields = {"lr": 1e-2, "epochs": 6, "validation": {"count": 2}}
    result = run(tmp_path / "stage", model, data, **fields, lora=lora)
    assert result.metrics["eval/loss"] < result.metrics["eval/loss_before"]
    before, beside = (load_file(p / "model.safetensors") for p in (model, tmp_path / "stage/model"))
    assert before.keys() == beside.keys()
    assert all(torch.equal(before[name], beside[name]) for name in before)
    run(tmp_path / "merging", model, data, **fields, lora={**lora, "merge": True})
    assert not (tmp_path / "merging/model/adapter").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merging/model", dtype="auto")
    after = plain.state_dict()
    assert before.keys() <= after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.0.{name}.weight" for name in ("self_attn.v_proj", "mlp.down_proj")}
    for name in changed:  # a change of rank 2
        values = torch.linalg.svdvals(after[name] - before[name])
        assert values[1] > 1e-4 and values[2] < 1e-5
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    torch.testing.assert_close(load_model(tmp_path / "stage/model")(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_stage_on_an_adapted_model_goes_on_with_the_same_adapter(model, tmp_path):
    data = dataset(tmp_path / "data", [(f"{n}+{n + 1}=?", f"{n}{n}{n}") for n in range(6)])
    fields = {"lr": 1e-2, "epochs": 2, "validation": {"count": 2}}
    lora = {"rank": 2, "alpha": 4, "targets": ["v_proj", "down_proj"]}
    first = run(tmp_path / "first", model, data, **fields, lora=lora)
    second = run(tmp_path / "second", tmp_path / "first/model", data, **fields, lora=lora)
    assert second.metrics["eval/loss_before"] == pytest.approx(first.metrics["eval/loss"], rel=1e-5)
    assert second.metrics["eval/loss"] < first.metrics["eval/loss"]
    for other in (None, {**lora, "rank": 3}, {**lora, "targets": ["v_proj"]}, {**lora, "alpha": 5}):
        with pytest.raises(UserError, match=r"lora: .*rank: 2, alpha: 4, targets: \[down_proj, v_proj\].*merge: true"):
            run(tmp_path / "other", tmp_path / "first/model", data, **fields, lora=other)


def shipped(name):
    return load_recipe(ROOT / f"configs/{name}.yaml").stages


def test_the_shipped_configs_have_the_papers_figures():
    """Of DeepSeek-R1, arXiv 2501.12948: sections 2.3 and 2.4; a cosine to a tenth is the default."""
    whole = shipped("deepseek-v3")
    final = whole["sft_all"]
    assert (final.model, final.epochs, final.batch, final.lr, final.longest) == ("base", 2, 64, 5e-6, 32_768)
    assert (final.schedule, final.final_share) == ("cosine", 0.1)
    everything = whole["all_scenarios"]
    assert (everything.sampling.temperature, everything.sampling.max_tokens) == (0.7, 32_768)
    assert abs(everything.steps * everything.minibatches - 1_700) <= 8
    assert whole["zero"].steps * whole["zero"].minibatches == 10_400
    assert (whole["zero"].lr, whole["zero"].kl, whole["reasoning"].clip_high) == (3e-6, 0.001, 10)
    small, large = shipped("qwen2.5-1.5b"), shipped("qwen2.5-7b-8gpu")
    for stages in (small, large):
        assert (stages["cold_start"].batch, stages["cold_start"].final_share) == (64, 0.1)
        assert stages["zero"].questions / stages["zero"].minibatches == 32
        assert stages["zero"].samples == 16
    assert small["cold_start"].lr == 1e-4
    assert small["zero"].reference_every * small["zero"].minibatches == 400
    assert {config.compute.processes for config in small.values()} == {1}
    trained = [large[name] for name in ("zero", "cold_start", "reasoning")]
    assert {(config.deepspeed, config.compute.processes) for config in trained} == {("zero3", 8)}
    assert large["zero"].rollout.engine == "vllm"
    assert large["zero"].importance_cap == 2


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen2.5-7b-8gpu", "deepseek-v3"])
def test_a_config_that_never_ran_says_so(name):
    assert "NEVER" in (ROOT / f"configs/{name}.yaml").read_text().split("extends:")[0]
