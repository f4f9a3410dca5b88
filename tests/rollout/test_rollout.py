"""The torch engine against transformers' own generate, and the draw against the distribution it inverts."""

import random

import pytest
import torch

from stages.engine.packing.pack import Text, alone
from stages.engine.scorer import TokenScorer
from stages.problems.episode import Episode, Group, Problem, Reward
from stages.problems.toy import save_toy_tokenizer
from stages.rollout.decoding.token_sampling import draw, nucleus, uniforms
from stages.rollout.protocol import Request, Sampling
from stages.rollout.records import read_groups, write_groups
from stages.rollout.torch_engine import Finishing, TorchRollout, end_tokens
from tests.conftest import tiny_llama

PROMPTS = {"a": (6, 20, 7, 21), "b": (8,), "c": (9, 20, 10, 21, 11, 24)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    tokenizer = save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return TorchRollout(tiny_llama().float(), tokenizer, tokens=150)


def requests(samples=1):
    return [Request(key=key, prompt_ids=ids, samples=samples) for key, ids in PROMPTS.items()]


def test_greedy_equals_transformers_generate(engine):
    answers = engine.sample(requests(), Sampling(temperature=0, max_tokens=20), seed=0, purpose="t", step=0)
    for (_, ids), (answer,) in zip(PROMPTS.items(), answers, strict=True):
        expected = engine.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=20
        )
        assert answer.ids == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree_on_log_probabilities(engine, temperature):
    answers = engine.sample(requests(4), Sampling(temperature=temperature, max_tokens=20), seed=1, purpose="t", step=0)
    scorer = TokenScorer(engine.model)
    lengths = set()
    for ids, completions in zip(PROMPTS.values(), answers, strict=True):
        for completion in completions:
            (packed,) = alone([Text(ids, completion.ids)])
            logp, _ = scorer(packed, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), logp.detach().float(), rtol=0, atol=1e-4)
            wrong, _ = scorer(packed, temperature + 0.3)
            assert (wrong - torch.tensor(completion.logprobs)).abs().max() > 1e-2
            lengths.add(len(completion.ids))
    assert len(lengths) > 3, "answers of many lengths must have left the batch at different times"


def test_a_sample_does_not_depend_on_who_else_is_sampled(engine):
    sampling = Sampling(max_tokens=12)
    together = engine.sample(requests(6), sampling, seed=2, purpose="t", step=3)
    alone = engine.sample([Request("b", PROMPTS["b"], samples=2, first_sample=4)], sampling, seed=2, purpose="t", step=3)
    assert [c.ids for c in alone[0]] == [c.ids for c in together[1][4:]]
    other = engine.sample(requests(6), sampling, seed=2, purpose="t", step=4)
    assert [c.ids for c in other[1]] != [c.ids for c in together[1]]


def test_an_answer_ends_at_any_declared_end_token_or_at_the_limit(engine):
    engine.model.generation_config.eos_token_id = [1, 7]
    try:
        several = TorchRollout(engine.model, engine.tokenizer)
    finally:
        engine.model.generation_config.eos_token_id = 1
    assert several.end_tokens == {1, 7}
    for completion in (
        c for answer in several.sample(requests(8), Sampling(max_tokens=9), seed=0, purpose="t", step=0) for c in answer
    ):
        assert not {1, 7} & set(completion.ids[:-1])
        assert (completion.finish == "stop") == (completion.ids[-1] in {1, 7})
        assert completion.finish == "stop" or len(completion.ids) == 9
        assert "<eos>" not in completion.text


@pytest.mark.parametrize("stop", [("</answer>",), ("é",), (" fin",), ("ok ",), ("</answer>", "\n\n")])
def test_only_a_token_that_may_finish_a_stop_text_is_looked_at(stop):
    """Over random tokens of bytes and pieces: a text that has the stop where it had none before ends with such a token."""
    import tokenizers

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([f"a{text}b{text} </a> > é è" for text in (*stop, "</answer>\n\n fin ok ")] * 9, vocab_size=300)
    chosen, found, rng = Finishing(made, stop), 0, random.Random(0)
    for _ in range(400):
        ids = [rng.randrange(made.get_vocab_size()) for _ in range(8)]
        if rng.random() < 0.5:
            ids[2:2] = made.encode(rng.choice(stop)).ids
        before = ""
        for end in range(1, len(ids) + 1):
            text = made.decode(ids[:end])
            if any(text.count(s) > before.count(s) for s in stop):
                assert chosen[ids[end - 1]]
                found += 1
            before = text
    assert found > 100
    if stop == ("</answer>",):  # pieces that end so, and bytes that are no character alone
        assert [made.decode([t]) for t in range(made.get_vocab_size()) if chosen[t] and "\ufffd" not in made.decode([t])] != []
        assert all(">" in made.decode([t]) or "\ufffd" in made.decode([t]) for t in range(300) if chosen[t])


def test_end_tokens_of_a_model_without_any(engine):
    class Config:
        eos_token_id = None

    class Bare:
        generation_config = config = Config()

    assert end_tokens(Bare(), engine.tokenizer) == {1}


def test_a_stop_text_ends_the_answer_and_stays_in_it(engine):
    sampling = Sampling(max_tokens=30, stop=["+", "</answer>"])
    answers = [c for a in engine.sample(requests(8), sampling, seed=5, purpose="t", step=0) for c in a]
    stopped = [c for c in answers if c.finish == "stop" and c.ids[-1] != 1]
    assert stopped
    for completion in stopped:
        assert completion.text.endswith(("+", "</answer>"))
        assert completion.text.count("+") + completion.text.count("</answer>") == 1


def test_draw_inverts_the_cumulative_distribution_by_hand():
    probabilities = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).repeat(6, 1)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.9999999])
    assert draw(probabilities, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_draw_over_a_large_vocabulary_has_the_right_frequencies():
    torch.manual_seed(0)
    weights = torch.zeros(1000)
    weights[[3, 255, 256, 700, 999]] = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    counts = torch.bincount(draw(weights.expand(20_000, -1), uniform), minlength=1000) / 20_000
    torch.testing.assert_close(counts, weights, rtol=0, atol=2e-4)


def test_nucleus_keeps_the_token_that_crosses():
    found = nucleus(torch.tensor([[0.5, 0.1, 0.3, 0.1]]), 0.6)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0, 0.3, 0.0]]))


def test_uniforms_depend_on_identity_alone():
    torch.manual_seed(1)
    first = uniforms(5, 0, "train", 3, "p1", 0)
    torch.manual_seed(2)
    assert uniforms(5, 0, "train", 3, "p1", 0).equal(first)
    assert uniforms(9, 0, "train", 3, "p1", 0)[:5].equal(first)
    assert not uniforms(5, 0, "train", 3, "p1", 1).equal(first)
    many = uniforms(20_000, 0, "x")
    assert many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)


def test_records_come_back_as_they_were(tmp_path):
    problem = Problem(id="p", question="q?", answer="3", source="s")
    episode = Episode(problem, 1, "q?", [5, 6], [7, 1], [-0.1, -1 / 3], "<think>", "length")
    scored = Episode(problem, 2, "q?", [5, 6], [7], [-2e-8], "x", "stop", Reward(1.1, {"accuracy": 1.0}, "right"))
    groups = [Group(problem, [episode, scored])]
    write_groups(tmp_path / "g.parquet", groups)
    assert read_groups(tmp_path / "g.parquet") == groups
