"""The loss and gradient of a supervised step under ZeRO 0 to 3, on one process and two, however cut: always those of
transformers' own forward over one document at a time, in float64. The same for adapters.

`torchrun … -m tests.supervised.test_zero FOLDER` is a rank.
"""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch

from stages.engine.packing.pack import Text
from tests.conftest import tiny_llama
from tests.stage_process import on_ranks
from tests.supervised.test_supervised import documents, plain_losses

CUTS = (1, 30, 75, 10_000)
LORA = {"rank": 3, "alpha": 6.0, "targets": ("q_proj", "v_proj", "down_proj")}
STEPS = 3
IDLE = [Text([3, 4, 5], [6] * 18), Text([9, 8, 7], [5] * 18)]
"""Of four parts these are the second and the fourth: the first of two ranks measures nothing."""
RATE = 1e-2


def whole_gradient(engine):
    from deepspeed.utils import safe_get_full_grad

    return torch.cat([safe_get_full_grad(p).flatten().clone() for p in engine.engine.module.parameters() if p.requires_grad])


def rank(folder: Path) -> None:
    """Leave FOLDER/found.pt: (zero, adapters, cut, documents) -> loss, gradient; (zero, adapters) -> what three steps give."""
    from stages.engine import distributed, scorer
    from stages.engine.adapters import adapted, plain_weights
    from stages.engine.deepspeed_engine import Engine
    from stages.engine.settings import Lora, Training
    from stages.supervised.held_out import HeldOut
    from stages.supervised.train import accumulate

    scorer.CHUNK = 5  # ranks have unequal numbers of predicted tokens, so of passes through the head
    texts, found = documents(), {}
    for zero in range(4):
        for lora in (None, Lora(**LORA)):

            def fresh(lora=lora, zero=zero):
                model = adapted(tiny_llama().float(), lora, seed=1)
                return Engine(scorer.TokenScorer(model), Training(max_grad_norm=1e9), f"zero{zero}", "cpu")

            engine = fresh()
            for cut in CUTS:
                for some in (texts, texts[:1]):  # one document leaves the second rank without any
                    loss, _ = accumulate(engine, some, cut)
                    found[zero, bool(lora), cut, len(some)] = loss, whole_gradient(engine)
                    engine.step(0.0)  # forgets the gradient, moves nothing
            engine = fresh()
            for _ in range(STEPS):
                accumulate(engine, texts, 40)
                engine.step(RATE)
            held = HeldOut(texts, ["a"] * len(texts), 30).measure(engine)["eval/loss"]
            idle = HeldOut(IDLE, ["a", "a"], 10).measure(engine)["eval/loss"]
            with engine.whole_weights() as whole:
                weights = {name: tensor.clone() for name, tensor in plain_weights(whole)}
            sampler = {name: p.detach().clone() for name, p in engine.sampling_model().named_parameters()}
            found[zero, bool(lora)] = held, idle, weights, sampler
    if distributed.number() == 0:
        torch.save(found, folder / "found.pt")
    distributed.barrier()
    sys.stderr.flush()
    os._exit(0)  # gloo's and DeepSpeed's threads may abort the interpreter's teardown


@pytest.fixture(scope="module", params=[1, 2])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks("tests.supervised.test_zero", folder, request.param)
    return torch.load(folder / "found.pt", weights_only=True)


def plain_model(lora):
    """In float64; the adapters' first values are those of the float32 model."""
    from stages.engine.adapters import adapted
    from stages.engine.settings import Lora

    model = adapted(tiny_llama().float(), Lora(**LORA) if lora else None, seed=1).double()
    model.get_input_embeddings().padding_idx = None
    return model


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.slow
def test_loss_and_gradient_are_transformers_own(found):
    texts, errors = documents(), []
    for lora in (False, True):
        for count in (len(texts), 1):
            model = plain_model(lora)
            loss = sum(plain_losses(model, texts[:count])) / sum(len(t.completion) for t in texts[:count])
            loss.backward()
            expected, loss = flat(model), loss.item()
            for zero in range(4):
                for cut in CUTS:
                    mine, gradient = found[zero, lora, cut, count]
                    errors.append(abs(mine - loss) / loss)
                    errors.append(float(torch.linalg.norm(gradient.double() - expected) / torch.linalg.norm(expected)))
    assert len(errors) == 2 * 2 * 4 * 4 * 2
    print(f"largest relative difference: {max(errors):.1e}")
    assert max(errors) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_every_zero_stage_takes_the_same_steps_and_hands_over_what_it_samples_with(found, lora):
    start, plain = dict(tiny_llama().float().named_parameters()), plain_model(lora).float()
    optimizer = torch.optim.AdamW(
        (p for p in plain.parameters() if p.requires_grad), lr=RATE, betas=(0.9, 0.95), weight_decay=0
    )
    texts = documents()
    total = sum(len(text.completion) for text in texts)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (sum(plain_losses(plain, texts)) / total).backward()
        optimizer.step()
    held = sum(x.item() for x in plain_losses(plain, texts)) / total
    held_idle = sum(x.item() for x in plain_losses(plain, IDLE)) / sum(len(text.completion) for text in IDLE)
    sampled = dict(plain.named_parameters())
    if lora:
        from stages.engine.adapters import merged

        plain = merged(copy.deepcopy(plain))
    expected = dict(plain.named_parameters())
    moved = torch.cat([(expected[name] - p).flatten() for name, p in start.items()]).norm()
    assert moved > 0.1
    for zero in range(4):
        loss, idle, weights, sampler = found[zero, lora]
        assert loss == pytest.approx(held, rel=1e-4)
        assert idle == pytest.approx(held_idle, rel=1e-4)
        assert weights.keys() == expected.keys()
        assert sampler.keys() == sampled.keys()  # adapters in place
        for mine, theirs in ((weights, expected), (sampler, sampled)):
            off = torch.cat([(mine[name] - theirs[name]).flatten() for name in theirs]).norm()
            assert off / moved <= 1e-3
        still = [name for name in start if torch.equal(weights[name], start[name])]
        assert bool(still) == lora  # what has no adapter is as it was


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
