"""Packed rows against the plain reference: transformers' own forward, one sequence at a time."""

import random

import pytest
import torch

from stages.engine.rows import Text, batch_rows, micro_batches, pack_rows, pad_rows
from stages.engine.scorer import TokenScorer
from stages.store.errors import UserError
from tests.conftest import tiny_llama


def texts(count=7, seed=0):
    rng = random.Random(seed)
    prompts = [[rng.randrange(32) for _ in range(rng.randrange(1, 9))] for _ in range(3)]
    return [
        Text(prompts[i % 3 if i < 3 else i * 3 // count], [rng.randrange(32) for _ in range(rng.randrange(1, 12))])
        for i in range(count)
    ]


def plain_logp(model, text, temperature=1.0):
    """Log-probabilities of the completion by transformers' forward pass over one unpadded sequence."""
    ids = torch.tensor([[*text.prompt, *text.completion]])
    logits = model(input_ids=ids).logits[0] / temperature
    logp = torch.log_softmax(logits, -1)
    start = len(text.prompt)
    return torch.stack([logp[start + i - 1, token] for i, token in enumerate(text.completion)])


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def rows_of(kind, items):
    if kind == "padded":
        return pad_rows(items)
    return pack_rows(items, kind)


@pytest.mark.parametrize("kind", ["padded", 1, 20, 40, 10_000])
@pytest.mark.parametrize("micro", [1, 50, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_gradient_equal_one_sequence_at_a_time(kind, micro, temperature):
    # The model's pad id (0) is a token of the texts: its embedding must learn too.
    model, items = tiny_llama(), texts()
    weights = torch.linspace(-1, 1, len(items), dtype=torch.float64)
    model.get_input_embeddings().padding_idx = None
    loss = sum(w * plain_logp(model, item, temperature).sum() for w, item in zip(weights, items, strict=True))
    loss.backward()
    expected, expected_logp = flat_gradient(model), [plain_logp(model, item, temperature).detach() for item in items]

    model = tiny_llama()
    assert model.get_input_embeddings().padding_idx == 0
    scorer = TokenScorer(model)
    for rows in micro_batches(rows_of(kind, items), micro):
        logp, _ = scorer(rows, temperature)
        (weights[rows.owner] * logp.double()).sum().backward()
        for owner in rows.owner.unique().tolist():
            torch.testing.assert_close(logp[rows.owner == owner].double(), expected_logp[owner], rtol=0, atol=1e-5)
    found = flat_gradient(model)
    # The head's softmax is float32 by design, everything else float64 here.
    assert torch.linalg.norm(found - expected) / torch.linalg.norm(expected) < 1e-5


@pytest.mark.parametrize("chunks", [2, 7, 500])
def test_chunked_head_gives_the_same_gradient(chunks):
    gradients = []
    for count in (1, chunks):  # 500: more chunks than tokens, as a rank with little work has
        model = tiny_llama()
        rows = batch_rows(pack_rows(texts(), 64))
        rows.chunks = count
        logp, _ = TokenScorer(model)(rows)
        logp.sum().backward()
        gradients.append(flat_gradient(model))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


def test_attention_that_would_misread_the_mask_is_refused():
    model = tiny_llama()
    model.config._attn_implementation = "eager"
    with pytest.raises(UserError, match="sdpa"):
        TokenScorer(model)


def test_a_text_longer_than_the_window_is_refused():
    with pytest.raises(UserError, match="130 tokens is longer than the model's window of 128"):
        TokenScorer(tiny_llama())(batch_rows(pad_rows([Text([3], [4] * 130)])))


def test_a_prompt_stands_once_for_its_answers_and_the_last_token_is_not_computed():
    rows = batch_rows(pack_rows([Text([5, 6], [7, 8, 1]), Text([5, 6], [9, 1])], 100))
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert rows.targets.tolist() == [7, 8, 1, 9, 1]
    assert rows.predictor.tolist() == [1, 2, 3, 1, 4]
    assert rows.owner.tolist() == [0, 0, 0, 1, 1]
    # The second answer sees the prompt and itself, not the first answer.
    assert rows.visible()[0, 0, 4].tolist() == [True, True, False, False, True]


def test_documents_in_a_row_do_not_see_each_other():
    rows = batch_rows(pack_rows([Text([5], [7, 8]), Text([6], [9, 1])], 100))
    assert rows.tokens.tolist() == [[5, 7, 6, 9]]
    assert rows.visible()[0, 0, 3].tolist() == [False, False, True, True]
    assert rows.positions.tolist() == [[0, 1, 0, 1]]


def test_entropy_of_a_uniform_distribution():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    logp, entropy = TokenScorer(model)(batch_rows(pad_rows([Text([3], [4, 5])])))
    torch.testing.assert_close(entropy, torch.full((2,), 3.4657359))  # log 32
    torch.testing.assert_close(logp.float(), torch.full((2,), -3.4657359))
