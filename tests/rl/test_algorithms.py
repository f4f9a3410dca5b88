"""Each named algorithm as a whole against its paper's objective, with the table's defaults; and the table itself."""

import math
from typing import get_args

import pytest
import torch

from stages.rl import algorithms
from stages.rl.advantages import ADVANTAGES
from stages.rl.algorithms import ALGORITHMS, PRESETS, with_defaults
from stages.rl.gae import gae, token_rewards, whiten
from stages.rl.kl import ESTIMATORS, kl_terms
from stages.rl.losses import policy_ratio, policy_terms, token_weights
from tests.rl import reference
from tests.rl.reference import F64, batch, close, f64, mean

LONGEST = 9
LENGTHS = [3, 1, 6, 2, 5, 4, 1, 7, 2, 4, 6, 3]  # three groups of four
REWARDS = [[1.0, 0.0, 0.0, 0.5], [0.0, 2.0, 1.0, 1.0], [0.25, 0.0, 0.0, 0.0]]
VALUES = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(8), dtype=F64)


def by_the_table(some, name, logp, **given):
    """Our loss: the table says which functions, and with what numbers."""
    row, s = ALGORITHMS[name], with_defaults({"algorithm": name, **given})
    kl = s["kl"] * ESTIMATORS[s["kl_estimator"]](some.old, some.ref)
    in_reward = s["kl_place"] == "reward"
    if row.advantage == "gae":
        rows = [torch.nn.utils.rnn.pad_sequence(x.split(LENGTHS), batch_first=True) for x in (kl * in_reward, VALUES)]
        rewards = token_rewards(f64(*REWARDS).flatten(), rows[0], torch.tensor(LENGTHS))
        found = gae(rewards, rows[1], 1.0, 0.95)
        advantages = whiten(torch.cat([found[i, :n] for i, n in enumerate(LENGTHS)]))
    else:
        charged = torch.stack([x.sum() for x in kl.split(LENGTHS)]).reshape(3, 4) * in_reward
        advantages = ADVANTAGES[row.advantage](f64(*REWARDS) - charged).flatten()[some.owner]
    terms = policy_terms(
        logp,
        some.old,
        advantages,
        some.owner,
        ratio=s["ratio"],
        surrogate=row.surrogate,
        clip_low=s["clip_low"],
        clip_high=s["clip_high"],
    )
    tokens = terms.policy
    if not in_reward:
        tokens = tokens + s["kl"] * kl_terms(logp, some.ref, s["kl_estimator"])
    weights = f64(*token_weights(LENGTHS, s["aggregation"], LONGEST))[some.owner]
    return (weights * tokens).sum(), terms


# The papers' objectives. Of their arguments the log-probabilities come as one list per answer, the advantages one per answer.
# Every number is the paper's own, or RECIPE's for it, and not read from the table.


def clipped(ratio, advantage, lowest, highest):
    bounded = ratio
    if ratio > highest:
        bounded = highest
    if ratio < lowest:
        bounded = lowest
    return min(ratio * advantage, bounded * advantage)


def advantages_of(name, rewards=REWARDS):
    return [a for group in reference.advantages(name, rewards) for a in group]


def log_ratio(logp, old):
    return sum(p - o for p, o in zip(logp, old, strict=True))


def grpo(logp, old, ref, beta=0.001, low=0.2, high=0.2):
    answers = []
    for advantage, *columns in zip(advantages_of("group"), logp, old, ref, strict=True):
        tokens = []
        for p, o, r in zip(*columns, strict=True):
            kl = reference.exp(r - p) - (r - p) - 1
            tokens.append(clipped(reference.exp(p - o), advantage, 1 - low, 1 + high) - beta * kl)
        answers.append(sum(tokens) / len(tokens))
    return -sum(answers) / len(answers)


def dr_grpo(logp, old, ref):
    total = 0.0
    for advantage, *columns in zip(advantages_of("group_centred"), logp, old, strict=True):
        for p, o in zip(*columns, strict=True):
            total = total + clipped(reference.exp(p - o), advantage, 0.8, 1.2)
    return -total / (12 * 9)


def dapo(logp, old, ref):
    total = 0.0
    for advantage, *columns in zip(advantages_of("group"), logp, old, strict=True):
        for p, o in zip(*columns, strict=True):
            total = total + clipped(reference.exp(p - o), advantage, 0.8, 1.28)
    return -total / 44


def gspo(logp, old, ref):
    # Equation 5: one term per answer, no tokens in it.
    answers = []
    for advantage, p, o in zip(advantages_of("group"), logp, old, strict=True):
        answers.append(clipped(reference.exp(log_ratio(p, o) / len(p)), advantage, 1 - 3e-4, 1 + 4e-4))
    return -mean(answers)


def cispo(logp, old, ref):
    total = 0.0
    for advantage, *columns in zip(advantages_of("group"), logp, old, strict=True):
        for p, o in zip(*columns, strict=True):
            ratio = reference.frozen(reference.exp(p - o))
            total = total + (5.0 if ratio > 5 else ratio) * advantage * p
    return -total / 44


def rloo_rewards(old, ref, beta):
    """Each answer's reward less β log(π/π_ref) of the whole answer."""
    charged = [r - beta * log_ratio(o, f) for r, o, f in zip([r for g in REWARDS for r in g], old, ref, strict=True)]
    return [[float(x) for x in charged[i : i + 4]] for i in (0, 4, 8)]


def rloo(logp, old, ref, beta=0.0):
    answers = []
    for advantage, *columns in zip(advantages_of("leave_one_out", rloo_rewards(old, ref, beta)), logp, old, strict=True):
        answers.append(mean(clipped(reference.exp(p - o), advantage, 0.8, 1.2) for p, o in zip(*columns, strict=True)))
    return -mean(answers)


def rloo_of_one_action(logp, old, ref, beta=0.0):
    answers = []
    for advantage, p, o in zip(advantages_of("leave_one_out", rloo_rewards(old, ref, beta)), logp, old, strict=True):
        answers.append(clipped(reference.exp(log_ratio(p, o)), advantage, 0.8, 1.2))
    return -mean(answers)


def reinforce_baseline(logp, old, ref, beta=0.0):
    total = 0.0
    for advantage, *columns in zip(advantages_of("batch_whitened"), logp, old, ref, strict=True):
        for p, o, r in zip(*columns, strict=True):
            total = total + clipped(reference.exp(p - o), advantage, 0.8, 1.2) - beta * (p - r) ** 2 / 2
    return -total / 44


def ppo(logp, old, ref, beta=0.0):
    advantages = []
    values = reference.cut(VALUES.tolist(), LENGTHS)
    for reward, v, o, r in zip([r for g in REWARDS for r in g], values, old, ref, strict=True):
        tokens = [-beta * float(a - b) for a, b in zip(o, r, strict=True)]
        tokens[-1] += reward
        advantages += reference.gae(tokens, v, 1.0, 0.95)
    middle, std = mean(advantages), reference.sample_std(advantages)
    terms = []
    for a, p, o in zip(advantages, [x for row in logp for x in row], [x for row in old for x in row], strict=True):
        terms.append(clipped(reference.exp(p - o), (a - middle) / std, 0.8, 1.2))
    return -mean(terms)


OBJECTIVES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce++-baseline": reinforce_baseline,
    "ppo": ppo,
}


def check(name, objective, given, arguments, spread):
    some = batch(LENGTHS, seed=11, spread=spread)
    logp = some.logp.clone().requires_grad_()
    found, terms = by_the_table(some, name, logp, **given)
    expected = objective(*(some.cut(x) for x in (logp, some.old, some.ref)), **arguments)
    tolerance = 1e-7 if name == "ppo" else 1e-9
    close(found, expected, rtol=tolerance)
    (gradient,), (wanted,) = torch.autograd.grad(found, logp), torch.autograd.grad(expected, logp)
    close(gradient, wanted, rtol=tolerance)
    assert gradient.abs().max() > 0
    return terms


# GSPO's clip is a thousand times closer than the others', CISPO's far: ratios that come near each.
SPREADS = {"gspo": 1e-3, "cispo": 1.5}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_with_its_defaults_equals_its_papers_objective(name):
    terms = check(name, OBJECTIVES[name], {}, {}, SPREADS.get(name, 0.5))
    # Nothing is shown by answers that no clip touches, nor by such that all are clipped.
    assert 0 < terms.clipped_high.sum() < sum(LENGTHS) / 2
    assert terms.clipped_low.any() or name == "cispo"


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce++-baseline", "ppo"])
def test_with_a_kl_each_algorithm_has_it_where_its_paper_has_it(name):
    check(name, OBJECTIVES[name], {"kl": 0.3}, {"beta": 0.3}, 0.5)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_rloo_of_one_action_equals_its_papers_objective(kl):
    check("rloo", rloo_of_one_action, {"ratio": "product", "kl": kl}, {"beta": kl}, 0.2)


@pytest.mark.parametrize(("preset", "numbers"), [("r1", (0.001, 10, 10)), ("field", (0.0, 0.2, 0.28))])
def test_presets_equal_their_papers_objective(preset, numbers):
    check("grpo", grpo, {"preset": preset}, dict(zip(("beta", "low", "high"), numbers, strict=True)), 1.5)


# --- the table ---


def test_every_word_of_the_table_has_a_function():
    nought, owner = torch.zeros(3, dtype=F64), torch.tensor([0, 0, 1])
    for row in ALGORITHMS.values():
        assert row.advantage == "gae" or row.advantage in ADVANTAGES
        assert row.kl_estimator in ESTIMATORS
        assert row.kl_place in ("loss", "reward")
        close(policy_ratio(nought, nought, owner, row.ratio), [1, 1, 1])
        assert policy_terms(nought, nought, nought, owner, surrogate=row.surrogate).policy.shape == (3,)
        assert len(token_weights([2, 1], row.aggregation, 10)) == 2


def test_every_word_that_settings_may_say_has_a_function_of_its_own():
    assert {*ADVANTAGES, "gae"} == set(get_args(algorithms.AdvantageName))
    assert set(ESTIMATORS) == set(get_args(algorithms.Estimator))
    some = batch([3, 1, 4])
    ratios = {r: policy_ratio(some.logp, some.old, some.owner, r) for r in get_args(algorithms.RatioName)}
    weights = {a: f64(*token_weights([3, 1, 4], a, 10)) for a in get_args(algorithms.AggregationName)}
    surrogates = {
        s: policy_terms(some.logp, some.old, some.spread, some.owner, surrogate=s).policy
        for s in get_args(algorithms.SurrogateName)
    }
    for found in (ratios, weights, surrogates):
        values = list(found.values())
        assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_every_algorithm_has_an_objective_here():
    assert set(OBJECTIVES) == set(ALGORITHMS) == set(get_args(algorithms.AlgorithmName))


def test_the_presets():
    assert PRESETS == {
        "r1": {"clip_low": 10, "clip_high": 10, "kl": 0.001},
        "field": {"clip_low": 0.2, "clip_high": 0.28, "kl": 0},
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_row_gives_the_settings_of_its_names(name):
    row, found = ALGORITHMS[name], with_defaults({"algorithm": name})
    names = {"ratio", "aggregation", "clip_low", "clip_high", "kl", "kl_place", "kl_estimator", "max_resamples"}
    assert found == {"algorithm": name, **{n: getattr(row, n) for n in names}}


def test_without_an_algorithm_it_is_grpo():
    assert with_defaults({}) == {k: v for k, v in with_defaults({"algorithm": "grpo"}).items() if k != "algorithm"}


def test_dapo_alone_draws_again():
    assert {name: row.max_resamples for name, row in ALGORITHMS.items() if row.max_resamples} == {"dapo": 10}


def test_given_goes_before_preset_and_preset_before_algorithm():
    # All three say clip_high; preset and algorithm say clip_low; the algorithm alone says its ratio.
    given = {"algorithm": "gspo", "preset": "field", "clip_high": 0.5}
    found = with_defaults(given)
    assert (found["clip_high"], found["clip_low"], found["kl"], found["ratio"]) == (0.5, 0.2, 0.0, "sequence")
    assert with_defaults({"algorithm": "gspo", "preset": "r1"})["kl"] == 0.001
    # What is given is not written on, and None is something given.
    assert given == {"algorithm": "gspo", "preset": "field", "clip_high": 0.5}
    assert with_defaults({"preset": "r1", "clip_low": None, "kl": 0})["clip_low"] is None
    assert with_defaults({"preset": "r1", "kl": 0})["kl"] == 0


def test_unknown_names_pass_untouched():
    given = {"algorithm": "gppo", "preset": "none", "clip_hihg": 3, "group_size": 8}
    assert with_defaults(given) == given
    found = with_defaults({"algorithm": "dapo", "preset": "none", "group_size": 8})
    assert (found["preset"], found["group_size"], found["clip_high"]) == ("none", 8, 0.28)
    found = with_defaults({"algorithm": "gppo", "preset": "field"})
    assert found == {"algorithm": "gppo", "preset": "field", "clip_low": 0.2, "clip_high": 0.28, "kl": 0.0}


def test_the_reference_of_the_clip_is_not_the_only_one():
    # The two ways in which the clip is written out here agree.
    for ratio in (0.1, 0.9, 1.1, 2.0):
        for advantage in (-1.0, 1.0):
            assert math.isclose(clipped(ratio, advantage, 0.8, 1.3), reference.clip_surrogate(ratio, advantage, 0.2, 0.3))
