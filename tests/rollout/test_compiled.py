"""The compiled decoding step against PyTorch's, in float64 where rounding would hide a mistake; and how it is built."""

import os
import stat

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from stages.contract.errors import UserError
from stages.kernels import build
from stages.kernels.build import NoCompiler
from stages.rollout.decoding import compiled
from stages.rollout.decoding.compiled import CompiledDecoder
from stages.rollout.decoding.decoder import LeanDecoder, Prompts
from stages.rollout.decoding.token_sampling import choose
from stages.rollout.torch_engine import TorchRollout
from tests.requirements import needs
from tests.rollout.test_decoder import SHAPE, spread
from tests.rollout.test_decoder import tokenizer as tokenizer

pytestmark = needs("compiler")

# Rows of weights that are no multiple of 6, five queries on one head: nothing comes out even.
ODD = SHAPE | {
    "hidden_size": 85,
    "intermediate_size": 301,
    "head_dim": 40,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "vocab_size": 67,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | {"hidden_size": 32})),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**ODD, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"hidden_size": 64}, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**ODD)),
}
PROMPTS = [(6, 20, 7, 21), (6, 20, 9, 10, 21, 11, 24), (3,)]


SOURCE = 'extern "C" int one() { return 1; }\n'
"""Built in place of the kernels where the tests are of the building: they take 5 s."""


def model_of(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.6 / parameter.shape[-1] ** 0.5 * 4 if parameter.dim() == 2 else 1 + noise / 3)
    return model.eval()


def decoded(decoder, rows, steps=5, threads=2):
    """Logits of some steps of rows that began at different times, (steps, R, V), and the keys and values they left."""
    before, dtype = torch.get_num_threads(), decoder.weight.dtype
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)  # PyTorch's own sums depend on it
            cache, _ = decoder.prefill(PROMPTS)
            torch.set_num_threads(threads)
            of_row = torch.tensor([(row * 7 + row // 3) % 3 for row in rows])
            prompts = Prompts(cache, torch.tensor(list(map(len, PROMPTS))), of_row)
            own = decoder.cache(len(rows) + len(rows) % 3, 12)  # it may have room for more
            lengths = torch.tensor([row % 4 for row in rows])
            if isinstance(decoder, CompiledDecoder):  # it never looks at what is hidden
                own.both.fill_(torch.nan)
                for number, prompt in enumerate(PROMPTS):
                    cache.both[:, :, number, :, len(prompt) :] = torch.nan
            for place, row in enumerate(rows):  # what the rows saw before, the same for a row wherever it sits
                noise = torch.randn(own.both[:, :, 0, :, :4].shape, generator=torch.Generator().manual_seed(row))
                own.both[:, :, place, :, : row % 4] = noise[..., : row % 4, :].to(dtype)
            found = []
            for step in range(steps):
                tokens = torch.tensor([(row * 5 + step * 11) % 31 for row in rows])
                found.append(decoder.step(tokens, prompts, own, lengths, int(lengths.max()) + 1))
                lengths = lengths + 1
            return torch.stack(found), own.both.nan_to_num()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "rows"), [*((name, 37) for name in MODELS), *(("qwen3", rows) for rows in (1, 16, 25))])
def test_a_step_is_as_near_to_float64_as_that_of_pytorch(name, rows):
    exact = decoded(LeanDecoder(model_of(name).double(), 64), range(rows))
    usual = decoded(LeanDecoder(model_of(name), 64), range(rows))
    found = decoded(CompiledDecoder(model_of(name), 64), range(rows))
    assert exact[0].std() > 0.3, "logits that say something"
    for ours, theirs, right in zip(found, usual, exact, strict=True):  # logits; keys and values
        assert (theirs - right).abs().max() < 1e-4
        assert (ours - right).abs().max() < 3 * (theirs - right).abs().max()


@pytest.mark.parametrize("name", ["biases", "qwen3"])
def test_a_row_is_the_same_to_the_bit_whoever_flies_along_and_however_many_threads_there_are(name):
    decoder = CompiledDecoder(model_of(name), 64)
    together, _ = decoded(decoder, range(37))
    torch.testing.assert_close(decoded(decoder, range(37), threads=1)[0], together, rtol=0, atol=0)
    torch.testing.assert_close(decoded(decoder, range(37), threads=3)[0], together, rtol=0, atol=0)
    alone, _ = decoded(decoder, [36])
    torch.testing.assert_close(alone[:, 0], together[:, 36], rtol=0, atol=0)
    some, _ = decoded(decoder, [20, 3])
    torch.testing.assert_close(some, together[:, [20, 3]], rtol=0, atol=0)


def test_scores_far_apart_neither_overflow_nor_vanish():
    model = model_of("qwen3")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm.weight *= 60
    found, usual = decoded(CompiledDecoder(model, 64), range(5))[0], decoded(LeanDecoder(model, 64), range(5))[0]
    exact = decoded(LeanDecoder(model.double(), 64), range(5))[0]
    assert (found - exact).abs().max() < 2 * (usual - exact).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("change", "reason"), [("double", "float64"), ("half", "bfloat16"), ("heads", "6 numbers"), ("strided", "q_proj")]
)
def test_what_it_leaves_to_pytorch(change, reason, tokenizer):
    model = model_of("llama")
    if change in ("double", "half"):
        model = model.to(torch.float64 if change == "double" else torch.bfloat16)
    elif change == "heads":
        model = spread(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    else:
        layer = model.model.layers[1].self_attn.q_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert reason in compiled.unsupported(model)
    assert type(TorchRollout(model, tokenizer)._decoder(8)) is LeanDecoder
    with pytest.raises(UserError, match=reason):
        TorchRollout(model, tokenizer, decoder="compiled")._decoder(8)


def test_the_setting_says_which_decoder(tokenizer):
    model = model_of("llama")
    kinds = {name: type(TorchRollout(model, tokenizer, decoder=name)._decoder(8)) for name in ("auto", "compiled", "torch")}
    assert kinds == {"auto": CompiledDecoder, "compiled": CompiledDecoder, "torch": LeanDecoder}


def fresh_cache(monkeypatch, folder, script):
    """An empty cache folder, a compiler that is this script, and a short source for it."""
    (folder / "sources").mkdir(exist_ok=True)
    (folder / "sources" / "one.cpp").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", folder / "sources")
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    build.built.cache_clear()


@pytest.fixture(autouse=True)
def _forget():
    yield
    build.built.cache_clear()


def test_it_is_built_once_and_again_when_the_compiler_changes(tmp_path, monkeypatch):
    real = build.compiler()
    for version in (1, 1, 2):
        script = f'echo "$@" >> {tmp_path}/calls\n[ "$1" = --version ] && echo {version} && exit\nexec {real} "$@"'
        fresh_cache(monkeypatch, tmp_path, script)
        build.built()
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert len([call for call in calls if "kernels-" in call]) == 2
    assert len(list((tmp_path / "cache" / "r1-pipeline").glob("*.so"))) == 2


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999], ids=["empty", "header", "half", "end missing"])
def test_library_that_was_not_written_whole_is_built_again(tmp_path, monkeypatch, left):
    """As a full disk, or a lost power supply, leaves it. Loaded, it would end the process with a bus error."""
    fresh_cache(monkeypatch, tmp_path, "")
    monkeypatch.delenv("CXX")
    run, commands = build._said, []
    monkeypatch.setattr(build, "_said", lambda command: commands.append(command) or run(command))
    build.built()
    (library,) = (tmp_path / "cache" / "r1-pipeline").glob("*.so")
    whole = library.read_bytes()
    library.unlink()  # this process has mapped the file
    library.write_bytes(whole[: int(len(whole) * left)])
    build.built.cache_clear()
    assert build.built().one() == 1
    assert library.read_bytes() == whole
    assert len([command for command in commands if "-o" in command]) == 2


def test_a_compiler_that_fails_is_told_of_in_one_line_and_sampling_goes_on(tmp_path, monkeypatch, tokenizer):
    fresh_cache(monkeypatch, tmp_path, '[ "$1" = --version ] && exit\necho "no such header" >&2\nexit 3')
    model = model_of("llama")
    with pytest.raises(NoCompiler, match="status 3: no such header"):
        build.built()
    with pytest.warns(UserWarning, match=r"not compiled, so sampling is slower: .*no such header; install one"):
        assert type(TorchRollout(model, tokenizer)._decoder(8)) is LeanDecoder
    with pytest.raises(UserError, match=r"cannot be compiled: .*no such header"):
        TorchRollout(model, tokenizer, decoder="compiled")._decoder(8)
    monkeypatch.setenv("CXX", os.devnull)
    build.built.cache_clear()
    with pytest.raises(NoCompiler, match="no C\\+\\+ compiler"):
        build.built()


@pytest.mark.parametrize("vocabulary", [1, 7, 32, 256, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_compiled_draw_is_that_of_sampling(vocabulary, temperature):
    """The same tokens for the same random numbers, but for a draw in thousands that rounding turns; no token of weight 0."""
    torch.manual_seed(0)
    decoder = CompiledDecoder(model_of("llama"), 64)
    logits = torch.randn(5000, vocabulary) * 3
    logits[:, 1::5] = -torch.inf
    logits[:, 2::5] -= 300
    uniform = torch.rand(5000).clamp(max=1 - 2**-24)
    uniform[:3] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    expected, _ = choose(logits.double(), uniform.double(), temperature, 1.0)
    found, logp = decoder.chooser(temperature, 1.0)(logits.clone(), uniform)
    assert (found != expected).sum() <= 2
    assert not ((found % 5 == 1) | (found % 5 == 2)).any()
    exact = (logits.double() / temperature).log_softmax(-1).gather(-1, found[:, None]).squeeze(-1)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=2e-6)


def test_the_compiled_draw_follows_the_distribution():
    torch.manual_seed(0)
    decoder, logits = CompiledDecoder(model_of("llama"), 64), torch.randn(1, 700) * 3
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    chosen, _ = decoder.chooser(0.7, 1.0)(logits.expand(20_000, -1), uniform)
    expected = torch.softmax(logits[0] / 0.7, -1)
    torch.testing.assert_close(torch.bincount(chosen, minlength=700) / 20_000, expected, rtol=0, atol=1e-4)


def test_logits_that_are_no_numbers_give_a_token_and_no_log_probability():
    token, logp = CompiledDecoder(model_of("llama"), 64).chooser(1.0, 1.0)(torch.full((2, 9), torch.nan), torch.rand(2))
    assert token.tolist() == [0, 0]
    assert logp.isnan().all()
