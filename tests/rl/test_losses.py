"""The policy loss against numbers worked out by hand, against loops, and against what must not change it."""

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.rl.kl import kl_terms
from stages.rl.losses import policy_ratio, policy_terms, token_weights, truncated_importance
from tests.rl import reference
from tests.rl.reference import F64, batch, close, f64

RATIOS = ["token", "sequence", "product"]
AGGREGATIONS = ["sample_mean", "token_mean", "constant"]
LONGEST = 12
LENGTHS = [3, 1, 6, 2, 5, 4, 1, 7]
few = settings(max_examples=20, deadline=None, derandomize=True)
every_ratio = pytest.mark.parametrize("ratio", RATIOS)
every_surrogate = pytest.mark.parametrize("surrogate", ["clip", "weight"])
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)

# The ways that the parts can be put together; the dual clip is the clipped surrogate's.
WAYS = [{"ratio": r, "surrogate": s, "aggregation": a} for r, s, a in product(RATIOS, ["clip", "weight"], AGGREGATIONS)]
ways = st.sampled_from(WAYS)
some_lengths = st.lists(st.integers(1, 6), min_size=1, max_size=6)
seeds = st.integers(0, 10_000)


def loss_of(
    some, logp=None, *, of=None, aggregation="sample_mean", beta=0.0, estimator="k3", correction=False, cap=None, **how
):
    """Our loss of the answers `some`, as a part of the minibatch `of` (by default all there is)."""
    logp = some.logp if logp is None else logp
    terms = policy_terms(logp, some.old, some.spread, some.owner, **how).policy
    if cap is not None:
        terms = truncated_importance(some.old, some.sampler, cap) * terms
    if beta:
        terms = terms + beta * kl_terms(logp, some.ref, estimator, old_logp=some.old, correction=correction)
    weight = dict(zip((of or some).lengths, token_weights((of or some).lengths, aggregation, LONGEST), strict=True))
    return (f64(*[weight[n] for n in some.lengths])[some.owner] * terms).sum()


def loops(
    some,
    logp,
    *,
    aggregation="sample_mean",
    ratio="token",
    surrogate="clip",
    clip_low=0.2,
    clip_high=0.2,
    clip_dual=None,
    beta=0.0,
    estimator="k3",
    correction=False,
    cap=None,
):
    """The same written out; `logp` may be a list of floats."""
    terms = []
    columns = [some.cut(x) for x in (logp, some.old.tolist(), some.ref.tolist(), some.sampler.tolist())]
    for advantage, (now, old, ref, sampler) in zip(some.advantages.tolist(), zip(*columns, strict=True), strict=True):
        terms.append([])
        for t, rho in enumerate(reference.ratios(ratio, now, old)):
            if surrogate == "clip":
                objective = reference.clip_surrogate(rho, advantage, clip_low, clip_high, clip_dual)
            else:
                objective = reference.weight_surrogate(rho, advantage, now[t], clip_low, clip_high)
            if cap is not None:
                objective = min(math.exp(old[t] - sampler[t]), cap) * objective
            kl = reference.estimate(estimator, now[t], ref[t])
            if correction:
                kl = reference.exp(now[t] - old[t]) * kl
            terms[-1].append(beta * kl - objective)
    return reference.aggregate(aggregation, terms, LONGEST)


def every_case():
    """Answers some of which are within every clip below and some beyond it, upwards and downwards, with either sign of A."""
    return batch(LENGTHS, seed=287)


def both(function, logp):
    """Value and gradient."""
    at = logp.detach().clone().requires_grad_()
    value = function(at)
    return value.detach(), torch.autograd.grad(value, at)[0]


def same(ours, theirs, **tolerance):
    for found, expected in zip(ours, theirs, strict=True):
        close(found, expected, **tolerance)


# --- worked by hand ---


def test_ratios_by_hand():
    # Two answers: log-ratios log 2, log 8 and log 3. Their token ratios; √(2·8) = 4 and 3; 2·8 = 16 and 3.
    logs, owner = f64(math.log(2), math.log(8), math.log(3)), torch.tensor([0, 0, 1])
    nought = torch.zeros(3, dtype=F64)
    close(policy_ratio(logs, nought, owner, "token"), [2, 8, 3])
    close(policy_ratio(logs, nought, owner, "sequence"), [4, 4, 3])
    close(policy_ratio(logs, nought, owner, "product"), [16, 16, 3])


def test_gradients_of_the_ratios_by_hand():
    # As above: of Σ_t ρ_t in each log π. A sequence's √(ab) twice, half the slope for each of the two: 4; the product's twice.
    owner = torch.tensor([0, 0, 1])
    at = f64(math.log(2), math.log(8), math.log(3))
    for ratio, slopes in [("token", [2, 8, 3]), ("sequence", [4, 4, 3]), ("product", [32, 32, 3])]:
        _, gradient = both(lambda x, r=ratio: policy_ratio(x, torch.zeros(3, dtype=F64), owner, r).sum(), at)
        close(gradient, slopes)


def test_token_weights_by_hand():
    # Answers of 1 and 3 tokens, at most 10: halves and a third of them; quarters; one in 2 × 10.
    assert token_weights([1, 3], "sample_mean", 10) == pytest.approx([1 / 2, 1 / 6], rel=1e-15)
    assert token_weights([1, 3], "token_mean", 10) == pytest.approx([1 / 4, 1 / 4], rel=1e-15)
    assert token_weights([1, 3], "constant", 10) == pytest.approx([1 / 20, 1 / 20], rel=1e-15)


def test_clip_by_hand():
    # Ratios 1.5, 0.5, 1.5, 0.5 with advantages +, −, −, +: the first two are clipped, the others pull the policy back.
    logp = f64(math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)).requires_grad_()
    terms = policy_terms(logp, torch.zeros(4, dtype=F64), f64(1.0, -1, -1, 1), torch.arange(4), clip_low=0.2, clip_high=0.3)
    close(terms.policy, [-1.3, 0.8, 1.5, -0.5])
    close(torch.autograd.grad(terms.policy.sum(), logp)[0], [0.0, 0, 1.5, -0.5])
    assert terms.clipped_high.tolist() == [True, False, False, False]
    assert terms.clipped_low.tolist() == [False, True, False, False]


def test_weight_by_hand():
    # CISPO, bounds [0.8, 5]: ratios 6, 2, 1/2 are weights 5, 2, 0.8 of A log π = −log 6, 2 log 2, 3 log ½, all with a slope.
    logp = f64(math.log(6), math.log(2), math.log(0.5)).requires_grad_()
    how = {"surrogate": "weight", "clip_low": 0.2, "clip_high": 4.0}
    terms = policy_terms(logp, torch.zeros(3, dtype=F64), f64(-1.0, 2, 3), torch.arange(3), **how)
    close(terms.policy, [5 * math.log(6), -4 * math.log(2), 2.4 * math.log(2)])
    close(torch.autograd.grad(terms.policy.sum(), logp)[0], [5.0, -4, -2.4])


def test_dual_clip_by_hand():
    # c = 3. Ratios 2, 4 with A = −2: −ρA is 4 and 8, but no more than 6. With A = +2 the ordinary clip at 1.2 stands.
    logp = f64(math.log(2), math.log(4), math.log(4)).requires_grad_()
    terms = policy_terms(logp, torch.zeros(3, dtype=F64), f64(-2.0, -2, 2), torch.arange(3), clip_dual=3.0)
    close(terms.policy, [4.0, 6, -2.4])
    close(torch.autograd.grad(terms.policy.sum(), logp)[0], [4.0, 0, 0])
    assert terms.clipped_high.tolist() == [False, True, True]
    assert terms.clipped_low.tolist() == [False, False, False]


def test_truncated_importance_by_hand():
    # π_old / π_sampler = 2, 1/2, 8 with a cap of 3.
    old, sampler = f64(math.log(0.5), math.log(0.25), math.log(0.8)), f64(math.log(0.25), math.log(0.5), math.log(0.1))
    close(truncated_importance(old, sampler, 3.0), [2, 0.5, 3])
    assert not truncated_importance(old.requires_grad_(), sampler, 3.0).requires_grad


def test_a_whole_loss_by_hand():
    # Answers of 2 and 1 tokens, A = 1 and −1, ρ = (2, 1) and 1/2, ε 0.2: surrogates (1.2, 1) and −0.8 (clipped).
    # sample_mean: −[(1.2 + 1)/2 − 0.8]/2 = −0.15; token_mean: −[1.2 + 1 − 0.8]/3; constant: −1.4/(2 × 12).
    nought = torch.zeros(3, dtype=F64)
    logp = f64(math.log(2), 0.0, math.log(0.5))
    some = reference.Batch([2, 1], logp, nought, logp - math.log(2), nought, f64(1.0, -1.0))
    for aggregation, value in [("sample_mean", -0.15), ("token_mean", -1.4 / 3), ("constant", -1.4 / 24)]:
        close(loss_of(some, aggregation=aggregation), value)
    # The reference is half as likely everywhere: d = −log 2, k3 = ½ + log 2 − 1, so β = 0.1 adds a tenth of that to a mean.
    close(loss_of(some, beta=0.1), -0.15 + 0.1 * (math.log(2) - 0.5))
    # One token in two of the first answer has a slope: ρA w = 1 × 1/4, and from the KL 0.1 × (1 − ½) × w.
    _, gradient = both(lambda x: loss_of(some, x, beta=0.1), logp)
    close(gradient, [0.05 / 4, -1 / 4 + 0.05 / 4, 0.05 / 2])
    # With truncated importance π_old/π_sampler = 4, ½, 1 capped at 2: −[(2·1.2 + ½·1)/2 − 0.8]/2.
    some.sampler = f64(-math.log(4), math.log(2), 0.0)
    close(loss_of(some, cap=2.0), -(2.9 / 2 - 0.8) / 2)


# --- against the loops ---


CLIPS = [(0.2, 0.2, None), (0.2, 0.28, None), (None, 4.0, None), (0.3, None, None), (10.0, 10.0, None), (0.2, 0.28, 2.0)]


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("how", WAYS, ids=lambda way: "-".join(way.values()))
def test_policy_value_and_gradient_equal_the_loops(clips, how):
    low, high, dual = clips
    # The dual clip is the clipped surrogate's.
    how = how | {"clip_low": low, "clip_high": high, "clip_dual": dual if how["surrogate"] == "clip" else None}
    some = every_case()
    ours = both(lambda x: loss_of(some, x, **how), some.logp)
    same(ours, both(lambda x: loops(some, x, **how), some.logp))
    if how["surrogate"] == "clip":
        by_differences = reference.differences(lambda x: loops(some, x, **how), some.logp.tolist())
        close(ours[1], by_differences, rtol=1e-6, atol=1e-8)


@every_ratio
def test_the_answers_above_meet_every_clip_on_either_side(ratio):
    some = every_case()
    rho = policy_ratio(some.logp, some.old, some.owner, ratio)
    for negative in (True, False):
        own = rho[(some.spread < 0) == negative]
        assert (own < 0.7).any()
        assert ((own > 0.8) & (own < 1.2)).any()
        assert (own > 1.28).any()
    assert (rho[some.spread < 0] > 2).any()


@every_ratio
@every_surrogate
@every_aggregation
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("correction", [False, True])
def test_policy_with_kl_and_truncated_importance_equal_the_loops(ratio, surrogate, aggregation, estimator, correction):
    some = every_case()
    how = {"ratio": ratio, "surrogate": surrogate, "aggregation": aggregation, "clip_high": 0.28, "cap": 1.5}
    how |= {"beta": 0.3, "estimator": estimator, "correction": correction}
    same(both(lambda x: loss_of(some, x, **how), some.logp), both(lambda x: loops(some, x, **how), some.logp))


@few
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30), longest=st.integers(300, 4000))
def test_token_weights_equal_the_loops(lengths, longest):
    for aggregation in AGGREGATIONS:
        found = token_weights(lengths, aggregation, longest)
        # The weight of an answer's token is the aggregate of a batch where that token is 1 and all others 0.
        for i in range(min(len(lengths), 5)):
            terms = [[0.0] * n for n in lengths]
            terms[i][-1] = 1.0
            assert found[i] == pytest.approx(reference.aggregate(aggregation, terms, longest), rel=1e-12)
    # The two means are means: all weights together are 1.
    for aggregation in ("sample_mean", "token_mean"):
        weights = token_weights(lengths, aggregation, longest)
        assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0, 10.0])
def test_truncated_importance_equals_the_loop(cap):
    some = batch([40])
    found = truncated_importance(some.old, some.sampler, cap)
    close(found, [min(math.exp(o - s), cap) for o, s in zip(some.old.tolist(), some.sampler.tolist(), strict=True)])


# --- what must not change the loss ---


@few
@given(how=ways, lengths=some_lengths, seed=seeds)
def test_every_answer_twice_is_the_same_loss(how, lengths, seed):
    once = batch(lengths, seed)
    twice = once.only([*range(len(lengths))] * 2)
    features = torch.randn((sum(lengths), 4), generator=torch.Generator().manual_seed(seed), dtype=F64)
    theta = torch.zeros(4, dtype=F64)  # parameters that all tokens share
    how = how | {"beta": 0.1, "cap": 1.5}
    ours = both(lambda x: loss_of(twice, twice.logp + torch.cat([features] * 2) @ x, **how), theta)
    same(ours, both(lambda x: loss_of(once, once.logp + features @ x, **how), theta), rtol=1e-9, atol=1e-12)


@few
@given(how=ways, lengths=some_lengths, seed=seeds, data=st.data())
def test_the_pieces_of_a_minibatch_sum_to_its_loss_and_gradient(how, lengths, seed, data):
    whole = batch(lengths, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths)))) | {0, len(lengths)})
    how = how | {"beta": 0.1, "estimator": "k2", "cap": 1.5}

    def in_pieces(logp):
        moved = replace(whole, logp=logp)
        pieces = [moved.only(order[a:b]) for a, b in pairwise(cuts)]
        return sum(loss_of(piece, of=whole, **how) for piece in pieces)

    same(both(in_pieces, whole.logp), both(lambda x: loss_of(whole, x, **how), whole.logp), rtol=1e-9, atol=1e-12)


@few
@given(how=ways, lengths=some_lengths, seed=seeds, data=st.data())
def test_the_order_of_the_answers_changes_nothing(how, lengths, seed, data):
    some = batch(lengths, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    found = both(lambda x: loss_of(replace(some, logp=x).only(order), beta=0.1, **how), some.logp)
    same(found, both(lambda x: loss_of(some, x, beta=0.1, **how), some.logp), rtol=1e-9, atol=1e-12)


@every_ratio
def test_answers_may_have_any_numbers(ratio):
    some = batch(LENGTHS)
    names = torch.tensor([17, 4, 99, 0, 1000003, 5, 6, 2])
    found = policy_ratio(some.logp, some.old, names[some.owner], ratio)
    close(found, policy_ratio(some.logp, some.old, some.owner, ratio))


@every_ratio
@every_surrogate
def test_zero_advantage_has_no_gradient(ratio, surrogate):
    some = batch(LENGTHS, spread=0.7)
    some.advantages = torch.zeros(len(LENGTHS), dtype=F64)
    value, gradient = both(lambda x: loss_of(some, x, ratio=ratio, surrogate=surrogate), some.logp)
    assert value == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("ratio", ["sequence", "product"])
def test_a_ratio_too_large_for_floating_point_is_clipped_like_any_other(ratio):
    # e^100 is infinite in float32, and 0 × ∞ is no number. Two tokens of 100 make answers of e^100 and e^200.
    logp = torch.full((6,), -1.0).requires_grad_()
    args = logp, logp.detach() - 100, torch.tensor([2.0, 2, 0, 0, -2, -2]), torch.tensor([0, 0, 1, 1, 2, 2])
    terms = policy_terms(*args, ratio=ratio, clip_low=0.2, clip_high=0.2, clip_dual=3.0)
    close(terms.policy, [-2.4, -2.4, 0, 0, 6, 6], rtol=1e-6)
    assert torch.autograd.grad(terms.policy.sum(), logp)[0].tolist() == [0.0] * 6


@every_ratio
@every_surrogate
@every_aggregation
def test_on_policy_the_gradient_is_that_of_reinforce(ratio, surrogate, aggregation):
    some = batch(LENGTHS)
    some.old = some.logp
    close(policy_ratio(some.logp, some.old, some.owner, ratio), torch.ones(sum(LENGTHS)))
    _, gradient = both(lambda x: loss_of(some, x, ratio=ratio, surrogate=surrogate, aggregation=aggregation), some.logp)
    lengths, weights = f64(*LENGTHS), f64(*token_weights(LENGTHS, aggregation, LONGEST))
    if ratio == "product" and surrogate == "clip":
        # The answer is one action: A log π(answer), its share that of all its tokens (1/N with sample_mean).
        weights = weights * lengths
    close(gradient, (-some.advantages * weights)[some.owner])


@every_ratio
@every_surrogate
def test_on_policy_nothing_is_clipped(ratio, surrogate):
    some = batch(LENGTHS)
    terms = policy_terms(some.logp, some.logp, some.spread, some.owner, ratio=ratio, surrogate=surrogate, clip_dual=3.0)
    assert not (terms.clipped_low | terms.clipped_high).any()


@few
@given(how=ways, lengths=some_lengths, seed=seeds, factor=st.floats(0.01, 100))
def test_scaled_advantages_scale_loss_and_gradient(how, lengths, seed, factor):
    some = batch(lengths, seed)
    more = replace(some, advantages=some.advantages * factor)
    value, gradient = both(lambda x: loss_of(some, x, **how), some.logp)
    same(both(lambda x: loss_of(more, x, **how), some.logp), (value * factor, gradient * factor), rtol=1e-9)


@few
@given(lengths=some_lengths, seed=seeds, shift=st.floats(-3, 3))
def test_only_the_difference_of_log_probabilities_counts_for_the_clip(lengths, seed, shift):
    some = batch(lengths, seed)
    moved = replace(some, logp=some.logp + shift, old=some.old + shift, ref=some.ref + shift)
    same(
        both(lambda x: loss_of(moved, x, beta=0.1), moved.logp),
        both(lambda x: loss_of(some, x, beta=0.1), some.logp),
        rtol=1e-9,
        atol=1e-12,
    )


def test_an_answer_of_one_token_has_one_ratio():
    some = batch([1, 1, 1, 1])
    found = [policy_ratio(some.logp, some.old, some.owner, ratio) for ratio in RATIOS]
    close(found[1], found[0])
    close(found[2], found[0])


# --- what is said about clipping ---


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("clips", [(0.2, 0.28), (None, 0.28), (0.2, None), (None, None), (10.0, 10.0), (3e-4, 4e-4)])
def test_clipped_is_said_of_exactly_the_tokens_without_gradient(clips, dual):
    low, high = clips
    grid = [1e-6, 0.1, 0.5, 0.79, 0.81, 0.9995, 0.9998, 1.0, 1.0003, 1.0005, 1.27, 1.29, 2.0, 2.99, 3.01, 10.9, 11.1, 1e6]
    pairs = [(rho, a) for rho in grid for a in (-2.0, 0.0, 0.5)]
    logp, advantages = f64(*[math.log(rho) for rho, _ in pairs]).requires_grad_(), f64(*[a for _, a in pairs])
    owner = torch.arange(len(pairs))
    how = {"clip_low": low, "clip_high": high, "clip_dual": dual}
    terms = policy_terms(logp, torch.zeros_like(advantages), advantages, owner, **how)
    (gradient,) = torch.autograd.grad(terms.policy.sum(), logp)
    clipped = terms.clipped_low | terms.clipped_high
    assert torch.equal(clipped, (gradient == 0) & (advantages != 0))
    for (rho, a), by_low, by_high in zip(pairs, terms.clipped_low.tolist(), terms.clipped_high.tolist(), strict=True):
        assert by_low == (a < 0 and low is not None and rho < 1 - low)
        assert by_high == ((a > 0 and high is not None and rho > 1 + high) or (a < 0 and dual is not None and rho > dual))


@pytest.mark.parametrize("ratio", ["sequence", "product"])
def test_an_answer_is_clipped_whole(ratio):
    some = every_case()
    how = {"ratio": ratio, "clip_low": 0.2, "clip_high": 0.28, "clip_dual": 1.5}
    terms = policy_terms(some.logp, some.old, some.spread, some.owner, **how)
    clipped = terms.clipped_low | terms.clipped_high
    assert all(len({flag.item() for flag in answer}) == 1 for answer in some.cut(clipped))
    _, gradient = both(lambda x: policy_terms(x, some.old, some.spread, some.owner, **how).policy.sum(), some.logp)
    assert torch.equal(clipped, gradient == 0)
    assert terms.clipped_low.any()
    assert (terms.clipped_high & (some.spread > 0)).any()
    assert (terms.clipped_high & (some.spread < 0)).any()
    assert not clipped.all()


def test_with_epsilon_ten_the_lower_clip_is_inert():
    # 1 − 10 is below every ratio: the same as no lower clip, however unlikely the token has become. The upper is at 11.
    rho = [1e-8, 1e-3, 0.5, 10.9, 11.1]
    for sign in (-1.0, 1.0):
        args = f64(*map(math.log, rho)), torch.zeros(5, dtype=F64), f64(*[sign] * 5), torch.arange(5)
        r1 = policy_terms(*args, clip_low=10.0, clip_high=10.0)
        none = policy_terms(*args, clip_low=None, clip_high=10.0)
        assert torch.equal(r1.policy, none.policy)
        assert not r1.clipped_low.any()
        assert r1.clipped_high.tolist() == [False] * 4 + [sign > 0]
        close(r1.policy, [-sign * min(x, 11.0) if sign > 0 else x for x in rho])


def test_weights_that_were_bounded_are_said_to_be():
    rho = [0.5, 0.9, 1.5, 6.0]
    args = f64(*map(math.log, rho)), torch.zeros(4, dtype=F64), f64(1.0, -1, 1, 1), torch.arange(4)
    terms = policy_terms(*args, surrogate="weight", clip_low=0.2, clip_high=4.0)
    assert terms.clipped_low.tolist() == [True, False, False, False]
    assert terms.clipped_high.tolist() == [False, False, False, True]
    terms = policy_terms(*args, surrogate="weight", clip_low=None, clip_high=None)
    assert not (terms.clipped_low | terms.clipped_high).any()
