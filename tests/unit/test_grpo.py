"""GRPO's mathematics against numbers worked out by hand and against a float64 reference written out in loops."""

import math
import random

import pytest
import torch

from stages.engine.settings import Optimizer
from stages.grpo.advantages import group_advantages, zero_variance
from stages.grpo.kl import k3
from stages.grpo.losses import grpo_loss, grpo_terms
from stages.grpo.sampler import ProblemSampler
from stages.grpo.select import Selection
from stages.grpo.settings import Collapse
from stages.problems.episode import Problem
from stages.store.errors import UserError

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def test_advantages_by_hand():
    # Rewards 1, 0, 0, 0: mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4, std 1/2.
    found = group_advantages(tensor([1.0, 0, 0, 0]))
    expected = [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]
    torch.testing.assert_close(found, tensor(expected), rtol=1e-12, atol=0)


def test_advantages_do_not_see_a_shift_nor_the_order():
    rewards = torch.rand(5, 8, dtype=F64)
    order = torch.randperm(8)
    torch.testing.assert_close(group_advantages(rewards + 3.5), group_advantages(rewards), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(group_advantages(rewards[:, order]), group_advantages(rewards)[:, order])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.1])
def test_a_group_of_equal_rewards_has_no_signal_at_all(value):
    # The mean of sixteen times 0.1 is not 0.1 in floating point; the advantage must be 0 all the same.
    rewards = torch.full((1, 16), value, dtype=torch.float32)
    assert group_advantages(rewards).abs().max() == 0
    assert zero_variance(rewards).tolist() == [True]
    assert zero_variance(tensor([0.1, 0.1 + 1e-9])).tolist() == [False]


def test_an_answer_without_verdict_neither_trains_nor_shifts_its_group():
    valid = torch.tensor([[True, True, True, False]])
    found = group_advantages(tensor([1.0, 0.0, 0.0, 0.0]), valid)
    torch.testing.assert_close(found[:, :3], group_advantages(tensor([1.0, 0.0, 0.0])))
    assert found[0, 3] == 0
    assert zero_variance(tensor([1.0, 1.0, 1.0, 0.0]), valid).tolist() == [True]


def test_k3_by_hand():
    # d = log 2: k3 = 2 − log 2 − 1.
    found = k3(tensor(math.log(0.25)), tensor(math.log(0.5)))
    assert found.item() == pytest.approx(1 - math.log(2), rel=1e-12)
    assert k3(tensor(-1.0), tensor(-1.0)).item() == 0


def test_k3_is_an_unbiased_value():
    p, q = torch.softmax(torch.randn(6, dtype=F64), 0), torch.softmax(torch.randn(6, dtype=F64), 0)
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * k3(p.log(), q.log())).sum(), exact, rtol=1e-10, atol=1e-12)


def reference_loss(logp, old, ref, advantages, lengths, low, high, beta):
    """DeepSeekMath, equation 3, written out: mean over answers of the mean over tokens."""
    total, place = 0.0, 0
    for advantage, length in zip(advantages, lengths, strict=True):
        answer = 0.0
        for t in range(place, place + length):
            ratio = torch.exp(logp[t] - old[t])
            clipped = torch.clip(ratio, 1 - low, 1 + high)
            surrogate = torch.min(ratio * advantage, clipped * advantage)
            d = ref[t] - logp[t]
            answer = answer + surrogate - beta * (torch.exp(d) - d - 1)
        total = total + answer / length
        place += length
    return -total / len(lengths)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (10.0, 10.0)])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_and_gradient_equal_the_papers_equation(low, high, beta):
    torch.manual_seed(1)
    lengths, advantages = [3, 1, 5, 2], [1.3, -0.4, 0.0, -2.0]
    logp = torch.randn(11, dtype=F64, requires_grad=True)
    old, ref = logp.detach() + 0.4 * torch.randn(11, dtype=F64), torch.randn(11, dtype=F64)
    expected = reference_loss(logp, old, ref, advantages, lengths, low, high, beta)
    (expected_gradient,) = torch.autograd.grad(expected, logp)

    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    weights = tensor(*[1 / (4 * length) for length in lengths])[owner]
    terms = grpo_terms(logp, old, tensor(*advantages)[owner], clip_low=low, clip_high=high, ref_logp=ref)
    found = grpo_loss(terms, weights, beta)
    (gradient,) = torch.autograd.grad(found, logp)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)


def test_clipping_takes_the_gradient_away_only_where_it_says():
    # Ratios 1.5, 0.5, 1.5, 0.5 with advantages +, −, −, +: the first two are clipped, the others pull the policy back.
    logp = tensor(math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)).requires_grad_()
    terms = grpo_terms(logp, torch.zeros(4, dtype=F64), tensor(1.0, -1.0, -1.0, 1.0), clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(terms.policy.sum(), logp)
    torch.testing.assert_close(gradient, tensor(0.0, 0.0, 1.5, -0.5))
    assert terms.clipped_high.tolist() == [True, False, False, False]
    assert terms.clipped_low.tolist() == [False, True, False, False]
    torch.testing.assert_close(terms.policy.detach(), tensor(-1.2, 0.8, 1.5, -0.5))


def test_on_policy_the_ratio_is_one_and_the_gradient_is_that_of_reinforce():
    logp = torch.randn(6, dtype=F64, requires_grad=True)
    advantages = torch.randn(6, dtype=F64)
    terms = grpo_terms(logp, logp.detach(), advantages, clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(terms.policy.sum(), logp)
    torch.testing.assert_close(gradient, -advantages)
    assert not terms.clipped_low.any()
    assert not terms.clipped_high.any()


def test_zero_advantage_has_no_gradient():
    logp = torch.randn(6, dtype=F64, requires_grad=True)
    terms = grpo_terms(logp, logp.detach() + 0.3, torch.zeros(6, dtype=F64), clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(terms.policy.sum(), logp)
    assert gradient.abs().max() == 0


def problems(count):
    return [Problem(id=str(i), question="", answer="", source="") for i in range(count)]


def test_no_problem_comes_twice_in_an_epoch_and_epochs_differ():
    sampler = ProblemSampler(problems(11), per_step=4, seed=0)  # two steps an epoch, three problems wait
    drawn = [[p.id for p in sampler.draw(step)] for step in range(40)]
    for epoch in range(20):
        both = drawn[2 * epoch] + drawn[2 * epoch + 1]
        assert len(set(both)) == 8
    assert drawn[0] != drawn[2]
    assert {i for step in drawn for i in step} == {str(i) for i in range(11)}


def test_more_questions_than_problems_are_refused():
    with pytest.raises(UserError, match="a step draws 4 different problems, there are 3"):
        ProblemSampler(problems(3), per_step=4, seed=0)


def test_a_step_draws_the_same_after_a_restart_and_in_any_order():
    sampler = ProblemSampler(problems(10), per_step=4, seed=3)
    forward = [sampler.draw(step) for step in range(8)]
    steps = list(range(8))
    random.Random(0).shuffle(steps)
    assert all(ProblemSampler(problems(10), per_step=4, seed=3).draw(step) == forward[step] for step in steps)
    assert ProblemSampler(problems(10), per_step=4, seed=4).draw(0) != forward[0]


def test_the_best_evaluation_is_kept_and_a_collapse_stops():
    selection, collapse = Selection(), Collapse(below=0.5, patience=2)
    assert selection.see(10, 0.6, collapse)
    assert selection.see(20, 0.6, collapse)  # a tie goes to the later
    assert not selection.see(30, 0.2, collapse)
    assert not selection.stop(collapse)
    assert not selection.see(40, 0.29, collapse)
    assert selection.stop(collapse)
    assert (selection.best_step, selection.best_reward) == (20, 0.6)
    assert Selection.restored(selection.state()) == selection
    assert Selection.restored(Selection().state()) == Selection()


def test_one_bad_evaluation_between_good_ones_does_not_stop():
    selection, collapse = Selection(), Collapse(below=0.5, patience=2)
    for step, reward in enumerate([0.6, 0.2, 0.5, 0.2]):
        selection.see(step + 1, reward, collapse)
    assert not selection.stop(collapse)


def test_learning_rate():
    cosine = Optimizer(lr=1.0, schedule="cosine", warmup_steps=4, final_share=0.1)
    assert [cosine.lr_at(s, 104) for s in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert cosine.lr_at(54, 104) == pytest.approx(0.55)  # halfway: the mean of 1 and 0.1
    assert cosine.lr_at(104, 104) == pytest.approx(0.1)
    assert Optimizer(lr=2.0).lr_at(50, 100) == 2.0
