"""Advantages of whole answers against numbers worked out by hand, against loops, and against what must not change them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.rl.advantages import ADVANTAGES, batch_whitened, group, group_centred, leave_one_out, zero_variance
from tests.rl import reference
from tests.rl.reference import F64, close, f64

NAMES = sorted(ADVANTAGES)
every = pytest.mark.parametrize("name", NAMES)
few = settings(max_examples=25, deadline=None, derandomize=True)

# Eighths and their sums are exact in binary, so that a shift changes no difference of two rewards.
eighths = st.integers(-16, 16).map(lambda i: i / 8)


@st.composite
def reward_tables(draw):
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    return f64(*[[draw(eighths) for _ in range(size)] for _ in range(groups)])


def test_group_by_hand():
    # Rewards 1, 0, 0, 0: mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4, std 1/2.
    close(group(f64([1.0, 0, 0, 0])), [[0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]])


def test_group_centred_by_hand():
    # Means 1/4 and 2: nothing is divided, so the second group weighs more.
    close(group_centred(f64([1.0, 0, 0, 0], [4.0, 0, 4, 0])), [[0.75, -0.25, -0.25, -0.25], [2, -2, 2, -2]])


def test_leave_one_out_by_hand():
    # Of 3, 1, 2, 0 the others' means are 3/3, 5/3, 4/3, 6/3.
    close(leave_one_out(f64([3.0, 1, 2, 0])), [[2, -2 / 3, 2 / 3, -2]])


def test_batch_whitened_by_hand():
    # Centred: ±1/2 and ±3/2. Their squares sum to 5, over 4 − 1: the std is √(5/3).
    std = math.sqrt(5 / 3) + 1e-4
    close(batch_whitened(f64([1.0, 0], [3, 0])), [[0.5 / std, -0.5 / std], [1.5 / std, -1.5 / std]])


def test_without_a_verdict_by_hand():
    # 1, 0, 0 count, 9 does not: mean 1/3, sample variance (4/9 + 1/9 + 1/9) / 2 = 1/3.
    rewards, valid = f64([1.0, 0, 9, 0]), torch.tensor([[True, True, False, True]])
    std = math.sqrt(1 / 3) + 1e-4
    close(group(rewards, valid), [[2 / 3 / std, -1 / 3 / std, 0, -1 / 3 / std]])
    close(group_centred(rewards, valid), [[2 / 3, -1 / 3, 0, -1 / 3]])
    close(leave_one_out(rewards, valid), [[1, -1 / 2, 0, -1 / 2]])
    # Over the batch the same six ninths by 3 − 1: the absent one is not in the count either.
    close(batch_whitened(rewards, valid), [[2 / 3 / std, -1 / 3 / std, 0, -1 / 3 / std]])


@every
@pytest.mark.parametrize("shape", [(1, 2), (1, 16), (5, 8), (3, 3)])
def test_equals_the_loops(name, shape):
    rewards = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = ADVANTAGES[name](rewards)
    assert found.dtype == F64
    close(found, reference.advantages(name, rewards.tolist()))


@every
def test_equals_the_loops_where_some_answers_have_no_verdict(name):
    random = torch.Generator().manual_seed(2)
    rewards = torch.randn((6, 7), generator=random, dtype=F64)
    valid = torch.rand((6, 7), generator=random) < 0.7
    assert valid.sum(1).min() >= 2
    assert not valid.all(1).all()
    close(ADVANTAGES[name](rewards, valid), reference.advantages(name, rewards.tolist(), valid.tolist()))


@every
@few
@given(table=reward_tables(), by=eighths)
def test_a_shift_of_the_rewards_changes_nothing(name, table, by):
    close(ADVANTAGES[name](table + by), ADVANTAGES[name](table), rtol=1e-9)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "batch_whitened"])
def test_groups_do_not_see_one_another(name):
    table = torch.randn((4, 5), generator=torch.Generator().manual_seed(3), dtype=F64)
    alone = torch.cat([ADVANTAGES[name](row[None]) for row in table])
    close(ADVANTAGES[name](table), alone)


@every
def test_a_shift_of_one_group_changes_nothing_in_the_others(name):
    table = torch.randn((4, 5), generator=torch.Generator().manual_seed(3), dtype=F64)
    by = f64([0.0], [7.0], [-2.0], [0.5])
    close(ADVANTAGES[name](table + by), ADVANTAGES[name](table), rtol=1e-9, atol=1e-12)


@every
@few
@given(table=reward_tables(), data=st.data())
def test_a_permutation_of_a_group_permutes_its_advantages(name, table, data):
    order = data.draw(st.permutations(range(table.shape[1])))
    close(ADVANTAGES[name](table[:, order]), ADVANTAGES[name](table)[:, order])


@every
@few
@given(table=reward_tables(), data=st.data())
def test_a_permutation_of_the_groups_permutes_their_advantages(name, table, data):
    order = data.draw(st.permutations(range(table.shape[0])))
    close(ADVANTAGES[name](table[order]), ADVANTAGES[name](table)[order])


@every
@few
@given(table=reward_tables())
def test_a_groups_advantages_sum_to_zero_and_keep_the_order_of_rewards(name, table):
    found = ADVANTAGES[name](table)
    close(found.sum(1), torch.zeros(len(table)), atol=1e-9)
    # Two answers of a group differ in advantage as they do in reward, and in no other direction.
    difference, rewards = (x[:, :, None] - x[:, None, :] for x in (found, table))
    assert torch.equal(difference.sign(), rewards.sign())


@few
@given(table=reward_tables(), factor=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_scaled_rewards_scale_what_is_not_divided_by_a_std(table, factor):
    close(group_centred(table * factor), group_centred(table) * factor)
    close(leave_one_out(table * factor), leave_one_out(table) * factor)
    # (cr − cm)/(cs + ε) is A(r) × c(s + ε)/(cs + ε): all but unchanged.
    stds = table.std(dim=1, keepdim=True)
    close(group(table * factor), group(table) * factor * (stds + 1e-4) / (factor * stds + 1e-4))


@few
@given(table=reward_tables())
def test_leave_one_out_is_the_centred_reward_stretched(table):
    size = table.shape[1]
    close(leave_one_out(table), group_centred(table) * size / (size - 1))


@every
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.1])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [3, 16])
def test_a_group_of_equal_rewards_has_no_signal_at_all(name, value, dtype, size):
    # The mean of sixteen times 0.1 is not 0.1 in floating point; the advantage must be 0 all the same.
    rewards = torch.full((2, size), value, dtype=dtype)
    assert ADVANTAGES[name](rewards).abs().max() == 0
    assert zero_variance(rewards).tolist() == [True, True]
    # Also beside a group that has one, and with an answer that takes no part.
    rewards[1] = torch.arange(size)
    rewards[0, 1] = 5.0
    valid = torch.ones(2, size, dtype=torch.bool)
    valid[0, 1] = False
    found = ADVANTAGES[name](rewards, valid)
    assert found[0].abs().max() == 0
    assert found[1].abs().max() > 0.1
    assert zero_variance(rewards, valid).tolist() == [True, False]


def test_rewards_that_differ_by_little_have_a_signal():
    assert zero_variance(f64([0.1, 0.1 + 1e-9])).tolist() == [False]
    assert group(f64([0.1, 0.1 + 1e-9])).abs().min() > 0


@every
@pytest.mark.parametrize("mark", [0.0, 1.0, -1e6, 1e6, math.nan])
def test_an_answer_without_verdict_neither_trains_nor_shifts_its_group(name, mark):
    rewards, other = [1.0, 0.0, 0.5], [2.0, 0.0, 0.0]
    with_it = f64([rewards[0], mark, *rewards[1:]], [*other, mark])
    valid = torch.tensor([[True, False, True, True], [True, True, True, False]])
    found, without = ADVANTAGES[name](with_it, valid), ADVANTAGES[name](f64(rewards, other))
    assert found[~valid].abs().max() == 0
    close(found[valid].reshape(2, 3), without)
    assert zero_variance(f64([1.0, 1.0, 1.0, mark + 0.5]), valid[1:]).tolist() == [True]


@every
def test_one_verdict_or_none_is_no_comparison(name):
    rewards = f64([1.0, 0.0, 5.0], [1.0, 0.0, 5.0], [1.0, 0.0, 5.0])
    valid = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    found = ADVANTAGES[name](rewards, valid)
    assert found[:2].abs().max() == 0
    assert found.isfinite().all()
    assert ADVANTAGES[name](f64([2.0])).tolist() == [[0.0]]
    assert zero_variance(rewards, valid).tolist() == [True, True, False]


@every
def test_all_valid_is_as_if_nothing_were_said(name):
    rewards = torch.randn((3, 4), generator=torch.Generator().manual_seed(5), dtype=F64)
    close(ADVANTAGES[name](rewards, torch.ones(3, 4, dtype=torch.bool)), ADVANTAGES[name](rewards))
