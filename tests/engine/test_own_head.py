"""Logits from hidden states: the model's own, scales, caps and biases included."""

import pytest
import torch

from stages.engine.own_head import decoder_names, overwritable, own_logits
from stages.engine.packing.pack import Text, alone, micro_batches, row
from stages.engine.scorer import TokenScorer, token_logp
from tests.conftest import tiny_llama
from tests.small_models import small_model

PROMPT, ANSWERS = [5, 9, 3, 7, 2, 11], ([4, 8, 6, 10, 1], [12, 3, 1], [7, 7, 7, 2, 9, 13, 1])
TEXTS = [Text(PROMPT, answer) for answer in ANSWERS] + [Text([8, 3], [5, 4, 1])]
SCALED = ["granite", "cohere", "gemma2", "phi", "gpt2", "opt"]


def plain(model, text):
    """Log-probabilities of a text's completion by the model's own forward, differentiable."""
    ids = torch.tensor([[*text.prompt, *text.completion]])
    count = len(text.completion)
    logp = model(ids, use_cache=False).logits[0].log_softmax(-1)[-count - 1 : -1]
    return logp.gather(1, torch.tensor(text.completion)[:, None])[:, 0]


@pytest.mark.parametrize("family", SCALED)
def test_logits_of_hidden_states_are_those_of_the_whole_model(family):
    model, ids = small_model(family).double(), torch.tensor([[*PROMPT, *ANSWERS[0]]])
    with torch.no_grad():
        states = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        logits = own_logits(model, decoder_names(model), states)
        expected = model(ids).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    if family in ("granite", "cohere", "gemma2", "phi"):  # what the old way lost
        rebuilt = model.get_output_embeddings()(states)
        if family != "phi":
            assert (rebuilt - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", SCALED)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_or_row_log_probabilities_are_those_of_the_whole_model(family, temperature):
    model = small_model(family)
    expected = []
    for text in TEXTS:
        ids, count = torch.tensor([[*text.prompt, *text.completion]]), len(text.completion)
        with torch.no_grad():
            logp = (model(ids).logits[0, -count - 1 : -1] / temperature).log_softmax(-1)
        expected.append(logp.gather(1, torch.tensor(text.completion)[:, None])[:, 0])
    scorer = TokenScorer(model).eval()
    rows = [row([text], [n]) for n, text in enumerate(TEXTS)]
    for batches in (rows, micro_batches(TEXTS, 1000)) if scorer.can_pack else (rows,):
        with torch.no_grad():
            scored = [(batch.owner, scorer(batch, temperature)[0]) for batch in batches]
        for number, logp in enumerate(expected):
            (found,) = [values[owner == number] for owner, values in scored if (owner == number).any()]
            torch.testing.assert_close(found, logp, rtol=0, atol=2e-6)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("family", SCALED)
def test_gradients_through_the_own_head_are_those_of_plain_autograd(family, chunks):
    model, reference = small_model(family).double(), small_model(family).double()
    weights = torch.linspace(-1, 2, len(TEXTS)).double()
    sum(w * plain(reference, text).sum() for w, text in zip(weights, TEXTS, strict=True)).backward()
    scorer = TokenScorer(model).eval()
    for number, text in enumerate(TEXTS):
        part = row([text], [number])
        part.chunks = chunks
        (weights[number] * scorer(part)[0].double().sum()).backward()
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None, name
            continue
        if "embed" in name or "wte" in name:
            one.grad[0], other.grad[0] = 0, 0  # plain embeddings drop the gradient of the pad id
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_llama_computes_the_same_bits_as_by_its_head_alone():
    def by_head(model):
        """The product with the head alone, which is all that a Llama has behind its decoder."""
        scorer, packed = TokenScorer(model.float()), alone([TEXTS[0]])[0]
        hidden = scorer.hidden(packed)
        token_logp(model.get_output_embeddings()(hidden), packed.targets, 0.7)[0].sum().backward()
        return model

    one, other = by_head(tiny_llama()), tiny_llama().float()
    TokenScorer(other)(alone([TEXTS[0]])[0], 0.7)[0].sum().backward()
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad)


def test_logits_are_copied_where_their_operation_reads_its_own_result():
    x = torch.randn(3, 5, requires_grad=True)
    capped, scaled = torch.tanh(x * 2), torch.tanh(x * 2) * 4
    assert overwritable(capped) is not capped
    assert overwritable(capped.unsqueeze(0).squeeze(0)) is not capped
    assert overwritable(scaled) is scaled
    logits = overwritable(torch.tanh(x * 2))
    token_logp(logits, torch.tensor([1, 2, 0]), 1.0)[0].sum().backward()
    expected = torch.autograd.grad(torch.tanh(x * 2).log_softmax(-1)[range(3), [1, 2, 0]].sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_the_model_is_left_as_it_was():
    model = small_model("granite")
    modules, names = dict(model.named_modules()), set(vars(model))
    own_logits(model, decoder_names(model), torch.randn(4, 32))
    assert dict(model.named_modules()) == modules
    assert set(vars(model)) == names
