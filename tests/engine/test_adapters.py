"""Low-rank adapters: what they compute in 16 bits, in the trainer and in every sampler, and how they are written and read."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from stages.contract.errors import UserError
from stages.engine import scorer
from stages.engine.adapter_folder import read_adapter, write_adapter
from stages.engine.adapters import PARTS, AdaptedLinear, adapted, adapters, merged, plain_weights, same_shape
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.pack import Text, micro_batches
from stages.engine.settings import Lora, Training
from stages.problems.toy import save_toy_tokenizer
from stages.rollout import torch_engine
from stages.rollout.decoding import compiled
from stages.rollout.decoding.decoder import LeanDecoder, Prompts, unsupported
from stages.rollout.protocol import Request, Sampling
from stages.rollout.torch_engine import TorchRollout, load_model, load_tokenizer
from tests.conftest import tiny_llama

VOCABULARY = 512
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def small(kind: str = "llama") -> nn.Module:
    """A random bfloat16 model whose weights have the usual size, 0.02."""
    torch.manual_seed(0)
    made = Qwen2ForCausalLM(Qwen2Config(**SMALL)) if kind == "qwen2" else LlamaForCausalLM(LlamaConfig(**SMALL))
    return to_bfloat16(made)


def to_bfloat16(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def set_b(model: nn.Module, size: float) -> nn.Module:
    """Give every B random entries of that size."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape) * size)
    return model


# --- what arrives of a small update ---


@pytest.mark.parametrize(("size", "rows"), [(1e-5, 2**15), (1e-4, 2**13), (1e-3, 2**11)])
def test_adapted_linear_in_bfloat16_adds_its_whole_product_to_the_output(size, rows):
    """As a share of the exact product: 1 within four standard errors and 1 %; added behind the rounding, next to nothing."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False)
    nn.init.normal_(base.weight, std=0.02)
    layer = AdaptedLinear(base.bfloat16(), 16, 32.0)
    with torch.no_grad():
        layer.lora_B.normal_().mul_(size)
    x = torch.randn(rows, 64).bfloat16()
    weight, exact = layer.weight.double(), x.double() @ layer.delta().double().t()
    plain = x.double() @ weight.t()
    by_columns = torch.addmm(layer.factors()[1] @ (layer.factors()[0] @ x.t()), layer.weight, x.t()).t()
    late = linear(x, layer.weight) + linear(linear(x, layer.factors()[0]), layer.factors()[1])
    folded = linear(x, (layer.weight + layer.delta()).bfloat16())
    with torch.no_grad():
        for product in (layer(x), by_columns):
            error = product.double() - plain - exact
            share = 1 + float((error * exact).sum() / exact.square().sum())
            uncertain = 4 * float((error * exact).square().sum().sqrt() / exact.square().sum())
            assert abs(share - 1) < 0.01 + uncertain
            assert uncertain < 0.03
        if size == 1e-5:
            for product in (late, folded):
                assert float(((product.double() - plain) * exact).sum() / exact.square().sum()) < 0.5


def shares(logits, reference, size, texts):
    """What of the update of log-probabilities arrives, and its standard error: `logits(adapted or not, ids)` in bfloat16."""
    parts = []
    for number in range(texts):
        ids = torch.randint(2, VOCABULARY, (512, 2), generator=torch.Generator().manual_seed(number))
        exact = reference(size, ids) - reference(0.0, ids)
        seen = logits(size, ids).double().log_softmax(-1) - logits(0.0, ids).double().log_softmax(-1)
        parts += zip((seen * exact).sum(-1).tolist(), exact.square().sum(-1).tolist(), strict=True)
    total = sum(norm for _, norm in parts)
    share = sum(product for product, _ in parts) / total
    spread = sum((product - share * norm) ** 2 for product, norm in parts) ** 0.5 / total
    return share, spread


@pytest.mark.parametrize(("size", "texts"), [(1e-3, 1), (1e-4, 1), pytest.param(1e-5, 16, marks=pytest.mark.slow)])
def test_small_updates_arrive_in_the_log_probs_of_trainer_and_decoder(size, texts):
    """Against float64, of two-token texts. Merged in bfloat16, a tenth arrives of entries of B at 1e-5 and 92 % at 1e-4."""
    models = {b: set_b(adapted(small(), Lora(), 0), b) for b in (0.0, size)}
    exact = {b: small() for b in models}
    for b, model in exact.items():
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
        for name, layer in adapters(models[b]).items():
            model.get_submodule(name).weight.data += layer.lora_B.double() @ layer.lora_A.double() * layer.scale

    def reference(b, ids):
        return exact[b](ids).logits[:, -1].log_softmax(-1)

    def trained(b, ids):
        return models[b](ids).logits[:, -1]

    def decoded(b, ids):
        decoder, rows = LeanDecoder(models[b], 4), len(ids)
        cache, _ = decoder.prefill([(token,) for token in ids[:, 0].tolist()])
        prompts = Prompts(cache, torch.ones(rows, dtype=torch.long), torch.arange(rows))
        return decoder.step(ids[:, 1], prompts, decoder.cache(rows, 1), torch.zeros(rows, dtype=torch.long), 1)

    with torch.inference_mode():
        for logits in (trained, decoded):
            share, error = shares(logits, reference, size, texts)
            assert abs(share - 1) < 0.01 + 4 * error
            assert error < 0.03


@pytest.mark.parametrize(
    ("zero", "path"),
    [("zero0", "lean"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("zero0", "plain"), ("zero3", "lean")))],
)
def test_sampler_and_trainer_differ_no_more_in_bfloat16_than_without_an_adapter(zero, path, monkeypatch, tmp_path):
    if path == "plain":
        monkeypatch.setattr(torch_engine, "unsupported", lambda _: "of the test")
    save_toy_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    engine = Engine(scorer.TokenScorer(adapted(small(), Lora(), 0)), Training(), zero, "cpu")
    prompts = [torch.randint(2, 20, (6 + n % 3,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(8)]
    requests = [Request(key=str(n), prompt_ids=tuple(ids), samples=8) for n, ids in enumerate(prompts)]
    mismatch = {}
    for size in (0.0, 1e-5, 1e-4):
        with gathered(engine, zero):
            set_b(engine.model, size)
        rollout = TorchRollout(engine.sampling_model(), Untranslated(tokenizer))
        with nullcontext() if path == "lean" else pytest.warns(UserWarning, match="slow path: of the test"):
            answers = rollout.sample(requests, Sampling(max_tokens=16), seed=0, purpose="test", step=0)
        flat = [(prompt, answer) for prompt, group in zip(prompts, answers, strict=True) for answer in group]
        (packed,) = micro_batches([Text(prompt, answer.ids) for prompt, answer in flat], 10**6, 0, 1)
        with torch.no_grad():
            trainer = engine.score(packed)[0]
        sampler = torch.cat([torch.tensor(flat[owner][1].logprobs) for owner in packed.owner.unique_consecutive().tolist()])
        ratio = trainer - sampler
        mismatch[size] = float((ratio.exp() - 1 - ratio).mean())
    assert 0 < mismatch[0.0] < 1e-5
    assert max(mismatch.values()) <= 1.5 * mismatch[0.0]


def gathered(engine, zero):
    import deepspeed

    parameters = [layer.lora_B for layer in adapters(engine.model).values()]
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=zero == "zero3")


class Untranslated:
    """A tokenizer for a vocabulary that it does not have."""

    def __init__(self, tokenizer):
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = self.pad_token_id = None
        self.all_special_ids, self.added_tokens_decoder = (), {}

    def __call__(self, texts, add_special_tokens=True):
        return SimpleNamespace(input_ids=[[] for _ in texts])

    def convert_ids_to_tokens(self, ids):
        return ["" for _ in ids] if isinstance(ids, list) else ""

    def decode(self, ids, **_):
        return ""

    def batch_decode(self, rows, **_):
        return ["" for _ in rows]


# --- gradients and state, whatever the ZeRO stage ---


def losses(model, texts):
    """The loss of each text by the model's own forward pass, one at a time."""
    for text in texts:
        ids = torch.tensor([[*text.prompt, *text.completion]])
        logp = model(ids).logits[0].float().log_softmax(-1) if model.dtype != torch.float64 else None
        logp = model(ids).logits[0].log_softmax(-1) if logp is None else logp
        start = len(text.prompt)
        yield -logp[start - 1 : -1].gather(1, ids[0, start:, None]).sum()


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_gradients_of_adapters_on_bfloat16_weights_are_those_of_float64(zero):
    from deepspeed.utils import safe_get_full_grad

    generator = torch.Generator().manual_seed(0)
    texts = [Text([5, 6, 7], torch.randint(2, VOCABULARY, (9 + n,), generator=generator).tolist()) for n in range(12)]
    exact = set_b(adapted(small(), Lora(), 0), 1e-3)
    for parameter in exact.parameters():
        parameter.data = parameter.data.double()
    sum(losses(exact, texts)).backward()
    model = set_b(adapted(small(), Lora(), 0), 1e-3)
    engine = Engine(scorer.TokenScorer(model), Training(max_grad_norm=1e9), zero, "cpu")
    batches = micro_batches(texts, 10**6, 0, 1)
    engine.accumulate([lambda p=packed: -engine.score(p)[0].sum() for packed in batches])
    for name, parameter in model.named_parameters():
        if name.endswith(PARTS):
            gradient, expected = safe_get_full_grad(parameter), exact.get_parameter(name).grad
            assert gradient.dtype == torch.float32
            assert torch.linalg.norm(gradient.double() - expected) <= 0.03 * torch.linalg.norm(expected)
    before = {name: value.clone() for name, value in engine.state().items() if name.endswith("|weight")}
    engine.step(1e-5)
    after = engine.state()
    # Adam's first step moves every entry by the learning rate: far below what 8 bits of an entry of A at 0.1 could hold.
    for name, value in before.items():
        moved = (after[name] - value).abs()
        assert moved.median() == pytest.approx(1e-5, rel=0.05)
    with engine.whole_weights() as whole:
        weights = dict(small().named_parameters())
        assert all(torch.equal(whole.get_parameter(name), weight) for name, weight in weights.items())


def test_sampling_copies_keep_the_angles_of_rotary_embeddings_in_float32():
    """Cast to bfloat16, as `model.to(dtype)` does, they would turn late tokens by other angles than the trainer's."""
    model = set_b(adapted(small(), Lora(rank=2), 0), 1.0)
    engine = Engine(scorer.TokenScorer(model), Training(), "zero0", "cpu")
    copy = engine.sampling_model(apart=True)
    assert copy is not model
    assert copy.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(copy.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    for name, parameter in model.named_parameters():
        assert torch.equal(copy.get_parameter(name), parameter)
        assert copy.get_parameter(name).dtype == (torch.float32 if name.endswith(PARTS) else torch.bfloat16)
    set_b(model, 2.0)
    assert not torch.equal(copy.model.layers[0].mlp.up_proj.lora_B, model.model.layers[0].mlp.up_proj.lora_B)
    assert engine.sampling_model() is model


# --- decoders ---


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("decoder", [LeanDecoder, compiled.CompiledDecoder])
def test_decoders_compute_adapted_layers_as_transformers_does(kind, decoder):
    model = small(kind)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model = set_b(adapted(model, Lora(rank=4), 0), 0.5)
    assert not unsupported(model)
    ids = torch.randint(2, VOCABULARY, (5, 3))
    with torch.inference_mode():
        made, rows = decoder(model, 8), len(ids)
        cache, first = made.prefill([tuple(row) for row in ids[:, :2].tolist()])
        prompts = Prompts(cache, torch.full((rows,), 2), torch.arange(rows))
        second = made.step(ids[:, 2].contiguous(), prompts, made.cache(rows, 1), torch.zeros(rows, dtype=torch.long), 1)
        expected = model(ids).logits
        without = merged(set_b(same_shape(model), 0.0))(ids).logits
    torch.testing.assert_close(first, expected[:, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, expected[:, 2], rtol=1e-4, atol=1e-5)
    assert (expected - without).abs().max() > 0.1


# --- what they are, and where ---


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_change_nothing_at_first_and_plain_weights_add_their_products(tied):
    plain, ids = tiny_llama(tied=tied), torch.tensor([[3, 4, 5, 6, 7]])
    model = adapted(tiny_llama(tied=tied), Lora(rank=3, alpha=12), seed=0)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    names = {name.rpartition(".")[2] for name in adapters(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name[-7:] for name, p in model.named_parameters() if p.requires_grad} == set(PARTS)
    set_b(model, 1.0)
    weights = dict(plain_weights(model))
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-9, atol=1e-9)
    layer = model.model.layers[1].mlp.up_proj
    product = layer.lora_B @ layer.lora_A * (12 / 3)
    torch.testing.assert_close(weights["model.layers.1.mlp.up_proj.weight"], layer.weight + product)
    torch.testing.assert_close(merged(model)(ids).logits, plain(ids).logits, rtol=1e-9, atol=1e-9)
    assert not adapters(model)


def test_adapters_begin_as_the_seed_says():
    first = [dict(adapted(tiny_llama(), Lora(rank=2), seed=seed).named_parameters()) for seed in (0, 0, 1)]
    name = "model.layers.0.mlp.up_proj.lora_A"
    assert torch.equal(first[0][name], first[1][name])
    assert not torch.equal(first[0][name], first[2][name])
    assert first[0][name].abs().max() <= 1 / 16**0.5  # as a linear layer of 16 inputs begins
    model = tiny_llama()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    adapted(model, Lora(rank=2), seed=0)
    assert torch.equal(torch.rand(1), expected)  # nobody else's random numbers are used


def test_adapters_are_float32_beside_weights_of_16_bits_and_so_is_a_value_head():
    model = adapted(tiny_llama().bfloat16(), Lora(), seed=0)
    assert {(name[-7:] in PARTS, p.dtype) for name, p in model.named_parameters()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }
    shared = scorer.TokenValueScorer(model)
    assert shared.head.weight.dtype == torch.float32
    (packed,) = micro_batches([Text([3, 4], [5, 6, 1])], 100, 0, 1)
    assert [part.dtype for part in shared(packed)] == [torch.float32] * 3


def test_adapters_of_experts_that_are_one_array_are_refused():
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    config = AutoConfig.for_model("qwen3_moe", **size, num_key_value_heads=2, num_experts=4, moe_intermediate_size=16)
    with pytest.raises(UserError, match=r"lora\.targets: experts that are one array cannot have adapters; name linear layers"):
        adapted(AutoModelForCausalLM.from_config(config), Lora(), 0)
    named = adapted(AutoModelForCausalLM.from_config(config), Lora(targets=("q_proj",)), 0)
    assert {name for name, _ in plain_weights(named)} == set(AutoModelForCausalLM.from_config(config).state_dict())


def test_an_adapter_for_no_layer_is_refused():
    with pytest.raises(UserError, match=r"lora\.targets: the model has no layer `qproj`; its linear layers are .*q_proj"):
        adapted(tiny_llama(), Lora(targets=("v_proj", "qproj")), seed=0)
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=32)
    with pytest.raises(UserError, match="lora: the model has no linear layer but its head; train all weights: `lora: null`"):
        adapted(AutoModelForCausalLM.from_config(config), Lora(), 0)


# --- on disk ---


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of bfloat16 weights with an adapter beside them, and the model itself."""
    folder = tmp_path_factory.mktemp("adapted")
    model = set_b(adapted(small(), Lora(rank=4, targets=("q_proj", "down_proj")), 0), 1e-2)
    merged(same_shape(model)).save_pretrained(folder)
    base = dict(small().named_parameters())
    save_file({name: weight.detach() for name, weight in base.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    write_adapter(model, folder)
    return folder, model


def test_a_folder_is_read_as_weights_and_adapter_in_place(written):
    folder, model = written
    again, ids = load_model(folder), torch.randint(2, VOCABULARY, (2, 7))
    assert {name: p.dtype for name, p in again.named_parameters()} == {name: p.dtype for name, p in model.named_parameters()}
    assert torch.equal(again(ids).logits, model(ids).logits)
    continued = adapted(again, Lora(rank=4, targets=("q_proj", "down_proj")), seed=9)
    assert {name for name, p in continued.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.endswith(PARTS)
    }
    assert torch.equal(continued.model.layers[0].mlp.down_proj.lora_A, model.model.layers[0].mlp.down_proj.lora_A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peft_computes_the_same_from_the_folder(written, dtype):
    from peft import PeftModel

    folder, _ = written
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), folder / "adapter").to(dtype)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    read_adapter(own, folder)
    with torch.inference_mode():
        logits = theirs(ids).logits
        torch.testing.assert_close(own(ids).logits, logits, rtol=1e-5, atol=1e-6)
        # What another program loads of the weights alone is another model.
        assert (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits - logits).abs().max() > 1e-2
        torch.testing.assert_close(merged(own, torch.float32).to(dtype)(ids).logits, logits, rtol=1e-4, atol=1e-5)


def cut(folder):
    file = folder / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def without_config(folder):
    (folder / "adapter/adapter_config.json").unlink()


def one_tensor_less(folder):
    file = folder / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)


def configured(**changes):
    def change(folder):
        file = folder / "adapter/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "adapter cannot be loaded"),
        (without_config, "No such file"),
        (one_tensor_less, "is on one side only"),
        (configured(r=5), r"is \(4, .*\), not \(5, "),
        (configured(r="many"), "invalid literal"),
        (configured(target_modules=["model.norm"]), "model.norm"),
        (configured(use_dora=True), "`use_dora` is not supported"),
        (configured(peft_type="IA3"), "only LoRA"),
    ],
)
def test_a_damaged_or_foreign_adapter_is_refused_by_name(written, tmp_path, damage, says):
    shutil.copytree(written[0], tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=says) as caught:
        load_model(tmp_path / "model")
    assert caught.value.where == str(tmp_path / "model/adapter")
