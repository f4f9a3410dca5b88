"""PPO's mathematics against numbers worked out by hand and against loops; and what a KL in the reward costs long answers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.rl.gae import explained_variance, gae, length_adaptive_lambda, thirds, token_rewards, value_terms, whiten
from stages.rl.kl import k3, kl_terms
from stages.rl.losses import token_weights
from tests.rl import reference
from tests.rl.reference import F64, close, f64

few = settings(max_examples=25, deadline=None, derandomize=True)


def padded(rows):
    width = max(len(row) for row in rows)
    return f64(*[[*row, *[0.0] * (width - len(row))] for row in rows])


def answers(lengths, seed=0):
    """Rewards and values per token of answers of these lengths, as lists."""
    random = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, generator=random, dtype=F64).tolist() for n in lengths] for _ in range(2)]


def test_token_rewards_by_hand():
    # Answers of 3 and 1 tokens with rewards 1 and 2; what is penalised counts down, the reward sits on the last token.
    found = token_rewards(f64(1.0, 2.0), f64([0.1, 0.2, -0.3], [0.5, 0.0, 0.0]), torch.tensor([3, 1]))
    close(found, [[-0.1, -0.2, 1.3], [1.5, 0, 0]])


def test_token_rewards_equal_the_loops():
    lengths = [4, 1, 6, 3]
    penalties, _ = answers(lengths)
    rewards = [0.5, -1.0, 2.0, 0.0]
    expected = []
    for reward, row in zip(rewards, penalties, strict=True):
        expected.append([-p for p in row])
        expected[-1][-1] += reward
    at, rewards = padded(penalties).requires_grad_(), f64(*rewards).requires_grad_()
    found = token_rewards(rewards, at, torch.tensor(lengths))
    close(found, padded(expected))
    inside = torch.tensor([[t < n for t in range(6)] for n in lengths])
    by_penalty, by_reward = torch.autograd.grad(found.sum(), (at, rewards))
    close(by_reward, torch.ones(4))
    close(by_penalty[inside], -torch.ones(sum(lengths)))


def test_gae_by_hand():
    # γ = 1/2, λ = 1/2; rewards 1, 0, 2; values 2, 1, 4, then 0.
    # δ_3 = 2 + 0 − 4 = −2; δ_2 = 0 + 4/2 − 1 = 1; δ_1 = 1 + 1/2 − 2 = −1/2.
    # A_3 = −2; A_2 = 1 − 2/4 = 1/2; A_1 = −1/2 + (1/2)/4 = −3/8. Returns A + V: 13/8, 3/2, 2.
    rewards, values = f64([1.0, 0, 2]), f64([2.0, 1, 4])
    found = gae(rewards, values, 0.5, 0.5)
    close(found, [[-3 / 8, 1 / 2, -2]])
    close(found + values, [[13 / 8, 3 / 2, 2]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.9, 0.0), (0.7, 1.0), (1.0, 0.0)])
def test_gae_and_its_gradient_equal_the_loops(gamma, lam):
    lengths = [5, 1, 8, 2]
    rewards, values = answers(lengths)
    r, v = padded(rewards).requires_grad_(), padded(values).requires_grad_()
    found = gae(r, v, gamma, lam)
    rows = [reference.gae(list(r[i, :n]), list(v[i, :n]), gamma, lam) for i, n in enumerate(lengths)]
    inside = torch.tensor([[t < n for t in range(8)] for n in lengths])
    expected = torch.stack([x for row in rows for x in row])
    close(found[inside], expected)
    close(found[~inside], torch.zeros(int((~inside).sum())))
    mix = torch.linspace(0.5, 2, len(expected), dtype=F64)
    ours = torch.autograd.grad((mix * found[inside]).sum(), (r, v))
    theirs = torch.autograd.grad((mix * expected).sum(), (r, v))
    for found, wanted in zip(ours, theirs, strict=True):
        close(found[inside], wanted[inside])


@few
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_without_discount_the_advantage_is_what_is_still_to_come_less_the_value(lengths, seed):
    rewards, values = answers(lengths, seed)
    found = gae(padded(rewards), padded(values), 1.0, 1.0)
    expected = [[sum(r[t:]) - v[t] for t in range(len(r))] for r, v in zip(rewards, values, strict=True)]
    close(found, padded(expected), atol=1e-12)


def test_with_lambda_nought_the_advantage_is_the_one_step_error():
    rewards, values = f64([1.0, -2, 3]), f64([0.5, 0.25, -1])
    close(gae(rewards, values, 0.9, 0.0), [[1 + 0.9 * 0.25 - 0.5, -2 + 0.9 * -1 - 0.25, 3 + 1]])


@few
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 1000), each=st.booleans())
def test_padded_rows_equal_the_answers_one_by_one(lengths, seed, each):
    rewards, values = answers(lengths, seed)
    lams = [1 / (2 + i) for i in range(len(lengths))] if each else [0.8] * len(lengths)
    found = gae(padded(rewards), padded(values), 0.9, f64(*lams) if each else 0.8)
    alone = [gae(f64(r), f64(v), 0.9, lam)[0].tolist() for r, v, lam in zip(rewards, values, lams, strict=True)]
    close(found, padded(alone))


def test_each_answer_may_have_its_own_lambda():
    rewards, values = answers([4, 4, 4])
    lams = [0.0, 0.5, 1.0]
    expected = [reference.gae(r, v, 0.9, lam) for r, v, lam in zip(rewards, values, lams, strict=True)]
    close(gae(padded(rewards), padded(values), 0.9, f64(*lams)), expected)


def test_length_adaptive_lambda_by_hand():
    # α = 0.05: 1/(αl) is 20/l. At 20 tokens and under nothing is left.
    lengths = torch.tensor([1, 19, 20, 40, 100, 1000])
    close(length_adaptive_lambda(lengths, 0.05), [0, 0, 0, 0.5, 0.8, 0.98], rtol=2e-7)
    close(length_adaptive_lambda(lengths, 1.0), [0, 18 / 19, 0.95, 0.975, 0.99, 0.999], rtol=2e-7)


@few
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=20), alpha=st.sampled_from([0.01, 0.05, 0.3, 2.0]))
def test_length_adaptive_lambda_equals_the_loop(lengths, alpha):
    # Near 0 a difference of ones: what counts is the absolute error. Whole numbers of tokens give float32.
    found = length_adaptive_lambda(torch.tensor(lengths), alpha)
    close(found, [max(0.0, 1 - 1 / (alpha * n)) for n in lengths], atol=2e-7)


def test_whiten_by_hand():
    # 1, 2, 6: mean 3, deviations −2, −1, 3, squares 14.
    std = math.sqrt(14 / (3 - 1))
    close(whiten(f64(1.0, 2, 6)), [-2 / std, -1 / std, 3 / std], rtol=1e-7)


@few
@given(seed=st.integers(0, 1000), count=st.integers(2, 40), shift=st.floats(-50, 50), factor=st.floats(0.1, 50))
def test_whitened_values_see_neither_shift_nor_scale(seed, count, shift, factor):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=F64)
    found = whiten(values)
    close(found.mean(), 0.0, atol=1e-12)
    close((found**2).sum() / (count - 1), 1.0, rtol=1e-6)
    close(whiten(values * factor + shift), found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("values", [[3.0], [0.1] * 3, [0.1] * 16, [1 / 3] * 7, [1 / 3] * 100, [1.1] * 7, [0.0] * 4])
def test_whitened_equal_values_are_noughts(values):
    for dtype in (torch.float32, F64):
        assert whiten(torch.tensor(values, dtype=dtype)).tolist() == [0.0] * len(values)


def test_value_terms_by_hand():
    # V_old 0, ε = 0.2, so V is held to ±0.2.
    # V 0.1, R 1: within; ½ 0.9² = 0.405, slope −0.9.
    # V 0.5, R 1: held at 0.2; ½ max(0.25, 0.64) = 0.32: the held one is worse, no slope.
    # V 0.5, R 0: ½ max(0.25, 0.04) = 0.125: the free one is worse, so it is pulled back, slope 0.5.
    # V −0.5, R −1: as the second, downwards.
    values = f64(0.1, 0.5, 0.5, -0.5).requires_grad_()
    loss, clipped = value_terms(values, f64(0.0, 0, 0, 0), f64(1.0, 1, 0, -1), 0.2)
    close(loss, [0.405, 0.32, 0.125, 0.32])
    close(torch.autograd.grad(loss.sum(), values)[0], [-0.9, 0, 0.5, 0])
    assert clipped.tolist() == [False, True, False, True]
    loss, clipped = value_terms(values, f64(0.0, 0, 0, 0), f64(1.0, 1, 0, -1), None)
    close(loss, [0.405, 0.125, 0.125, 0.125])
    close(torch.autograd.grad(loss.sum(), values)[0], [-0.9, -0.5, 0.5, 0.5])
    assert not clipped.any()


@pytest.mark.parametrize("reach", [None, 0.05, 0.2, 1.0])
def test_value_terms_and_their_gradient_equal_the_loops_and_differences(reach):
    random = torch.Generator().manual_seed(4)
    values, old, returns = (torch.randn(60, generator=random, dtype=F64) for _ in range(3))
    values = (old + 0.5 * values).requires_grad_()
    loss, clipped = value_terms(values, old, returns, reach)
    expected = [reference.value_loss(values[t], old[t], returns[t], reach) for t in range(60)]
    close(loss, torch.stack(expected))
    mix = torch.linspace(0.5, 2, 60, dtype=F64)
    (gradient,) = torch.autograd.grad((mix * loss).sum(), values)
    close(gradient, torch.autograd.grad((mix * torch.stack(expected)).sum(), values)[0])
    # It is said of exactly those without a gradient that they were clipped.
    assert torch.equal(clipped, gradient == 0)
    assert reach is None or 0 < clipped.sum() < 60

    at, o, r = values.tolist(), old.tolist(), returns.tolist()
    by_differences = [
        reference.differences(lambda x, t=t: reference.value_loss(x[0], o[t], r[t], reach), [at[t]])[0] for t in range(60)
    ]
    close(gradient / mix, by_differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [0.1, 1.0])
def test_rounding_is_not_taken_for_a_clip(dtype, size):
    # V_old + (V − V_old) need not be V in floating point.
    random = torch.Generator().manual_seed(7)
    values, old, returns = (size * torch.randn(2000, generator=random, dtype=dtype) for _ in range(3))
    values.requires_grad_()
    loss, clipped = value_terms(values, old, returns, 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert torch.equal(clipped, gradient == 0)
    assert clipped.any()


def test_explained_variance_by_hand():
    # Returns 0, 2, 4: squares about the mean 8. Errors R − V 0, 1, −1: squares 2. 1 − 2/8.
    assert explained_variance(f64(0.0, 1, 5), f64(0.0, 2, 4)) == pytest.approx(0.75, rel=1e-12)
    assert explained_variance(f64(0.0, 2, 4), f64(0.0, 2, 4)) == pytest.approx(1.0, rel=1e-12)
    # A constant is as good as nothing, also a wrong one: the mean of the error is not in its variance.
    assert explained_variance(f64(7.0, 7, 7), f64(0.0, 2, 4)) == pytest.approx(0.0, abs=1e-12)
    # Backwards is worse than a constant: errors −4, 0, 4, squares 32.
    assert explained_variance(f64(4.0, 2, 0), f64(0.0, 2, 4)) == pytest.approx(-3.0, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("returns", [[1.0, 1.0], [0.5], [0.1] * 7, [1.1] * 1000, [1 / 3] * 16])
def test_equal_returns_leave_no_variance_to_explain(returns, dtype):
    # Their mean need not be equal to them in floating point.
    assert explained_variance(torch.arange(len(returns), dtype=dtype), torch.tensor(returns, dtype=dtype)) is None


def test_explained_variance_equals_the_loop():
    values, returns = ([float(x) for x in row] for row in answers([40])[0] + answers([40])[1])

    def spread(numbers):
        return sum((x - reference.mean(numbers)) ** 2 for x in numbers)

    expected = 1 - spread([r - v for r, v in zip(returns, values, strict=True)]) / spread(returns)
    assert explained_variance(f64(*values), f64(*returns)) == pytest.approx(expected, rel=1e-10)


def test_a_kl_in_the_reward_taxes_length_and_one_in_the_loss_does_not():
    """Every token is half as likely as under the reference, so that each has the same k3 = 1 − log 2; β is 0.01."""
    lengths, beta, reward, kl = [10, 100, 1000], 0.01, 1.0, 1 - math.log(2)
    logp = [torch.full((n,), math.log(1 / 4), dtype=F64, requires_grad=True) for n in lengths]
    ref = [torch.full((n,), math.log(1 / 2), dtype=F64) for n in lengths]

    # PPO: the return of the first token is R − β kl L. A right answer of 1,000 tokens is worth −2.07, one of 10 worth 0.97.
    penalties = padded([(beta * k3(p, r)).tolist() for p, r in zip(logp, ref, strict=True)])
    per_token = token_rewards(torch.full((3,), reward, dtype=F64), penalties, torch.tensor(lengths))
    returns = gae(per_token, torch.zeros_like(per_token), 1.0, 1.0)
    close(returns[:, 0], [reward - beta * kl * n for n in lengths], rtol=1e-9)
    close(returns[:, 0], [0.9693, 0.6931, -2.0685], rtol=1e-4)
    # What the tokens of an answer are charged together grows as L(L + 1)/2: a hundredfold for tenfold the length.
    charged = [n * reward - returns[i, :n].sum() for i, n in enumerate(lengths)]
    close(torch.stack(charged), [beta * kl * n * (n + 1) / 2 for n in lengths], rtol=1e-9)
    close(torch.stack(charged), [0.16877, 15.496, 1535.8], rtol=1e-4)

    # GRPO: an answer's KL in the loss is β kl / 3 of three answers, and its pull on the policy β / 3, whatever its length.
    weights = token_weights(lengths, "sample_mean", 1000)
    costs = [beta * w * kl_terms(p, r, "k3").sum() for w, p, r in zip(weights, logp, ref, strict=True)]
    close(torch.stack(costs), [beta * kl / 3] * 3, rtol=1e-9)
    close(torch.stack(costs), [0.00102284] * 3, rtol=1e-5)
    pulls = [torch.autograd.grad(cost, p)[0].abs().sum() for cost, p in zip(costs, logp, strict=True)]
    close(torch.stack(pulls), [beta / 3] * 3, rtol=1e-9)


def test_thirds_of_an_answer():
    assert thirds(7).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert thirds(3).tolist() == [0, 1, 2]
    assert thirds(1).tolist() == [0]
    assert explained_variance(f64(), f64()) is None
