"""The cost model's arithmetic, by numbers worked out by hand or published; its fit; and the bars that it has to clear."""

import json
from pathlib import Path

import pytest
import yaml

from flows.cli.app import parser
from flows.plan.cost import Place, stage_cost
from flows.plan.counts import Counts
from flows.plan.shapes import model_shapes
from stages.contract.errors import UserError
from stages.costs.adapters import adapter_weights
from stages.costs.amounts import ADAM_TRAFFIC, Sampled, Texts, packed_texts, pass_amounts, sample_amounts
from stages.costs.devices import PLAN, cpu_device, gpu_device, gpus, rates_of, shipped
from stages.costs.fit import Measured, Span, fitted, left_out, predicted
from stages.costs.memory import training_memory
from stages.costs.shape import Shape, shape_of
from stages.costs.steps import Loop, dealt, decode_steps, rows_in_flight, spread_lengths, train_spans
from stages.recipe.resolve import load_recipe
from tests.bench.update import flops

MODELS = yaml.safe_load((PLAN / "models.yaml").read_text())
V3, QWEN, SMOL = "deepseek-ai/DeepSeek-V3-Base", "Qwen/Qwen2.5-7B", "HuggingFaceTB/SmolLM2-135M"


def shape(name: str) -> Shape:
    return shape_of(MODELS[name], name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [(SMOL, 134_515_008), ("Qwen/Qwen2.5-1.5B", 1_543_714_304), (QWEN, 7_615_616_512), (V3, 671_026_404_352)],
)
def test_parameters_are_those_of_the_model(name: str, parameters: int) -> None:
    """The dense ones are safetensors' own counts; V3's report says 671e9."""
    assert shape(name).parameters == parameters


def test_a_mixture_of_experts_works_with_a_part_of_its_weights() -> None:
    v3 = shape(V3)
    assert v3.active == pytest.approx(37e9, rel=0.02)  # the report's figure
    assert v3.touched(1) == pytest.approx(v3.body + v3.head, rel=1e-6)  # one row goes through its own experts alone
    assert v3.touched(10_000) == pytest.approx(v3.parameters - v3.head, rel=1e-6)  # all, but for the embedding
    assert v3.touched(8) < v3.touched(32) < v3.touched(128)


def test_bytes_of_a_token_of_context() -> None:
    assert shape(QWEN).context_bytes(2) == 28 * 2 * 4 * 128 * 2  # 57,344: keys and values of 4 heads of 128
    assert shape(V3).context_bytes(2) == 61 * (512 + 64) * 2  # 70,272: compressed
    assert shape(SMOL).context_bytes(4) == 30 * 2 * 3 * 64 * 4


def test_gpt2s_own_names_are_read_and_its_weights_counted_within_a_percent() -> None:
    config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "vocab_size": 50257}
    count = shape_of(config, "gpt2").parameters
    assert count == 50257 * 768 + 12 * 12 * 768**2 + 25 * 768  # head and embedding in one, 4 + 8 h² a layer, norms
    assert count == pytest.approx(124_439_808, rel=0.01)  # as published; positions and biases are not counted


def test_config_of_several_models_has_the_shape_of_its_language_model() -> None:
    text = {**MODELS[V3], "vocab_size": 7}
    assert shape_of({"model_type": "both", "text_config": text}, "both") == shape_of(text, "text")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="hidden_size"):
        shape_of({}, "config.json")


def test_an_update_takes_what_the_bench_counts() -> None:
    """tests/bench/update.py counts the same operations, but for norms and with exact micro-batches."""
    config = MODELS[SMOL]
    recorded = [{"prompt": [0] * 50, "answers": [{"ids": [0] * n} for n in (30, 64, 7)]} for _ in range(2)]
    texts = packed_texts([(50, [30, 64, 7])] * 2, 1024)
    mine = pass_amounts(shape(SMOL), texts, Texts(), 4)["product_flop"]
    assert mine == pytest.approx(flops(config, recorded), rel=1e-3)
    assert texts.tokens == 2 * (50 + 29 + 63 + 6)
    assert texts.predicted == 2 * 101


def test_minibatches_compute_a_shared_prompt_again() -> None:
    one, four = (
        train_spans(shape(SMOL), 4, [(100, [50] * 8)], Loop(minibatches=n, readings=0))["update"]["product_flop"]
        for n in (1, 4)
    )
    head = 3 * 2 * shape(SMOL).head * 400
    # Tokens: 100 + 8 × 49 = 492 against 4 × 100 + 8 × 49 = 792; attention and head hardly change.
    assert (four - head) / (one - head) == pytest.approx(792 / 492, rel=0.01)
    optimizer = train_spans(shape(SMOL), 4, [(100, [50] * 8)], Loop(minibatches=4))["optimizer"]["optimizer_bytes"]
    assert optimizer == 4 * ADAM_TRAFFIC * 134_515_008


def test_zero_spreads_the_states_as_its_paper_says() -> None:
    """arXiv 1910.02054, figure 1: 7.5e9 weights on 64 GPUs: 31.4, 16.6 and 1.88 GB, with gradients of 2 bytes. Here of 4:

    7.5 × (2 + 4 + 12 / 64), 7.5 × (2 + 16 / 64), 7.5 × 18 / 64. In float32 there is no master weight: without ZeRO 7.5 × 16.
    """
    seven = Shape(1, 0, 1, 1, 1, 1, 7_500_000_000 - 1, tied=True)
    assert seven.parameters == 7_500_000_000
    for zero, item, expected in ((0, 2, 46.41), (1, 2, 46.41), (2, 2, 16.88), (3, 2, 2.109), (0, 4, 120.0)):
        found = training_memory(seven, zero=zero, processes=64, item=item, micro_tokens=1)
        assert (found.weights + found.gradients + found.optimizer) / 1e9 == pytest.approx(expected, rel=0.01)
    offloaded = training_memory(seven, zero=2, processes=64, item=2, micro_tokens=1, offload=True)
    assert offloaded.optimizer == 0
    assert offloaded.offloaded == pytest.approx(12 * 7.5e9 / 64)


@pytest.mark.parametrize(("zero", "peak"), [(0, 4.153e9), (1, 4.494e9), (2, 4.407e9), (3, 5.615e9)])
def test_memory_is_within_15_percent_of_what_was_measured(zero: int, peak: float) -> None:
    """Bytes above the imports, SmolLM2-135M on two processes; tests/plan/test_memory.py measures again."""
    found = training_memory(shape(SMOL), zero=zero, processes=2, item=4, micro_tokens=1024, touched_only=True)
    assert found.total == pytest.approx(peak, rel=0.15)


def test_adapters_are_as_many_as_peft_says() -> None:
    """Known from peft's own count (`trainable params`) for rank 16 on every linear layer."""
    assert adapter_weights(shape(QWEN), 16, "all-linear") == 40_370_176
    assert adapter_weights(shape(QWEN), 8, ["q_proj", "v_proj"]) == 28 * 8 * (3584 + 3584 + 3584 + 512)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "deepseek_v3", "qwen3_moe"])
def test_adapters_are_those_that_training_places(kind: str) -> None:
    import transformers

    from stages.engine.adapters import adapted
    from stages.engine.settings import Lora

    own = {
        "llama": "num_key_value_heads: 2",
        "qwen3": "num_key_value_heads: 2, head_dim: 32",
        "qwen3_moe": "num_key_value_heads: 2, head_dim: 32, num_experts: 4, moe_intermediate_size: 16",
        "deepseek_v3": "num_key_value_heads: 4, n_routed_experts: 4, n_group: 1, topk_group: 1, num_experts_per_tok: 2,"
        " moe_intermediate_size: 16, first_k_dense_replace: 1, q_lora_rank: 24, kv_lora_rank: 16, qk_rope_head_dim: 8,"
        " qk_nope_head_dim: 16, v_head_dim: 16",
    }
    size = "hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 64"
    config = transformers.AutoConfig.for_model(kind, **yaml.safe_load(f"{{{size}, {own[kind]}}}"))
    targets = {
        "qwen3_moe": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "deepseek_v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    }.get(kind, "all-linear")
    model = adapted(transformers.AutoModelForCausalLM.from_config(config), Lora(rank=4, targets=targets), 0)
    placed = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_weights(shape_of(config.to_dict(), kind), 4, targets) == placed


def test_adapters_that_cannot_be_are_refused_as_training_refuses_them() -> None:
    with pytest.raises(UserError, match=r"lora\.targets: experts that are one array .*kv_b_proj, o_proj"):
        adapter_weights(shape(V3), 16, "all-linear")
    with pytest.raises(UserError, match=r"lora\.targets: the model has no layer `qproj`"):
        adapter_weights(shape(QWEN), 16, ["qproj"])


def test_with_adapters_only_they_have_gradients_and_moments() -> None:
    """7e9 weights in bfloat16 and 40e6 of adapters: 14 GB + 40e6 × (4 + 4 + 8): adapters are float32."""
    seven = Shape(1, 0, 1, 1, 1, 1, 7_000_000_000 - 1, tied=True)
    found = training_memory(seven, zero=0, processes=1, item=2, micro_tokens=1, trained=40e6)
    assert found.weights + found.gradients + found.optimizer == pytest.approx(14e9 + 40e6 * 16)
    spread = training_memory(seven, zero=3, processes=4, item=2, micro_tokens=1, trained=40e6)
    assert spread.weights + spread.gradients + spread.optimizer == pytest.approx((14e9 + 40e6 * 16) / 4)


def test_with_adapters_no_product_is_made_for_the_gradients_of_other_weights() -> None:
    """A layer's product takes 2 operations forward and 2 for its input's gradient; only adapters take 2 more for their own."""
    smol, texts = shape(SMOL), Texts(tokens=100, attended=0, predicted=100, batches=1)
    found = pass_amounts(smol, texts, Texts(), 4, adapters=1_000_000)["product_flop"]
    assert found == pytest.approx(100 * (4 * (smol.body + smol.head) + 6 * 1_000_000))
    again = pass_amounts(smol, texts, Texts(), 4, adapters=1_000_000, recompute=True)["product_flop"]
    assert again == pytest.approx(100 * (6 * (smol.body + smol.head) + 8 * 1_000_000))
    groups = [(100, [50] * 8)]
    whole, low = (train_spans(smol, 4, groups, Loop(processes=2, adapters=a)) for a in (None, 1_000_000))
    assert low["optimizer"]["optimizer_bytes"] == ADAM_TRAFFIC * 1_000_000
    assert low["update"]["exchange_bytes"] / whole["update"]["exchange_bytes"] == pytest.approx(1e6 / 134_515_008)


def test_activations_of_a_llama_layer() -> None:
    """Of a token of SmolLM2 in float32: 30 layers of 10 × 576 + 4 × 192 + 4 × 1,536 numbers."""
    assert shape(SMOL).kept(4) == 30 * (10 * 576 + 4 * 192 + 4 * 1536) * 4
    whole, again = (
        training_memory(shape(SMOL), zero=0, processes=1, item=4, micro_tokens=1024, recompute=r).activations
        for r in (False, True)
    )
    assert again == pytest.approx(30 * 576 * 4 * 1024 + whole / 30, rel=1e-3)


def test_decoding_reads_weights_each_step_and_its_context() -> None:
    work = Sampled(prompts=1, prompt_tokens=10, prompt_attended=55, answers=2, tokens=8, context=100, steps=4)
    found = sample_amounts(shape(SMOL), work, 4)
    smol = shape(SMOL)
    weights = 4 * (smol.body + smol.head) * 4
    assert found["decode_bytes"] == pytest.approx(weights + 100 * smol.context_bytes(4) + 8 * 49152 * 4 * 4)
    assert found["decode_flop"] == pytest.approx(8 * 2 * (smol.body + smol.head) + 100 * 4 * 30 * 576)
    assert found["token_steps"] == 4


def test_lengths_have_their_mean_and_a_long_tail() -> None:
    found = spread_lengths(1000, 200.0, 100_000)
    assert sum(found) / 1000 == pytest.approx(200, rel=0.01)
    assert found[0] == max(found) == pytest.approx(200 * 7.6, rel=0.02)  # −ln(0.0005)
    cut = spread_lengths(1000, 200.0, 256)
    assert sum(cut) / 1000 == pytest.approx(200, rel=0.01)
    assert max(cut) == 256
    groups = dealt(found, 10, 7)
    assert [len(answers) for _, answers in groups] == [100] * 10
    assert groups[0][1][0] == max(found)


def test_steps_of_decoding_wait_for_the_longest() -> None:
    assert decode_steps(16, 50.0, 64, 64) == 64  # all fly at once
    assert decode_steps(128, 50.0, 64, 64) == 64 * 50 / 64 + 64
    assert rows_in_flight([(10, [1] * 4)], 10_000, 64) == 4
    assert rows_in_flight([(40, [1] * 4)] * 100, 7400, 64) == 100  # 10 of the prompt's tokens each, and room for 64


def made(run: str, amounts: dict[str, float], rates: dict[str, float]) -> Measured:
    seconds = sum(rates[name] * value for name, value in amounts.items())
    spans = {"update": Span(seconds=seconds, amounts=amounts), "start": Span(seconds=9.0, amounts={"starts": 1.0})}
    return Measured(run=run, kind="rl", parameters=1, processes=1, facts={}, spans=spans)


def test_a_fit_finds_the_rates_that_made_the_runs() -> None:
    rates = {"product_flop": 2e-11, "passes": 1e-3, "answers": 0.0}
    runs = [
        made(f"{n}", {"product_flop": 1e11 * n, "passes": 100.0 * (n % 3), "answers": 5.0 * n * n}, rates) for n in range(1, 7)
    ]
    found = fitted(runs)
    assert found == pytest.approx({"product_flop": 2e-11, "passes": 1e-3, "answers": 0.0, "starts": 9.0}, rel=1e-6, abs=1e-9)
    assert predicted(found, runs[0], start=True) == pytest.approx(11.1)
    assert all(abs(entry["error"]) < 1e-6 for entry in left_out(runs))


def test_a_run_is_not_blamed_for_what_no_other_tells() -> None:
    rates = {"product_flop": 2e-11, "exchange_bytes": 1e-8}
    runs = [made(f"{n}", {"product_flop": 1e11 * n}, rates) for n in range(1, 5)]
    runs.append(made("sends", {"product_flop": 1e11, "exchange_bytes": 1e8}, rates))
    found = left_out(runs)
    assert [entry["untold"] for entry in found] == [[], [], [], [], ["exchange_bytes"]]
    assert found[-1]["predicted"] == pytest.approx(2.0)
    assert found[-1]["measured"] == pytest.approx(3.0)


def test_each_shipped_run_is_predicted_by_the_others_within_30_percent() -> None:
    runs, errors = shipped(), left_out(shipped())
    assert len(runs) >= 12
    assert not [entry for entry in errors if entry["untold"]]
    assert {entry["kind"] for entry in errors} == {"rl", "sft", "toy_base", "evaluate_model"}
    assert len({run.parameters for run in runs}) == 4
    for name in ("error", "error_with_start"):
        assert max(abs(entry[name]) for entry in errors) < 0.30, [(e["run"], round(e[name], 2)) for e in errors]


@pytest.mark.parametrize("speculation", [1.0, 1.8])
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_r1_zero_on_512_h800_comes_out_within_a_factor_of_2_of_198_hours(factor: float, speculation: float) -> None:
    """The paper's setting: 10,400 updates; the longest answer 32,768 tokens, from update 8,200 on 65,536.

    Nothing was fitted to the 198 hours: the H800's figures are of its data sheet, of V3's training and of DeepEP. Lengths are
    read off the paper's figure of them (some hundred tokens at first, about 10,000 before the limit is raised) and need not be
    exact; nor need one know how much speculative decoding gave (V3's multi-token prediction: 1.8 tokens a step, its report).
    """
    hours = 0.0
    for steps, limit, length in ((512, 32768, 5000.0), (138, 65536, 12000.0)):
        sets = [
            f"stages.zero.steps={steps}",
            f"stages.zero.sampling.max_tokens={limit}",
            "shared.rollout.max_model_length=70000",
        ]
        recipe = load_recipe("configs/deepseek-v3.yaml", sets)
        shapes = model_shapes(recipe, {}, {})
        place = Place(gpu_device("h800", rates_of(Path("none"))[0]), 512, resident=True, speculation=speculation)
        spent = stage_cost("zero", recipe.stages["zero"], shapes["zero"], Counts(recipe, {}, length * factor), place)
        hours += spent.total / 3600
    print(f"lengths x {factor}, {speculation} tokens a step: {hours:.0f} hours")
    assert 198 / 2 < hours < 198 * 2


def test_devices_have_sources_and_unknown_ones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(gpus()) == {"h800", "h100", "a100", "rtx4090"}
    with pytest.raises(SystemExit):
        parser().parse_args(["plan", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in gpus()), "the help, which reads no file, names them"
    with pytest.raises(UserError, match="h900"):
        gpu_device("h900", {})
    v3 = gpu_device("h800", {})
    assert v3.all_to_all(1) == 0
    assert v3.all_to_all(24) == gpus()["h800"].all_to_all[32]
    assert v3.exchange({"exchange_bytes": 160e9}, 8) == pytest.approx(1.0)
    assert v3.exchange({"exchange_bytes": 160e9}, 16) == pytest.approx(3.2)


def test_processes_share_a_cpu_and_not_a_gpu() -> None:
    cpu = cpu_device({"product_flop": 1e-9, "steps": 1.0}, 1e9, "made up")
    assert cpu.seconds({"product_flop": 1e9, "steps": 1.0}, 2) == pytest.approx(3.0)
    gpu = gpu_device("h100", {"steps": 1.0})
    one, spread = (gpu.seconds({"product_flop": 1e15, "steps": 1.0}, 8, width) for width in (1, 4))
    assert (one - 1) / (spread - 1) == pytest.approx(4)


def test_an_own_calibration_is_read_and_a_damaged_one_told(tmp_path: Path) -> None:
    own = tmp_path / "calibration.json"
    runs = [made(f"{n}", {"product_flop": 1e11 * n}, {"product_flop": 3e-11}) for n in range(1, 4)]
    own.write_text(json.dumps({"runs": [run.model_dump() for run in runs]}))
    rates, source = rates_of(own)
    assert rates["product_flop"] == pytest.approx(3e-11)
    assert "3 runs measured on this machine" in source
    own.write_text("{")
    with pytest.raises(UserError, match="not a readable calibration"):
        rates_of(own)
