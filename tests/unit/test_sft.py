"""The stage `sft`: its settings, what it says of documents it leaves out, adapters."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from stages.engine.adapters import adapted, plain_weights
from stages.engine.settings import Lora
from stages.problems.toy import SYMBOLS, VOCABULARY, save_toy_tokenizer
from stages.recipe import load_recipe
from stages.rollout.lean import unsupported
from stages.sft import KIND, SFTConfig
from stages.store.config import semantic, stage_inputs
from stages.store.errors import UserError
from stages.store.folders import StageFolder
from stages.store.stage import Result, StageContext, StopRequest
from stages.tracking.journal import read
from tests.conftest import ROOT, tiny_llama


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


def test_what_is_handed_over_has_the_adapters_merged_in_and_loads_as_any_model(model, tmp_path):
    data = dataset(tmp_path / "data", [(f"{n}+{n + 1}=?", f"{n}{n}{n}") for n in range(6)])
    fields = {
        "lr": 1e-2,
        "epochs": 6,
        "validation": {"count": 2},
        "lora": {"rank": 2, "alpha": 4, "targets": ["v_proj", "down_proj"]},
    }
    result = run(tmp_path / "stage", model, data, **fields)
    assert result.metrics["eval/loss"] < result.metrics["eval/loss_before"]
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (model, tmp_path / "stage/model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.0.{name}.weight" for name in ("self_attn.v_proj", "mlp.down_proj")}
    for name in changed:  # a change of rank 2
        values = torch.linalg.svdvals(after[name] - before[name])
        assert values[1] > 1e-4 and values[2] < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_change_nothing_at_first_and_their_products_are_what_the_plain_weights_lack(tied):
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain, ids = tiny_llama(tied=tied), torch.tensor([[3, 4, 5, 6, 7]])
    model = adapted(tiny_llama(tied=tied), Lora(rank=3, alpha=12), seed=0)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    names = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".lora_")[1][:1] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    weights = dict(plain_weights(model))
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-9, atol=1e-9)
    layer = model.model.layers[1].mlp.up_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (12 / 3)
    torch.testing.assert_close(weights["model.layers.1.mlp.up_proj.weight"], layer.base_layer.weight + product)
    assert not unsupported(plain)


def test_adapters_begin_as_the_seed_says():
    first = [dict(adapted(tiny_llama(), Lora(rank=2), seed=seed).named_parameters()) for seed in (0, 0, 1)]
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first[0][name], first[1][name])
    assert not torch.equal(first[0][name], first[2][name])
    model = tiny_llama()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    adapted(model, Lora(rank=2), seed=0)
    assert torch.equal(torch.rand(1), expected)  # nobody else's random numbers are used


def test_adapters_have_the_format_of_their_weights():
    model = adapted(tiny_llama().bfloat16(), Lora(), seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")
def test_adapters_of_experts_that_are_one_array_are_refused():
    """Their products could not be added to the weights again, so nothing would sample with them."""
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    config = AutoConfig.for_model("qwen3_moe", **size, num_key_value_heads=2, num_experts=4, moe_intermediate_size=16)
    with pytest.raises(UserError, match=r"lora\.targets: experts that are one array cannot have adapters; name linear layers"):
        adapted(AutoModelForCausalLM.from_config(config), Lora(), 0)
    named = adapted(AutoModelForCausalLM.from_config(config), Lora(targets=("q_proj",)), 0)
    assert {name for name, _ in plain_weights(named)} == set(AutoModelForCausalLM.from_config(config).state_dict())


def test_an_adapter_for_no_layer_is_refused():
    with pytest.raises(UserError, match=r"lora\.targets: the model has no layer `qproj`; its linear layers are .*q_proj"):
        adapted(tiny_llama(), Lora(targets=("v_proj", "qproj")), seed=0)


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
