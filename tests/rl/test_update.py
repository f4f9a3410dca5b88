"""Preparing a rollout and updating on it, through the engine: what is left out, what is weighed, what PPO's parts do."""

import math
from types import SimpleNamespace

import pytest
import torch

from stages.contract.errors import UserError
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing import pack as packed_module
from stages.engine.packing.attention import Family, Layout
from stages.engine.packing.pack import Text, alone, pack
from stages.engine.scorer import TokenScorer, TokenValueScorer, ValueScorer
from stages.engine.settings import Training
from stages.problems.toy import save_toy_tokenizer
from stages.rl.algorithms import ALGORITHMS
from stages.rl.prepare import prepare
from stages.rl.reference import Reference
from stages.rl.settings import GRPO
from stages.rl.update import update
from stages.rollout.protocol import Request, Sampling
from stages.rollout.torch_engine import TorchRollout
from tests.conftest import group_of, tiny_llama
from tests.rl import reference

CPU = torch.device("cpu")
LONGEST = 8


def engine(made=TokenScorer, seed=0):
    return Engine(made(tiny_llama(seed).float()), GRPO(), "zero0", "cpu")


@pytest.fixture
def policy():
    return engine()


def groups():
    return [
        group_of(0, [3, 4], [[5, 6, 1], [7, 1], [8, 9, 10, 1], [11]], [1.0, 0.0, 0.5, 0.0]),
        group_of(1, [12, 13, 14], [[15, 1], [16, 17, 1], [18, 1], [19, 20, 21, 22]], [0.0, 1.0, 0.0, 0.0]),
    ]


def prepared(policy, settings, given=None, **models):
    where = {"seed": 0, "step": 0, "temperature": 1.0, "max_tokens": LONGEST}
    return prepare(groups() if given is None else given, settings, policy, **where, **models)


@torch.no_grad()
def plain_logp(model, episode):
    ids, length = torch.tensor([episode.prompt_ids + episode.completion_ids]), len(episode.completion_ids)
    said = model(ids).logits.log_softmax(-1)[0, -length - 1 : -1]
    return said[torch.arange(length), ids[0, -length:]]


def test_every_epoch_splits_all_answers_anew(policy):
    found = list(prepared(policy, GRPO(kl=0.1, minibatches=3, epochs=2)).minibatches)
    assert [len(batch.answers) for batch in found] == [3, 3, 2, 3, 3, 2]
    epochs = [[[id(a.episode) for a in batch.answers] for batch in found[i : i + 3]] for i in (0, 3)]
    for epoch in epochs:
        assert len({i for batch in epoch for i in batch}) == 8
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("aggregation", "weight"),
    [
        ("sample_mean", lambda a: 1 / (8 * a.length)),
        ("token_mean", lambda _: 1 / 21),
        ("constant", lambda _: 1 / (8 * LONGEST)),
    ],
)
def test_answers_without_advantage_count_and_are_not_computed(policy, aggregation, weight):
    given = groups()
    given[1] = group_of(1, [12], [[15, 1], [16, 17, 1], [18, 1], [19, 20, 21, 22]], [0.5] * 4)
    (batch,) = prepared(policy, GRPO(kl=0.0, aggregation=aggregation), given).minibatches
    assert len(batch.answers) == 4
    assert batch.weights == pytest.approx([weight(a) for a in batch.answers])


def test_answers_without_verdict_or_cut_at_the_limit_are_left_out(policy):
    given = [
        group_of(
            0,
            [3, 4],
            [[5, 6, 1], [7, 1], [8, 9, 10, 1], [11]],
            [1.0, 0.0, 0.5, 0.0],
            verdicts=["right", "wrong", "none", "wrong"],
            finishes=["stop", "stop", "stop", "length"],
        )
    ]
    (batch,) = prepared(policy, GRPO(kl=0.1), given).minibatches
    assert [a.episode.sample for a in batch.answers] == [0, 1, 3]
    assert batch.weights == pytest.approx([1 / (3 * 3), 1 / (3 * 2), 1 / 3])
    # Rewards 1, 0, 0 without the third: mean 1/3, sample std 1/√3.
    std = 1 / math.sqrt(3) + 1e-4
    assert [float(a.advantages[0]) for a in batch.answers] == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std], rel=1e-5)

    (batch,) = prepared(policy, GRPO(kl=0.1, mask_truncated=True), given).minibatches
    assert [a.episode.sample for a in batch.answers] == [0, 1]
    assert batch.weights == pytest.approx([1 / (2 * 3), 1 / (2 * 2)])
    # The cut answer is not trained on, and still stands in the mean of its group.
    assert [float(a.advantages[0]) for a in batch.answers] == pytest.approx([2 / 3 / std, -1 / 3 / std], rel=1e-5)


def test_a_rollout_without_signal_makes_no_update(policy):
    given = [group_of(0, [3], [[5, 1], [6, 1]], [1.0, 1.0])]
    (batch,) = prepared(policy, GRPO(kl=0.0), given).minibatches
    before = [p.clone() for p in policy.model.parameters()]
    stats = update(policy, batch, GRPO(kl=0.0), lr=1e-2, temperature=1.0)
    assert stats.metrics() == {}
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    assert list(prepared(policy, GRPO(kl=0.0), []).minibatches) == []


def test_old_and_reference_log_probabilities_are_those_of_the_plain_model(policy):
    frozen = Reference(tiny_llama(seed=1).float(), CPU)
    found = prepared(policy, GRPO(kl=0.1, minibatches=2), reference=frozen)
    for batch in found.minibatches:
        for answer in batch.answers:
            torch.testing.assert_close(answer.old_logp.double(), plain_logp(tiny_llama(), answer.episode), rtol=0, atol=1e-4)
            torch.testing.assert_close(
                answer.ref_logp.double(), plain_logp(tiny_llama(seed=1), answer.episode), rtol=0, atol=1e-4
            )


def test_a_kl_in_the_reward_is_taken_off_before_the_group_is_compared(policy):
    frozen, beta = Reference(tiny_llama(seed=1).float(), CPU), 0.3
    settings = GRPO(algorithm="rloo", kl=beta)
    assert settings.kl_place == "reward"
    found = prepared(policy, settings, reference=frozen)
    paid = {}
    for group in groups():
        for e in group.episodes:
            k1 = plain_logp(tiny_llama(), e) - plain_logp(tiny_llama(seed=1), e)
            paid[e.problem.id, e.sample] = e.reward.total - beta * float(k1.sum())
    (batch,) = found.minibatches
    for answer in batch.answers:
        e = answer.episode
        others = [v for (problem, sample), v in paid.items() if problem == e.problem.id and sample != e.sample]
        expected = paid[e.problem.id, e.sample] - sum(others) / 3
        assert answer.advantages.tolist() == pytest.approx([expected] * answer.length, abs=1e-4)
    total = sum(e.reward.total for g in groups() for e in g.episodes)
    assert found.metrics["reward/kl_penalty"] == pytest.approx((total - sum(paid.values())) / 8, abs=1e-4)


WIRED = {
    **{name: {"algorithm": name} for name in ALGORITHMS},
    "gspo": {"algorithm": "gspo", "clip_low": 0.05, "clip_high": 0.05},  # its own clip leaves next to nothing of a loss
    **{f"kl {estimator}": {"kl": 0.3, "kl_estimator": estimator} for estimator in ("k1", "k2", "k3")},
    "corrected kl": {"kl": 0.3, "kl_correction": True},
    "kl in the reward": {"kl": 0.3, "kl_place": "reward"},
    "product": {"algorithm": "rloo", "ratio": "product"},
    "dual clip": {"clip_dual": 1.1},
    "clips apart": {"clip_low": 0.1, "clip_high": 0.5},
    "no clips": {"clip_low": None, "clip_high": None},
    "token mean": {"aggregation": "token_mean"},
    "constant": {"aggregation": "constant"},
}


@pytest.mark.parametrize("case", WIRED)
def test_the_loss_of_an_update_is_the_one_that_the_settings_name(policy, case):
    settings = GRPO(**WIRED[case], epochs=2)  # two updates: the ratio counts
    critic = engine(ValueScorer, seed=2) if settings.algorithm == "ppo" else None
    frozen = Reference(tiny_llama(seed=1).float(), CPU) if settings.kl else None
    batch = next(prepared(policy, settings, reference=frozen, critic=critic).minibatches)
    noise = torch.Generator().manual_seed(0)
    for answer in batch.answers:  # as if the policy had moved: ratios inside and outside the clips
        answer.old_logp = answer.old_logp + 0.3 * torch.randn(answer.length, generator=noise)
    stats = update(policy, batch, settings, lr=0.0, temperature=1.0, critic=critic)
    terms = []
    for answer in batch.answers:
        logp = plain_logp(tiny_llama(), answer.episode)
        old, advantages = answer.old_logp.double(), answer.advantages.double()
        kind = ALGORITHMS[settings.algorithm].surrogate
        low, high = settings.clip_low, settings.clip_high
        row = []
        for t, ratio in enumerate(reference.ratios(settings.ratio, logp, old)):
            if kind == "weight":
                term = -reference.weight_surrogate(ratio, advantages[t], logp[t], low, high)
            else:
                term = -reference.clip_surrogate(ratio, advantages[t], low, high, settings.clip_dual)
            if settings.kl and settings.kl_place == "loss":
                estimate = reference.estimate(settings.kl_estimator, logp[t], answer.ref_logp[t].double())
                term = term + settings.kl * estimate * (reference.exp(logp[t] - old[t]) if settings.kl_correction else 1)
            row.append(term)
        terms.append(row)
    expected = float(reference.aggregate(settings.aggregation, terms, LONGEST))
    assert stats.loss == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert abs(expected) > 1e-4
    if case not in ("cispo", "no clips"):
        assert stats.clipped_low + stats.clipped_high > 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_in_the_reward_is_of_the_estimator_that_the_settings_name(policy, estimator):
    frozen = Reference(tiny_llama(seed=1).float(), CPU)
    settings = GRPO(algorithm="ppo", kl=0.3, kl_estimator=estimator, critic={"whiten": False, "length_adaptive": 0.4})
    (batch,) = prepared(policy, settings, reference=frozen, critic=engine(ValueScorer, seed=2)).minibatches
    for answer in batch.answers:
        policy_says, reference_says = (plain_logp(tiny_llama(seed), answer.episode) for seed in (0, 1))
        earned = [-0.3 * float(reference.estimate(estimator, a, b)) for a, b in zip(policy_says, reference_says, strict=True)]
        earned[-1] += answer.episode.reward.total
        lam = max(0.0, 1 - 1 / (0.4 * answer.length))
        expected = reference.gae(earned, [0.0] * answer.length, 1.0, lam)
        assert answer.advantages.tolist() == pytest.approx([float(x) for x in expected], rel=1e-3, abs=1e-3)


def ppo(**critic):
    return GRPO(algorithm="ppo", critic=critic)


@pytest.mark.parametrize("model", ["own", "shared"])
def test_ppo_learns_returns_from_its_values(model):
    made = TokenScorer if model == "own" else TokenValueScorer
    policy = engine(made)
    critic = engine(ValueScorer, seed=2) if model == "own" else None
    head = (critic or policy).engine.module.head
    torch.nn.init.normal_(head.weight)
    found = prepared(policy, ppo(model=model, whiten=False), critic=critic)
    plain = tiny_llama(2 if model == "own" else 0).float()
    (batch,) = found.minibatches
    for answer in batch.answers:
        e = answer.episode
        ids = torch.tensor([e.prompt_ids + e.completion_ids[:-1]])
        with torch.no_grad():
            values = head(plain.model(ids).last_hidden_state)[0, -answer.length :, 0]
        torch.testing.assert_close(answer.values, values, rtol=1e-3, atol=1e-3)
        # λ = γ = 1: every token's return is the answer's reward.
        assert answer.returns.tolist() == pytest.approx([e.reward.total] * answer.length, abs=1e-5)
        torch.testing.assert_close(answer.advantages, e.reward.total - answer.values)
    values = torch.cat([a.values for a in batch.answers]).double()
    returns = torch.cat([a.returns for a in batch.answers]).double()
    explained = 1 - (returns - values).var() / returns.var()
    assert found.metrics["value/explained_variance"] == pytest.approx(float(explained), rel=1e-4)


def test_ppo_whitens_over_all_tokens_and_decouples_the_lambdas():
    policy, critic = engine(), engine(ValueScorer, seed=2)
    torch.nn.init.normal_(critic.engine.module.head.weight)
    (batch,) = prepared(policy, ppo(lam=0.5, lam_critic=1.0), critic=critic).minibatches
    answers = batch.answers
    advantages = torch.cat([a.advantages for a in answers])
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages.std()) == pytest.approx(1, rel=1e-5)
    (raw,) = prepared(policy, ppo(lam=0.5, lam_critic=1.0, whiten=False), critic=critic).minibatches
    for answer in raw.answers:
        assert answer.returns.tolist() == pytest.approx([answer.episode.reward.total] * answer.length, abs=1e-5)
        expected, later = [], 0.0
        values = [*answer.values.tolist(), 0.0]
        for t in reversed(range(answer.length)):
            delta = (answer.episode.reward.total if t == answer.length - 1 else 0.0) + values[t + 1] - values[t]
            later = delta + 0.5 * later
            expected.insert(0, later)
        assert answer.advantages.tolist() == pytest.approx(expected, abs=1e-5)


def test_pretraining_moves_the_value_model_and_leaves_the_policy():
    policy, critic = engine(), engine(ValueScorer, seed=2)
    settings = GRPO(algorithm="ppo", critic={"pretrain": 3, "lr": 1e-2}, steps=9, lr=1e-3)
    before = [[p.clone() for p in e.engine.module.parameters()] for e in (policy, critic)]
    losses = []
    for _ in range(8):
        (batch,) = prepared(policy, settings, critic=critic).minibatches
        stats = update(policy, batch, settings, lr=1e-3, temperature=1.0, critic=critic, pretrain=True)
        losses.append(stats.metrics()["value/loss"])
    assert all(torch.equal(a, b) for a, b in zip(before[0], policy.engine.module.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[1], critic.engine.module.parameters(), strict=True))
    assert losses[-1] < losses[0] / 2
    assert "train/loss" not in stats.metrics()


def test_a_shared_value_loss_reaches_body_and_head():
    policy = engine(TokenValueScorer)
    settings = ppo(model="shared", weight=0.25)
    (batch,) = prepared(policy, settings).minibatches
    head = policy.engine.module.head
    stats = update(policy, batch, settings, lr=1e-2, temperature=1.0)
    assert head.weight.abs().max() > 0
    # On-policy the policy's loss is −Σ w A; the head says 0, so the value loss is ½ R² as a mean over tokens.
    tokens = sum(a.length for a in batch.answers)
    policy_loss = -sum(float(a.advantages.sum()) for a in batch.answers) / tokens
    value_loss = sum(a.length * a.episode.reward.total**2 / 2 for a in batch.answers) / tokens
    assert stats.loss == pytest.approx(policy_loss + 0.25 * value_loss, rel=1e-5)
    assert stats.value_loss / stats.valued == pytest.approx(value_loss, rel=1e-5)


def test_a_refreshed_reference_is_the_policy_and_survives_a_checkpoint(policy, tmp_path):
    frozen, settings = Reference(tiny_llama(seed=1).float(), CPU), GRPO(kl=0.1)

    def kl(of):
        (batch,) = prepared(policy, settings, reference=of).minibatches
        return update(policy, batch, settings, lr=0.0, temperature=1.0).metrics()["train/kl"]

    assert kl(frozen) > 0.1
    assert frozen.state(main=True) == {}  # the stage's input has it
    frozen.refresh(policy)
    assert kl(frozen) == pytest.approx(0, abs=1e-9)
    again = Reference(tiny_llama(seed=1).float(), CPU)
    again.restore(frozen.state(main=True).__getitem__)
    assert again.refreshed
    assert kl(again) == pytest.approx(0, abs=1e-9)
    # It is a copy: it stays where it is when the policy moves.
    (batch,) = prepared(policy, settings, reference=frozen).minibatches
    update(policy, batch, settings, lr=1e-2, temperature=1.0)
    assert kl(again) > 1e-6


def test_importance_weights_scale_what_the_sampler_thought_otherwise_of(policy):
    # The sampler gave the first answers half the policy's probability, the others four times: weights 2 (cap 1.5) and 1/4.
    given, weight = groups(), lambda e: 1.5 if e.sample == 0 else 0.25
    for group in given:
        for e in group.episodes:
            e.logprobs = [v + (-math.log(2) if e.sample == 0 else math.log(4)) for v in plain_logp(tiny_llama(), e).tolist()]
    settings = GRPO(kl=0.0, importance_cap=1.5)
    (batch,) = prepared(policy, settings, given).minibatches
    stats = update(policy, batch, settings, lr=0.0, temperature=1.0)
    expected = 0.0
    for group in given:
        rewards = torch.tensor([e.reward.total for e in group.episodes])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        expected -= sum(weight(e) * float(a) for e, a in zip(group.episodes, advantages, strict=True)) / 8
    assert abs(expected) > 0.1
    assert stats.loss == pytest.approx(expected, rel=1e-4)
    tokens = [weight(a.episode) for a in batch.answers for _ in range(a.length)]
    assert stats.metrics()["train/importance"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-4)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Real answers of the torch engine, at a temperature, in float32."""
    model = tiny_llama().float()
    requests = [Request(str(n), ids, samples=6) for n, ids in enumerate([(3, 4, 5), (6, 7), (8, 9, 10, 11)])]
    rollout = TorchRollout(model, save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    found = rollout.sample(requests, Sampling(temperature=0.7, max_tokens=LONGEST), seed=0, purpose="t", step=0)
    return [
        group_of(
            number,
            request.prompt_ids,
            [c.ids for c in answers],
            [float(i % 2) for i in range(6)],
            logprobs=[c.logprobs for c in answers],
        )
        for number, (request, answers) in enumerate(zip(requests, found, strict=True))
    ]


def mismatch(given, *, minibatches, temperature=0.7):
    policy, settings = engine(), GRPO(kl=0.0, minibatches=minibatches)
    where = {"seed": 0, "step": 0, "temperature": temperature, "max_tokens": LONGEST}
    batches = prepare(given, settings, policy, **where).minibatches
    stats = [update(policy, batch, settings, lr=0.0, temperature=temperature).metrics() for batch in batches]
    return max(s["train/mismatch_max"] for s in stats), max(s["train/mismatch_kl"] for s in stats)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_sampler_and_trainer_agree_and_the_alarm_sees_what_is_broken(sampled, monkeypatch, minibatches):
    largest, kl = mismatch(sampled, minibatches=minibatches)
    assert largest <= 1e-4
    assert kl <= 1e-6
    alarm = GRPO().mismatch_alarm

    _, kl = mismatch(sampled, minibatches=minibatches, temperature=1.0)
    assert kl > 10 * alarm

    with monkeypatch.context() as broken:  # positions that count on from one text to the next

        def counted_on(*given):
            packed = pack(*given)
            packed.positions = torch.arange(packed.size)
            return packed

        broken.setattr(packed_module, "pack", counted_on)
        _, kl = mismatch(sampled, minibatches=minibatches)
        assert kl > 10 * alarm

    with monkeypatch.context() as broken:  # one long text: answers see each other

        def together(_groups, tokens, _prefix):
            line = torch.arange(tokens)
            return Layout([Family(1, tokens)], line, line, line[:0])

        broken.setattr(packed_module, "_layout", together)
        _, kl = mismatch(sampled, minibatches=minibatches)
        assert kl > 10 * alarm


def test_value_scorers_leave_the_log_probabilities_alone():
    (packed,) = alone([Text([3, 4], [5, 6, 1])])
    plain, both = TokenScorer(tiny_llama()), TokenValueScorer(tiny_llama())
    assert torch.equal(plain(packed)[0], both(packed)[0])
    (values,) = ValueScorer(tiny_llama())(packed)
    assert values.tolist() == [0.0, 0.0, 0.0]  # a fresh head says nothing


@pytest.mark.parametrize("made", [TokenScorer, TokenValueScorer])
def test_layers_that_are_computed_again_give_the_same_gradient_and_keep_less(made):
    settings = {"algorithm": "ppo", "critic": {"model": "shared"}} if made is TokenValueScorer else {}
    found = {}
    for again in (False, True):
        policy = Engine(made(tiny_llama().float()), GRPO(gradient_checkpointing=again), "zero0", "cpu")
        kept, gradients = [], {}

        def keep(lr, policy=policy, gradients=gradients):
            gradients.update((name, p.grad.clone()) for name, p in policy.engine.module.named_parameters())
            return 0.0

        policy.step = keep
        policy.model.eval()  # as sampling does between two updates
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            run = GRPO(**settings)
            for batch in prepared(policy, run).minibatches:
                update(policy, batch, run, lr=1e-3, temperature=1.0)
        found[again] = gradients, sum(kept)
    (plain, much), (again, little) = found[False], found[True]
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-9)
    assert little < much / 2


def test_a_gpus_gradients_are_summed_in_a_fixed_order_or_it_is_said_why_not():
    gpu = SimpleNamespace(device=torch.device("cuda"), settings=Training())
    with Engine._in_fixed_order(gpu):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    unable = "index_add_cuda_ does not have a deterministic implementation"
    with pytest.raises(UserError, match=unable) as raised, Engine._in_fixed_order(gpu):
        raise RuntimeError(f"{unable}, but you set …")
    assert raised.value.where == "deterministic"
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="out of memory"), Engine._in_fixed_order(gpu):
        raise RuntimeError("CUDA out of memory")
    gpu.settings = Training(deterministic=False)
    with Engine._in_fixed_order(gpu):
        assert not torch.are_deterministic_algorithms_enabled()
