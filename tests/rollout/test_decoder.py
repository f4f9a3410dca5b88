"""The lean decoder and its flights against transformers' own forward pass: every family, budget, prefix and refill."""

import random

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stages.problems.toy import save_toy_tokenizer
from stages.rollout.decoding import batching, decoder
from stages.rollout.decoding.prefix_sharing import Lines
from stages.rollout.decoding.token_sampling import choose, nucleus
from stages.rollout.protocol import Request, Sampling
from stages.rollout.torch_engine import TorchRollout
from tests.conftest import tiny_llama

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, attention_bias=True, rope_parameters=ROPE | {"original_max_position_embeddings": 8})
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=10)),
}
PROMPTS = [(6, 20, 7, 21), (6, 20, 8), (6, 20, 9, 10, 21, 11, 24), (6, 20, 7, 22)]  # two tokens in common


def spread(model):
    """Weights that make logits far from uniform, norms and biases that are not what they begin as."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def requests(samples=3):
    return [Request(str(n), ids, samples) for n, ids in enumerate(PROMPTS)]


def sampled(model, tokenizer, sampling, tokens=32768, **given):
    return TorchRollout(model, tokenizer, tokens).sample(requests(**given), sampling, seed=0, purpose="t", step=0)


def plain_logp(model, prompt, ids, temperature=1.0):
    logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_decoded_as_transformers_would(name, tokenizer):
    model = spread(MODELS[name]())
    assert not decoder.unsupported(model)
    for prompt, (greedy,) in zip(
        PROMPTS, sampled(model, tokenizer, Sampling(temperature=0, max_tokens=24), samples=1), strict=True
    ):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, attention_mask=torch.ones(1, len(prompt))
        )
        assert greedy.ids == expected[0, len(prompt) :].tolist()
    for prompt, answers in zip(PROMPTS, sampled(model, tokenizer, Sampling(temperature=0.8, max_tokens=24)), strict=True):
        for answer in answers:
            with torch.no_grad():
                expected = plain_logp(model, prompt, answer.ids, 0.8)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 60, 130, 100_000])
@pytest.mark.parametrize("room", [1, 5, 64])
def test_the_budget_changes_who_flies_together_and_not_the_answers(budget, room, tokenizer, monkeypatch):
    model = tiny_llama()  # float64: no rounding may turn a draw
    expected = sampled(model, tokenizer, Sampling(max_tokens=40))
    assert len({len(a.ids) for answers in expected for a in answers}) > 4
    monkeypatch.setattr(batching, "FIRST_ROOM", room)
    held = []
    resize = batching.Flight._resize

    def watched(self, kept, fresh):
        resize(self, kept, fresh)
        own = self._lines.own
        held.append((own.both.shape[2], own.both.shape[2] * own.tokens))

    monkeypatch.setattr(batching.Flight, "_resize", watched)
    found = sampled(model, tokenizer, Sampling(max_tokens=40), tokens=budget)
    assert [[(a.ids, a.finish) for a in answers] for answers in found] == [[(a.ids, a.finish) for a in e] for e in expected]
    for rows, tokens in held:
        assert rows <= 1 or tokens <= budget
    assert len(held) > 1 or room == 64, "the room is made once"
    if budget in (1, 100_000):
        assert max(rows for rows, _ in held) == (12 if budget == 100_000 else 1)


def test_the_common_beginning_of_prompts_is_computed_once(tokenizer, monkeypatch):
    computed = []
    prefill = decoder.LeanDecoder.prefill

    def counted(self, prompts, prefix=None):
        computed.append(sum(map(len, prompts)) - (0 if prefix is None else prefix.tokens * len(prompts)))
        return prefill(self, prompts, prefix)

    monkeypatch.setattr(decoder.LeanDecoder, "prefill", counted)
    sampled(tiny_llama(), tokenizer, Sampling(max_tokens=3))
    assert sum(computed) == 2 + sum(len(p) - 2 for p in PROMPTS)


def test_identical_prompts_and_prompts_that_begin_another(tokenizer):
    model = tiny_llama()
    asked = [Request("a", (6, 20, 7), 2), Request("b", (6, 20, 7), 2), Request("c", (6, 20), 2)]
    rollout = TorchRollout(model, tokenizer)
    together = rollout.sample(asked, Sampling(max_tokens=12), seed=0, purpose="t", step=0)
    for request, answers in zip(asked, together, strict=True):
        (alone,) = rollout.sample([request], Sampling(max_tokens=12), seed=0, purpose="t", step=0)
        assert [a.ids for a in answers] == [a.ids for a in alone]
    assert [a.ids for a in together[0]] != [a.ids for a in together[1]]


def test_each_request_is_told_of_once_when_it_is_complete(tokenizer):
    told = {}
    rollout = TorchRollout(tiny_llama(), tokenizer, 150)
    found = rollout.sample(requests(4), Sampling(max_tokens=30), seed=0, purpose="t", step=0, done=told.setdefault)
    assert told == dict(enumerate(found))
    assert list(told) != sorted(told), "the shortest comes first"


def test_waiting_answers_take_the_places_of_finished_ones(tokenizer, monkeypatch):
    steps = []
    step = decoder.LeanDecoder.step

    def counted(self, tokens, *given):
        steps.append(len(tokens))
        return step(self, tokens, *given)

    monkeypatch.setattr(decoder.LeanDecoder, "step", counted)
    answers = sampled(tiny_llama(), tokenizer, Sampling(max_tokens=40), tokens=28 + 8 * 40, samples=16)
    wanted = sum(len(a.ids) - 1 for group in answers for a in group)
    # Few of the eight places are empty on average, though answers are of very unequal lengths.
    assert wanted / (len(steps) * 8) > 0.7


NEARLY_GREEDY = Sampling(temperature=0.08, max_tokens=20)


@pytest.fixture(scope="module")
def sampled_one_by_one(tokenizer):
    """Sixteen answers to each prompt, each sampled in a batch of its own."""
    model = tiny_llama()
    return [
        [sampled_alone(model, tokenizer, NEARLY_GREEDY, request, number) for number in range(request.samples)]
        for request in requests(16)
    ]


@pytest.mark.parametrize("budget", [100_000, 300])
def test_answers_that_are_the_same_so_far_are_computed_as_one(budget, tokenizer, sampled_one_by_one, monkeypatch):
    steps = []
    step = decoder.LeanDecoder.step

    def counted(self, tokens, *given):
        steps.append(len(tokens))
        return step(self, tokens, *given)

    alone = sampled_one_by_one
    monkeypatch.setattr(decoder.LeanDecoder, "step", counted)
    found = sampled(tiny_llama(), tokenizer, NEARLY_GREEDY, tokens=budget, samples=16)
    assert [[a.ids for a in answers] for answers in found] == [[a.ids for a in answers] for answers in alone]
    for answers, expected in zip(found, alone, strict=True):
        for one, other in zip(answers, expected, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-9)
    tokens = sum(len(a.ids) - 1 for answers in found for a in answers)
    distinct = {(n, tuple(a.ids[:end])) for n, answers in enumerate(found) for a in answers for end in range(1, len(a.ids))}
    assert len(distinct) < 0.7 * tokens, "not much is shared"
    if budget == 100_000:  # all fly together: each beginning is computed once
        assert sum(steps) == len(distinct)
    else:
        assert len(distinct) <= sum(steps) < tokens


def sampled_alone(model, tokenizer, sampling, request, number):
    one = Request(request.key, request.prompt_ids, 1, number)
    return TorchRollout(model, tokenizer).sample([one], sampling, seed=0, purpose="t", step=0)[0][0]


class Writing:
    """A decoder whose keys and values are the tokens themselves."""

    weight = torch.zeros(1)

    def cache(self, texts, tokens):
        return decoder.Cache(torch.full((2, 2, texts, 1, tokens, 1), -1.0))

    def step(self, tokens, prompts, own, lengths, width):
        assert width == int(lengths.max()) + 1
        own.both[:, :, torch.arange(len(tokens)), :, lengths] = tokens.float()[:, None, None, None, None]
        return torch.zeros(len(tokens), 3)


@pytest.mark.parametrize("seed", range(10))
def test_a_line_holds_what_its_answers_have(seed):
    rng = random.Random(seed)
    writing = Writing()
    alive = {n: [n % 3, rng.randrange(2)] for n in range(12)}  # prompt, then tokens
    rows = Lines(writing, 12, 40)
    line = dict(zip(alive, rows.begin(*torch.tensor(list(alive.values())).t()).tolist(), strict=True))
    for turn in range(30):
        rows.seat(torch.tensor(list(line.values())), torch.tensor([alive[n][0] for n in line]))
        for n, place in line.items():
            prompt, *tokens = alive[n]
            assert rows.own.both[1, 1, place, 0, : len(tokens) - 1, 0].tolist() == tokens[:-1]
            assert (int(rows.newest[place]), int(rows.lengths[place])) == (tokens[-1], len(tokens) - 1)
            assert int(rows.prompt[place]) == prompt
        assert rows.count == len({tuple(tokens) for tokens in alive.values()})
        rows.step(decoder.Cache(torch.zeros(2, 2, 3, 1, 1, 1)), torch.ones(3, dtype=torch.long))
        for n in [n for n in alive if rng.random() < 0.04 and len(alive) > 1]:
            del alive[n]
        tokens = {n: rng.choice((0, 0, 0, 0, 1)) for n in alive}
        found = rows.follow(torch.tensor([line[n] for n in alive]), torch.tensor([tokens[n] for n in alive]))
        line = dict(zip(alive, found.tolist(), strict=True))
        for n, token in tokens.items():
            alive[n].append(token)
        if turn == 14:
            rows = rows.moved(rows.count + 2, 41)
    none = torch.zeros(0, dtype=torch.long)
    assert rows.follow(none, none).tolist() == [] and rows.count == 0


def test_another_model_takes_the_slow_path_and_says_so(tokenizer):
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = spread(GPTNeoXForCausalLM(GPTNeoXConfig(**shape, bos_token_id=None, eos_token_id=1)))
    with pytest.warns(UserWarning, match="slow path: GPTNeoXForCausalLM is none of LlamaForCausalLM"):
        found = sampled(model, tokenizer, Sampling(max_tokens=20), tokens=90)
    for prompt, answers in zip(PROMPTS, found, strict=True):
        for answer in answers:
            with torch.no_grad():
                expected = plain_logp(model, prompt, answer.ids)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, rtol=0, atol=1e-4)
            assert (answer.finish == "stop") == (answer.ids[-1] == 1)


def test_slow_and_lean_path_draw_the_same(tokenizer, monkeypatch):
    model = tiny_llama()
    expected = sampled(model, tokenizer, Sampling(max_tokens=30, top_p=0.9, stop=("+",)))
    monkeypatch.setattr("stages.rollout.torch_engine.unsupported", lambda _: "a test")
    with pytest.warns(UserWarning, match="a test"):
        found = sampled(model, tokenizer, Sampling(max_tokens=30, top_p=0.9, stop=("+",)), tokens=120)
    assert [[(a.ids, a.text, a.finish) for a in group] for group in found] == [
        [(a.ids, a.text, a.finish) for a in group] for group in expected
    ]


@pytest.mark.parametrize(
    ("change", "reason"), [("act", "activation"), ("window", "window"), ("rope", "rotary"), ("linear", "q_proj")]
)
def test_what_the_lean_decoder_refuses(change, reason):
    model = MODELS["qwen2"]()
    if change == "act":
        model.config.hidden_act = "gelu"
    elif change == "window":
        model.config.layer_types = ["full_attention", "sliding_attention"]
    elif change == "rope":
        model.model.rotary_emb.rope_type = "dynamic"
    else:

        class Other(torch.nn.Linear):
            pass

        model.model.layers[1].self_attn.q_proj = Other(2, 2)
    assert reason in decoder.unsupported(model)


def test_choose_draws_from_the_tempered_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 700) * 3
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    chosen, logp = choose(logits.expand(20_000, -1).clone(), uniform, 0.7, 1.0)
    expected = torch.log_softmax(logits[0] / 0.7, -1)
    torch.testing.assert_close(logp, expected[chosen], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.bincount(chosen, minlength=700) / 20_000, expected.exp(), rtol=0, atol=1e-4)


def test_a_nucleus_wider_than_the_likeliest_is_found_by_sorting(monkeypatch):
    torch.manual_seed(0)
    weights = torch.rand(3, 50)
    expected = nucleus(weights, 0.8)
    monkeypatch.setattr("stages.rollout.decoding.token_sampling.LIKELY", 4)
    torch.testing.assert_close(nucleus(weights, 0.8), expected)
