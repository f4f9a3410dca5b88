"""The check of the engine that samples: what it finds, when the transformers fallback takes over, what is refused."""

import pytest
import torch

from stages.contract.errors import UserError
from stages.engine.deepspeed_engine import Engine
from stages.engine.scorer import TokenScorer
from stages.engine.settings import Training
from stages.problems.toy import SYMBOLS, VOCABULARY, save_toy_tokenizer
from stages.rl.start_check import check_policy
from stages.rollout import torch_engine
from stages.rollout.decoding.decoder import LeanDecoder
from stages.rollout.protocol import Completion, Sampling
from stages.rollout.sampled_check import check_rollout
from stages.rollout.torch_engine import TorchRollout
from tests.small_models import small_model

QUESTIONS = ["3+4=?", "7*2+1=?", "2+2=?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def toy(family="llama"):
    end = SYMBOLS.index("<eos>")
    return small_model(family, vocab_size=VOCABULARY, eos_token_id=end)


def check(rollout, tmp_path, temperature=1.0):
    return check_rollout(rollout, QUESTIONS, Sampling(temperature=temperature, max_tokens=16), tmp_path, "cpu")


@pytest.fixture(params=["auto", "torch"])
def decoder(request):
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.02, 0.0])
def test_sampled_log_probabilities_are_the_models_own(tokenizer, tmp_path, decoder, temperature):
    rollout = TorchRollout(toy(), tokenizer, decoder=decoder)
    found = check(rollout, tmp_path, temperature)
    assert 0 < found.difference < found.tolerance == 1e-4
    assert found.warning == rollout.fallback == ""


def test_check_draws_no_random_number_of_the_stage(tokenizer, tmp_path):
    rollout = TorchRollout(toy(), tokenizer)
    before = torch.random.get_rng_state()
    assert check(rollout, tmp_path) == check(rollout, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in rollout.model.parameters())


def test_fast_decoder_with_a_wrong_head_scale_is_replaced(tokenizer, tmp_path, monkeypatch):
    logits = LeanDecoder._logits
    monkeypatch.setattr(LeanDecoder, "_logits", lambda self, x: 1.01 * logits(self, x))
    rollout = TorchRollout(toy(), tokenizer, decoder="torch")
    found = check(rollout, tmp_path)
    assert found.difference <= 1e-4
    assert found.warning.startswith("sampling by the fast decoder is ")
    assert found.warning.endswith("the transformers fallback samples instead, which is slower")
    with pytest.warns(UserWarning, match="takes the slow path: sampling by the fast decoder"):
        assert check(rollout, tmp_path).difference <= 1e-4


def test_fast_decoder_that_fails_is_replaced(tokenizer, tmp_path, monkeypatch):
    def broken(*_):
        raise AttributeError("no such projection")

    monkeypatch.setattr(LeanDecoder, "prefill", broken)
    rollout = TorchRollout(toy(), tokenizer, decoder="torch")
    assert "fails (no such projection)" in check(rollout, tmp_path).warning
    assert rollout.fallback


def test_engine_that_differs_on_every_path_is_refused_in_one_line(tokenizer, tmp_path, monkeypatch):
    sample = TorchRollout.sample

    def shifted(self, *given, **options):
        groups = sample(self, *given, **options)
        return [[Completion(c.ids, [x + 0.01 for x in c.logprobs], c.text, c.finish) for c in group] for group in groups]

    monkeypatch.setattr(TorchRollout, "sample", shifted)
    with pytest.raises(UserError, match=r"`LlamaForCausalLM` cannot be used: .* is 0\.01 nats away") as error:
        check(TorchRollout(toy(), tokenizer), tmp_path)
    assert "\n" not in str(error.value)


def test_mistakes_of_the_user_are_not_taken_for_failures(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_engine.compiled, "unsupported", lambda _: "no compiler")
    with pytest.raises(UserError, match="decoding step cannot be compiled"):
        check(TorchRollout(toy(), tokenizer, decoder="compiled"), tmp_path)


def test_texts_that_do_not_fit_the_positions_are_refused_before_sampling(tokenizer, tmp_path, monkeypatch):
    model = small_model("gpt2", vocab_size=VOCABULARY, max_position_embeddings=48)
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("something was computed"))
    with pytest.raises(UserError, match=r"sampling.max_tokens: the longest prompt \(7 tokens\) and 64 more do not fit"):
        check_rollout(TorchRollout(model, tokenizer), QUESTIONS, Sampling(max_tokens=64), tmp_path, "cpu")


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2"])
def test_policy_is_checked_on_both_sides_at_once(tokenizer, family):
    engine = Engine(TokenScorer(toy(family)), Training(), "zero0", "cpu")
    rollout = TorchRollout(engine.sampling_model(), tokenizer)
    found = check_policy(engine, rollout, [rollout.encode(q) for q in QUESTIONS], 0.8)
    assert found.metrics.keys() == {
        "check/trained_logprob_difference",
        "check/tolerance",
        "check/sampled_logprob_difference",
        "check/sampled_tolerance",
    }
    assert found.metrics["check/trained_logprob_difference"] <= 1e-4
    assert found.metrics["check/sampled_logprob_difference"] <= 1e-4
    assert found.warnings == []
    assert engine.path == "packed"


def test_sampler_that_falls_back_in_training_is_compared_again(tokenizer, monkeypatch):
    logits = LeanDecoder._logits
    monkeypatch.setattr(LeanDecoder, "_logits", lambda self, x: 1.01 * logits(self, x))
    engine = Engine(TokenScorer(toy()), Training(), "zero0", "cpu")
    rollout = TorchRollout(engine.sampling_model(), tokenizer, decoder="torch")
    found = check_policy(engine, rollout, [rollout.encode(q) for q in QUESTIONS], 1.0)
    assert found.metrics["check/sampled_logprob_difference"] <= 1e-4
    assert len(found.warnings) == 1
    assert rollout.fallback
    assert engine.path == "packed"
