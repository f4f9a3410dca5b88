"""Packed texts and sampling on a GPU, against float64 on the CPU and against transformers' own forward pass on the GPU."""

import pytest
import torch

from stages.engine.packing.pack import Text, alone, micro_batches
from stages.engine.scorer import TokenScorer
from stages.problems.toy import save_toy_tokenizer
from stages.rollout.protocol import Request, Sampling
from stages.rollout.torch_engine import TorchRollout
from tests.conftest import tiny_llama
from tests.engine.test_packed import copies, grid, plain_logp, prefixed, texts

pytestmark = pytest.mark.gpu
ITEMS = {"texts": texts(), "grid": grid(), "copies": copies(), "prefixed": prefixed()}
PROMPTS = {"a": (6, 20, 7, 21), "b": (8,), "c": (9, 20, 10, 21, 11, 24)}


def loss_of(logps, device):
    """Of one tensor per text: a weighted sum."""
    weights = torch.linspace(-1, 1, len(logps), dtype=torch.float64).tolist()
    return sum(w * logp.double().sum() for w, logp in zip(weights, logps, strict=True)).to(device)


def plain(items, device, dtype):
    """Log-probabilities and gradient of transformers' forward pass, one unpadded text at a time."""
    model = tiny_llama().to(device, dtype)
    model.get_input_embeddings().padding_idx = None
    logps = []
    for item in items:
        ids = torch.tensor([[*item.prompt, *item.completion]], device=device)
        said = model(input_ids=ids).logits[0].float() if dtype != torch.float64 else model(input_ids=ids).logits[0]
        logp, start = said.log_softmax(-1), len(item.prompt)
        logps.append(torch.stack([logp[start + i - 1, token] for i, token in enumerate(item.completion)]))
    loss_of(logps, device).backward()
    return torch.cat([x.detach() for x in logps]).double().cpu(), flat(model)


def packed(items, micro, dtype):
    model = tiny_llama().to("cuda", dtype)
    scorer, found = TokenScorer(model), {}
    weights = torch.linspace(-1, 1, len(items), dtype=torch.float64, device="cuda")
    for part in micro_batches(items, micro):
        part = part.to(torch.device("cuda"))
        logp, _ = scorer(part)
        (weights[part.owner] * logp.double()).sum().backward()
        found |= {owner: logp[part.owner == owner].detach() for owner in part.owner.unique().tolist()}
    return torch.cat([found[n] for n in range(len(items))]).double().cpu(), flat(model)


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double().cpu()


def error(found, expected):
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize("micro", [1, 20, 10_000])
@pytest.mark.parametrize("name", ITEMS)
def test_float32_is_the_plain_forward_in_float64(name, micro):
    logp, gradient = plain(ITEMS[name], "cpu", torch.float64)
    assert torch.allclose(logp, torch.cat([plain_logp(tiny_llama(), item).detach() for item in ITEMS[name]]))
    mine, my_gradient = packed(ITEMS[name], micro, torch.float32)
    assert (mine - logp).abs().max() <= 1e-4
    assert error(my_gradient, gradient) <= 1e-5


@pytest.mark.parametrize("name", ITEMS)
def test_bfloat16_is_as_near_to_float64_as_transformers_own_forward(name):
    logp, gradient = plain(ITEMS[name], "cpu", torch.float64)
    theirs, their_gradient = plain(ITEMS[name], "cuda", torch.bfloat16)
    mine, my_gradient = packed(ITEMS[name], 10_000, torch.bfloat16)
    assert error(mine, logp) <= 2 * error(theirs, logp)
    assert error(my_gradient, gradient) <= 2 * error(their_gradient, gradient)


def sampled(device, dtype=torch.float32, temperature=1.0, folder=None):
    engine = TorchRollout(tiny_llama().to(device, dtype), save_toy_tokenizer(folder), tokens=150)
    requests = [Request(key=key, prompt_ids=ids, samples=6) for key, ids in PROMPTS.items()]
    found = engine.sample(requests, Sampling(temperature=temperature, max_tokens=20), seed=1, purpose="t", step=0)
    return engine, found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_answers_as_on_the_cpu(tmp_path, temperature):
    """In float32: random numbers are counted on the CPU, so only a draw on the edge between two tokens could differ."""
    answers = {device: sampled(device, temperature=temperature, folder=tmp_path / device)[1] for device in ("cpu", "cuda")}
    for mine, theirs in zip(answers["cuda"], answers["cpu"], strict=True):
        assert [c.ids for c in mine] == [c.ids for c in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_sampler_and_trainer_agree_on_log_probabilities(tmp_path, dtype, most):
    engine, answers = sampled("cuda", dtype, folder=tmp_path / "tokenizer")
    scorer, apart = TokenScorer(engine.model), []
    for ids, completions in zip(PROMPTS.values(), answers, strict=True):
        for completion in completions:
            (one,) = alone([Text(ids, completion.ids)])
            logp, _ = scorer(one.to(torch.device("cuda")))
            apart.append((torch.tensor(completion.logprobs) - logp.detach().float().cpu()).abs())
    assert torch.cat(apart).max() <= most
    assert torch.cat(apart).mean() <= most / 10
