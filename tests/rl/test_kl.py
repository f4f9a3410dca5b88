"""KL estimators: hand-worked numbers, loops, and what each is worth as a value and as a loss, in exact expectation."""

import math

import pytest
import torch

from stages.rl.kl import ESTIMATORS, k1, k2, k3, kl_terms
from tests.rl import reference
from tests.rl.reference import F64, batch, close, f64

every = pytest.mark.parametrize("name", sorted(ESTIMATORS))

# A policy over five actions with parameters θ, a reference, and a third distribution that samples.
THETA = f64(0.3, -1.2, 0.8, 0.0, 1.5)
REF = torch.log_softmax(f64(-0.5, 0.4, 0.1, 1.0, 0.2), 0)
SAMPLER = torch.log_softmax(f64(0.9, 0.2, -0.7, 0.3, 0.6), 0)


def reverse_kl(theta):
    """KL(π ‖ π_ref), and its gradient in θ, by its definition."""
    logp = torch.log_softmax(theta, 0)
    value = sum(logp[a].exp() * (logp[a] - REF[a]) for a in range(len(REF)))
    return value.detach(), torch.autograd.grad(value, theta)[0]


def expected_loss(name, theta, *, sampled_from=None, correction=False):
    """The exact mean of the loss term over the actions, and of its gradient: each weighs as often as it is sampled."""
    logp = torch.log_softmax(theta, 0)
    old = logp.detach() if sampled_from is None else sampled_from
    terms = kl_terms(logp, REF, name, old_logp=old, correction=correction)
    value = (old.exp() * terms).sum()
    return value.detach(), torch.autograd.grad(value, theta)[0]


def test_by_hand():
    # π = 1/4, π_ref = 1/2, so d = log 2: k1 = −log 2, k2 = (log 2)²/2, k3 = 2 − log 2 − 1.
    logp, ref = f64(math.log(1 / 4)).requires_grad_(), f64(math.log(1 / 2))
    log2 = 0.6931471805599453
    by_hand = {"k1": -log2, "k2": 0.2402265069591007, "k3": 0.3068528194400547}
    # The derivative in log π: 1; −d; 1 − exp(d).
    slope = {"k1": 1.0, "k2": -log2, "k3": -1.0}
    for name, function in [("k1", k1), ("k2", k2), ("k3", k3)]:
        close(function(logp, ref), [by_hand[name]])
        close(torch.autograd.grad(function(logp, ref).sum(), logp)[0], [slope[name]])
    assert [f(f64(-1.0), f64(-1.0)).item() for f in (k1, k2, k3)] == [0, 0, 0]


def test_the_correction_by_hand():
    # π = 1/4, π_ref = 1/2, π_old = 1/8: the ratio is 2, so 2 k3 = 2 − 2 log 2, and the slope ρ (k3 + k3') = 2 (k3 − 1).
    logp = f64(math.log(1 / 4)).requires_grad_()
    found = kl_terms(logp, f64(math.log(1 / 2)), "k3", old_logp=f64(math.log(1 / 8)), correction=True)
    close(found, [2 - 2 * math.log(2)])
    close(torch.autograd.grad(found.sum(), logp)[0], [-2 * math.log(2)])


@every
@pytest.mark.parametrize("correction", [False, True])
def test_value_and_gradient_equal_the_loops_and_differences(name, correction):
    some = batch([3, 1, 4])
    logp = some.logp.clone().requires_grad_()

    def one(p, old, ref):
        kl = reference.estimate(name, p, ref)
        return reference.exp(p - old) * kl if correction else kl

    expected = [one(logp[t], some.old[t], some.ref[t]) for t in range(8)]
    found = kl_terms(logp, some.ref, name, old_logp=some.old, correction=correction)
    assert found.shape == (8,)
    close(found, torch.stack(expected))
    mix = torch.linspace(0.5, 2, 8, dtype=F64)
    (gradient,) = torch.autograd.grad((mix * found).sum(), logp)
    close(gradient, torch.autograd.grad((mix * torch.stack(expected)).sum(), logp)[0])

    old, ref, weights = some.old.tolist(), some.ref.tolist(), mix.tolist()
    by_differences = reference.differences(
        lambda at: sum(w * one(*token) for w, *token in zip(weights, at, old, ref, strict=True)), some.logp.tolist()
    )
    close(gradient, by_differences, rtol=1e-6, atol=1e-8)


@every
def test_without_correction_the_old_policy_is_not_looked_at(name):
    some = batch([3, 1, 4])
    close(kl_terms(some.logp, some.ref, name), ESTIMATORS[name](some.logp, some.ref))
    close(kl_terms(some.logp, some.ref, name, old_logp=some.old), ESTIMATORS[name](some.logp, some.ref))


def test_k2_and_k3_are_never_negative_and_k1_is():
    some = batch([50], spread=1.0)
    assert k2(some.logp, some.ref).min() >= 0
    assert k3(some.logp, some.ref).min() >= 0
    assert k1(some.logp, some.ref).min() < 0


def test_k1_and_k3_are_unbiased_values_and_k2_is_not():
    theta = THETA.clone().requires_grad_()
    exact, _ = reverse_kl(theta)
    close(expected_loss("k1", theta)[0], exact)
    close(expected_loss("k3", theta)[0], exact)
    assert abs(expected_loss("k2", theta)[0] / exact - 1) > 0.05


def test_k3_varies_less_than_k1_near_the_reference():
    theta = (REF + 0.1 * THETA).requires_grad_()
    logp = torch.log_softmax(theta, 0).detach()
    exact, _ = reverse_kl(theta)
    variance = {name: (logp.exp() * (ESTIMATORS[name](logp, REF) - exact) ** 2).sum() for name in ("k1", "k3")}
    assert variance["k3"] < variance["k1"] / 50


def test_as_a_loss_k1_pulls_nowhere():
    # Σ p ∇ log p = ∇ Σ p = 0, wherever the reference is.
    theta = THETA.clone().requires_grad_()
    close(expected_loss("k1", theta)[1], torch.zeros(5), atol=1e-15)


def test_as_a_loss_k2_gives_exactly_the_gradient_of_the_reverse_kl():
    theta = THETA.clone().requires_grad_()
    close(expected_loss("k2", theta)[1], reverse_kl(theta)[1])


def test_as_a_loss_k3_gives_the_gradient_of_the_other_kl():
    # Σ p (1 − π_ref/p) ∇ log p = −Σ π_ref ∇ log p: the gradient of KL(π_ref ‖ π), which is softmax(θ) − π_ref.
    theta = THETA.clone().requires_grad_()
    found, wanted = expected_loss("k3", theta)[1], reverse_kl(theta)[1]
    close(found, torch.softmax(THETA, 0) - REF.exp())
    assert (found - wanted).abs().max() > 0.1 * wanted.abs().max()


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_with_the_correction_on_policy_the_gradient_is_that_of_the_reverse_kl(name):
    theta = THETA.clone().requires_grad_()
    value, gradient = expected_loss(name, theta, correction=True)
    exact, wanted = reverse_kl(theta)
    close(value, exact)
    close(gradient, wanted)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_off_policy_value_and_gradient_are_right_with_the_correction_only(name):
    theta = THETA.clone().requires_grad_()
    exact, wanted = reverse_kl(theta)
    value, gradient = expected_loss(name, theta, sampled_from=SAMPLER, correction=True)
    close(value, exact)
    close(gradient, wanted)
    value, gradient = expected_loss(name, theta, sampled_from=SAMPLER)
    assert abs(value - exact) > 0.1 * exact
    assert (gradient - wanted).abs().max() > 0.1 * wanted.abs().max()
