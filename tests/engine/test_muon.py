"""Muon against a singular value decomposition in float64, against PyTorch's own Muon and AdamW, and over a restart."""

import pytest
import torch
from pydantic import ValidationError

from stages.engine.deepspeed_engine import Engine
from stages.engine.muon import Muon, orthogonalized
from stages.engine.packing.pack import Text
from stages.engine.scorer import TokenScorer
from stages.engine.settings import Training
from stages.kinds.toy_base import ToyBaseConfig
from stages.supervised.train import accumulate
from tests.conftest import tiny_llama

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
DOCUMENTS = [Text([3, 4, n], [n, 6, 1]) for n in range(5, 13)]


def is_hidden_matrix(name):
    return name.startswith("model.layers.") and "norm" not in name


def test_orthogonalized_matrices_keep_their_singular_vectors_and_get_values_near_one():
    torch.manual_seed(0)
    matrices = torch.randn(3, 12, 40) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    core = left.mT @ orthogonalized(matrices).double() @ right.mT
    values = core.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (core - torch.diag_embed(values)).abs().max() < 1e-4


def test_a_step_moves_matrices_as_torchs_muon_and_the_rest_as_adamw():
    models = [tiny_llama().float() for _ in range(2)]
    ours = Muon(models[0], **SETTINGS)
    named = list(models[1].named_parameters())
    theirs = [
        torch.optim.Muon(
            [p for name, p in named if is_hidden_matrix(name)], lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([p for name, p in named if not is_hidden_matrix(name)], **SETTINGS),
    ]
    before = [p.detach().clone() for p in models[0].parameters()]
    torch.manual_seed(0)
    for _ in range(3):
        for one, other in zip(*(m.parameters() for m in models), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    matrices = 0
    for (name, theirs_), mine, old in zip(named, models[0].parameters(), before, strict=True):
        if is_hidden_matrix(name):
            matrices += 1
            # Theirs iterates in bfloat16, whose rounding grows over five iterations.
            assert (mine - theirs_).norm() < 0.1 * (theirs_ - old).norm(), name
        else:
            torch.testing.assert_close(mine, theirs_)
    assert matrices == 7 * models[0].config.num_hidden_layers


def engine():
    return Engine(TokenScorer(tiny_llama().float()), Training(lr=3e-3), "zero0", "cpu", muon=True)


def steps(trained, count):
    return [(accumulate(trained, DOCUMENTS, 64), trained.step(3e-3)) for _ in range(count)]


def test_a_restored_engine_takes_the_same_steps_and_momentum_decides_them():
    first = engine()
    steps(first, 2)
    stored = first.state()
    assert sum(name.endswith("|exp_avg_sq") for name in stored) < sum(name.endswith("|exp_avg") for name in stored)
    after = steps(first, 2)
    restored, forgetful = engine(), engine()
    restored.restore(stored.__getitem__)
    forgetful.restore(lambda name: torch.zeros_like(stored[name]) if name.endswith("exp_avg") else stored[name])
    assert steps(restored, 2) == after
    assert steps(forgetful, 2) != after


def test_muon_with_cut_weights_is_refused_by_name():
    ToyBaseConfig(kind="toy_base", optimizer="muon")
    with pytest.raises(ValidationError, match="muon needs whole matrices"):
        ToyBaseConfig(kind="toy_base", optimizer="muon", deepspeed="zero1")
