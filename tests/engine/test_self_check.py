"""The trainer's self-check: which path a model takes, what it finds, and that it leaves no trace."""

import dataclasses

import pytest
import torch

from stages.contract.errors import UserError
from stages.engine import scorer as scorer_module
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing import pack as packed_module
from stages.engine.packing.pack import Text, micro_batches, row
from stages.engine.scorer import TokenScorer, TokenValueScorer, ValueScorer
from stages.engine.self_check import check_engine, check_prompts, check_scorer, check_texts, sampled_length, training_path
from stages.engine.settings import Training
from stages.supervised.train import accumulate
from tests.small_models import small_model

SHARED = [17, 4, 33, 8, 25, 60, 41, 12, 9, 50, 3, 28, 14, 6, 39, 22, 31, 45]
PROMPTS = [[*SHARED, 5, 7, 11], [*SHARED, 20, 2], [40, 41, 42, 43]]
PACKED = ["llama", "granite", "cohere", "gpt2", "opt", "phi", "mistral", "deepseek_v3", "deepseek_v3_narrow"]
ROWS = ["gemma2", "lfm2", "qwen3_next", "granite_hybrid", "falcon", "mamba"]


def own_logp(model, text):
    """(T,) by `model(ids).logits` of the text alone."""
    ids, count = torch.tensor([[*text.prompt, *text.completion]]), len(text.completion)
    logp = model(ids, use_cache=False).logits[0, -count - 1 : -1].log_softmax(-1)
    return logp.gather(1, torch.tensor(text.completion)[:, None])[:, 0]


@pytest.mark.parametrize("family", [*PACKED, *ROWS])
def test_path_is_rows_exactly_where_packed_texts_see_each_other(family):
    model = small_model(family)
    scorer = TokenScorer(model)
    check = check_scorer(scorer, check_texts(model, PROMPTS))
    assert check.path == ("packed" if family in PACKED else "rows")
    assert check.metrics["check/trained_logprob_difference"] <= check.tolerance == 1e-4
    assert bool(check.warning) == (family in ROWS)
    # Other texts than those of the check, some of them longer.
    texts = [Text(SHARED[:n], [*SHARED[n:], 1]) for n in (3, 9)] + [Text(PROMPTS[1], [9, 30, 1]), Text(PROMPTS[1], [8, 1])]
    texts = [Text(t.prompt[:8], t.completion[:8]) if family == "mistral" else t for t in texts]  # its window is 16
    batches = micro_batches(texts, 1000) if check.path == "packed" else [row([t], [n]) for n, t in enumerate(texts)]
    with torch.no_grad():
        for batch in batches:
            logp = scorer(batch)[0]
            for number in batch.owner.unique().tolist():
                expected = own_logp(model, texts[number])
                torch.testing.assert_close(logp[batch.owner == number], expected, rtol=0, atol=1e-4)


def test_bidirectional_model_is_refused_in_one_line():
    model = small_model("bert")
    with pytest.raises(UserError, match=r"`BertLMHeadModel` cannot be used: .* nats with later tokens") as error:
        training_path(model, check_texts(model, PROMPTS))
    assert "\n" not in str(error.value)


def test_model_whose_own_forward_fails_is_refused(monkeypatch):
    model = small_model("llama")

    def broken(**_):
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(UserError, match=r"its own forward pass fails \(no kernel\)"):
        TokenScorer(model).probe()


def test_weights_that_give_no_numbers_are_refused():
    model = small_model("llama")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        training_path(model, check_texts(model, PROMPTS))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_head_scale_wrong_by_one_percent_is_found(monkeypatch, dtype):
    model = small_model("llama").to(getattr(torch, dtype))
    own = scorer_module.own_logits
    monkeypatch.setattr(scorer_module, "own_logits", lambda *given: 1.01 * own(*given))
    check = check_scorer(TokenScorer(model), check_texts(model, PROMPTS))
    assert check.differences["packed"] > 10 * check.tolerance
    assert check.path == "rows"  # through the whole model at once: right again
    assert check.differences["rows"] <= check.tolerance
    assert "nats away from its own forward pass" in check.warning


def leak(monkeypatch):
    """Plant a leak: every prompt but the first begins one position too early, at its neighbour's last token."""
    layout = packed_module._layout

    def leaking(groups, tokens, prefix):
        moved = [dataclasses.replace(group, prompt=range(group.prompt[0] - 1, group.prompt[-1] + 1)) for group in groups[1:]]
        return layout([groups[0], *moved], tokens, prefix)

    monkeypatch.setattr(packed_module, "_layout", leaking)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:]], ids=["shared prefix", "no prefix"])
def test_leak_of_one_position_is_found(monkeypatch, dtype, prompts):
    model = small_model("llama").to(getattr(torch, dtype))
    texts = check_texts(model, prompts)
    assert check_scorer(TokenScorer(model), texts).path == "packed"
    leak(monkeypatch)
    check = check_scorer(TokenScorer(model), texts)
    assert check.path == "rows"
    assert check.differences["packed"] > check.tolerance * (1 if dtype == "bfloat16" else 1000)
    assert check.differences["rows"] <= check.tolerance


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_weights_are_packed_by_a_tolerance_of_their_own_rounding(dtype):
    model = small_model("llama").to(getattr(torch, dtype))
    check = check_scorer(TokenScorer(model), check_texts(model, PROMPTS))
    assert check.path == "packed"
    assert 0.02 <= check.tolerance < 0.5


def test_tolerance_is_tighter_in_float64():
    tolerances = [
        check_scorer(TokenScorer(model), check_texts(model, PROMPTS)).tolerance
        for model in (small_model("llama"), small_model("llama").double())
    ]
    assert tolerances == [1e-4, 1e-5]


@pytest.mark.parametrize("family", ["llama", "lfm2", "gemma2"])
def test_check_leaves_no_trace_in_the_engine(family):
    engine = Engine(TokenScorer(small_model(family)), Training(), "zero0", "cpu")
    weights = [p.clone() for p in engine.model.parameters()]
    before, training = torch.random.get_rng_state(), [m.training for m in engine.model.modules()]
    checks = [check_engine(engine, check_texts(engine.model, PROMPTS)) for _ in range(2)]
    assert checks[0].metrics == checks[1].metrics
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [m.training for m in engine.model.modules()] == training
    assert all(p.grad is None for p in engine.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, engine.model.parameters(), strict=True))
    assert engine.state().keys() == {"optimizer_steps", *(f"{name}|weight" for name, _ in engine.scorer.named_parameters())}


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "granite_hybrid", "falcon", "mamba", "gemma2", "llama"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_step_by_rows_has_the_gradient_of_plain_autograd(family, recomputed):
    texts = [Text(p, c) for p in PROMPTS for c in ([5, 6, 13, 2, 9, 1], [44, 1])] + [Text(PROMPTS[2], [44, 1])]
    plain = small_model(family).double()
    total = sum(len(t.completion) for t in texts)
    (-sum(own_logp(plain, t).sum() for t in texts) / total).backward()
    settings = Training(gradient_checkpointing=recomputed)
    try:
        engine = Engine(TokenScorer(small_model(family).double()), settings, "zero0", "cpu")
    except UserError as error:
        assert recomputed and "gradient checkpointing" in str(error)
        return
    check_engine(engine, check_texts(engine.model, PROMPTS))
    engine.path = "rows"  # a Llama too
    loss, tokens = accumulate(engine, texts, 64)
    expected = -sum(float(own_logp(plain, t).detach().sum()) for t in texts) / total
    assert loss == pytest.approx(expected, rel=1e-5)
    # The same text twice is computed once.
    assert tokens == sum(len(t.prompt) + len(t.completion) - 1 for t in texts[:-1])
    for (name, one), other in zip(engine.model.named_parameters(), plain.named_parameters(), strict=True):
        expected = other[1].grad
        if expected is None:
            continue
        torch.testing.assert_close(one.grad, expected, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_rows_and_packed_texts_give_a_llama_the_same_update():
    texts = [Text(p, c) for p in PROMPTS for c in ([5, 6, 13, 2, 9, 1], [44, 1])]
    gradients = []
    for path in ("packed", "rows"):
        engine = Engine(TokenScorer(small_model("llama")), Training(), "zero0", "cpu")
        engine.path = path
        loss, _ = accumulate(engine, texts, 1000)
        gradients.append((loss, torch.cat([p.grad.flatten() for p in engine.model.parameters()])))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("made", [ValueScorer, TokenValueScorer])
def test_value_of_a_prefix_by_rows_is_of_the_decoder_on_the_text_alone(made):
    model = small_model("lfm2")
    scorer = made(model).eval()
    scorer.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    text = Text(PROMPTS[0], [5, 6, 1])
    with torch.no_grad():
        values = scorer(row([text], [0]))[-1]
        states = model.get_decoder()(input_ids=torch.tensor([[*text.prompt, *text.completion]])).last_hidden_state[0]
        expected = scorer.head(states[-4:-1]).squeeze(-1)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_value_model_whose_decoder_cannot_be_run_alone_is_refused():
    scorer = TokenValueScorer(small_model("llama"))
    scorer.whole = True
    with pytest.raises(UserError, match="which a value model needs"):
        scorer.probe()


def test_only_texts_longer_than_the_window_are_rows():
    engine = Engine(TokenScorer(small_model("mistral")), Training(), "zero0", "cpu")  # its window is 16
    check = check_engine(engine, check_texts(engine.model, PROMPTS))
    assert (check.path, engine.scorer.window) == ("packed", 16)
    texts = [Text([5, 6], [7, 8, 1]), Text(PROMPTS[0], [9, 1]), Text([5, 6], [9] * 15), Text([5, 6], [9] * 14 + [8])]
    batches = engine.micro_batches(texts, 1000)
    owners = {tuple(batch.owner.unique().tolist()): batch.layout is None for batch in batches}
    assert owners == {(0, 2, 3): False, (1,): True}
    with torch.no_grad():
        for batch in batches:
            logp = engine.score(batch)[0]
            for number in batch.owner.unique().tolist():
                torch.testing.assert_close(
                    logp[batch.owner == number], own_logp(engine.model, texts[number]), rtol=0, atol=1e-5
                )
    with pytest.raises(UserError, match="window of 16"):
        engine.score(packed_module.alone([texts[1]])[0])


@pytest.mark.parametrize("limit", [5, 9, 16, 44])
def test_texts_of_the_check_fit_the_window(limit):
    model = small_model("mistral", sliding_window=limit)
    texts = check_texts(model, PROMPTS, [[3] * 30, [4]])
    assert all(len(t.prompt) + len(t.completion) <= limit for t in texts)
    assert len({tuple(t.prompt) for t in texts}) == 2
    assert all(len(t.completion) > sampled_length(model) for t in texts[:2])
    assert training_path(model, texts) == "packed"


def test_texts_of_the_check_are_the_stages_own_tokens():
    model = small_model("llama")
    long = [list(range(3, 63)), [*range(3, 60), 2, 2, 2]]
    first, second = check_prompts(model, [long[0], long[0], long[1]])
    assert first == [*range(3, 19), *range(55, 63)]
    assert second == [*range(3, 19), *range(55, 60), 2, 2, 2]
    texts = check_texts(model, long, [[9, 9, 1], [8]])
    assert [t.prompt for t in texts] == [first, first, second]
    assert [t.completion[:3] for t in texts[:2]] == [[9, 9, 1], [8, *texts[1].completion[1:3]]]
    assert [len(t.completion) for t in texts] == [12, 11, 10]
    alone = check_prompts(model, [[4, 5, 6]])
    assert alone == ([4, 5, 6], [5, 6, 4])
