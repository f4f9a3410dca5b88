"""The compiled attention against the public function with a mask, in float64; and what it leaves to PyTorch."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.engine.packing import attention, attention_cpu
from stages.engine.packing.pack import alone, micro_batches
from stages.engine.scorer import TokenScorer
from stages.kernels import build
from tests.engine.test_packed import copies, flat_gradient, grid, prefixed, texts
from tests.requirements import needs

needs_compiler = needs("compiler")
# S, G, L, C, H, K, d; rows are worked on by six, keys by sixteen, and nothing here comes out even.
SHAPES = [
    (2, 3, 5, 4, 2, 2, 16),
    (3, 4, 33, 12, 4, 4, 32),
    (2, 8, 63, 70, 9, 3, 64),
    (2, 2, 130, 0, 6, 2, 48),
    (1, 1, 1, 1, 1, 1, 16),
]


def given(shape, scale=1.0):
    prompts, answers, length, read, queries, heads, size = shape
    torch.manual_seed(0)
    own, shared = (prompts, answers, length, heads, size), (prompts, read, heads, size)
    tensors = [torch.randn(s) * scale for s in ((*own[:3], queries, size), own, own, shared, shared)]
    lengths = torch.full((prompts,), read)
    if read > 3:
        lengths[-1] -= 3
    return tensors, lengths


def worked_out(work, tensors, dtype, threads=2):
    """Output and gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = [tensor.detach().clone().to(dtype).requires_grad_() for tensor in tensors]
        out = work(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
    finally:
        torch.set_num_threads(before)


def compiled(tensors, lengths, threads=2):
    return worked_out(lambda *x: attention_cpu.joined(*x, lengths, 0.3), tensors, torch.float32, threads)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_all_gradients_are_those_of_one_softmax_with_a_mask(shape):
    tensors, lengths = given(shape)
    hidden = torch.arange(shape[3]) >= lengths[:, None]
    exact = worked_out(lambda *x: attention._masked(*x, hidden, 0.3), tensors, torch.float64)
    for mine, right in zip(compiled(tensors, lengths), exact, strict=True):
        torch.testing.assert_close(
            mine.double(), right, rtol=1e-5, atol=5e-6 * float(right.abs().max()) if right.numel() else 0
        )


@needs_compiler
def test_scores_far_apart_are_as_near_to_float64_as_pytorchs():
    tensors, lengths = given(SHAPES[2], scale=6.0)
    hidden = torch.arange(SHAPES[2][3]) >= lengths[:, None]
    exact = worked_out(lambda *x: attention._masked(*x, hidden, 0.3), tensors, torch.float64)
    usual = worked_out(lambda *x: attention._Joined.apply(*x, hidden, 0.3), tensors, torch.float32)
    for mine, theirs, right in zip(compiled(tensors, lengths), usual, exact, strict=True):
        assert (mine - right).abs().max() <= 3 * (theirs - right).abs().max()


@needs_compiler
def test_the_same_bits_for_any_number_of_threads():
    tensors, lengths = given(SHAPES[2])
    expected = compiled(tensors, lengths, threads=1)
    for threads in (2, 3):
        for mine, right in zip(compiled(tensors, lengths, threads), expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=0)


@needs_compiler
def test_what_memory_held_before_is_never_looked_at(monkeypatch):
    tensors, lengths = given(SHAPES[1])
    expected = compiled(tensors, lengths)
    monkeypatch.setattr(torch, "empty", lambda *size: torch.full(size if isinstance(size[0], int) else size[0], torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    tensors[3][-1, -3:] = tensors[4][-1, -3:] = torch.nan  # behind the shorter prompt's end
    found = compiled(tensors, lengths)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=0)


@needs_compiler
def test_numbers_that_are_none_show():
    tensors, lengths = given(SHAPES[0])
    tensors[0][1, 2, 3] = torch.nan
    out = compiled(tensors, lengths)[0]
    assert out[1, 2, 3].isnan().all()
    assert not out[0].isnan().any()


def model(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    config = LlamaConfig(vocab_size=32, num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0, **shape)
    found = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return found


@needs_compiler
@pytest.mark.parametrize("items", [[*texts(), *grid()], copies(), prefixed()], ids=["texts", "copies", "prefixed"])
@pytest.mark.parametrize("micro", [20, 50, 10_000])
def test_a_models_gradient_is_that_of_one_text_at_a_time_in_float64(micro, items, monkeypatch):
    weights = torch.linspace(-1, 1, len(items), dtype=torch.float64)
    calls = []
    run = attention_cpu._run
    monkeypatch.setattr(attention_cpu, "_run", lambda name, *a, **k: (calls.append(name), run(name, *a, **k)))

    def gradient(scorer, batches):
        for packed in batches:
            logp, _ = scorer(packed)
            (weights[packed.owner] * logp.double()).sum().backward()
        return flat_gradient(scorer.model).double()

    exact = gradient(TokenScorer(model().double()), alone(items))
    assert not calls, "float64 is left to PyTorch"
    found = gradient(TokenScorer(model()), micro_batches(items, micro))
    assert {"attention_forward", "attention_backward"} == set(calls)
    assert torch.linalg.norm(found - exact) / torch.linalg.norm(exact) < 1e-5


def test_what_is_left_to_pytorch(monkeypatch):
    (query, _, _, prompt_key, _), _ = given(SHAPES[0])
    assert attention_cpu.usable(query, prompt_key) == (build.compiler() is not None)
    assert not attention_cpu.usable(query.double(), prompt_key.double())
    assert not attention_cpu.usable(query[..., :8], prompt_key[..., :8])
    monkeypatch.setattr(attention_cpu, "LONGEST", 8)
    assert not attention_cpu.usable(query, prompt_key), "5 and 4 tokens"


def test_without_a_compiler_pytorch_does_it_and_that_is_said(monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda: None)
    build.built.cache_clear()
    attention_cpu._library.cache_clear()
    tensors, lengths = given(SHAPES[0])
    hidden = torch.arange(4) >= lengths[:, None]
    try:
        with pytest.warns(UserWarning, match=r"attention is not compiled.*no C\+\+ compiler"):
            found = worked_out(lambda *x: attention._joined(*x, hidden, 0.3), tensors, torch.float32)
    finally:
        build.built.cache_clear()
        attention_cpu._library.cache_clear()
    exact = worked_out(lambda *x: attention._masked(*x, hidden, 0.3), tensors, torch.float64)
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)
